"""Aggregators that compare whole contributions: vectors, whole against parts, rows that are far off or not finite."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from starling.actors.wire.buffers import Cuts, TensorSpec, coefficients
from starling.algorithms.aggregators import Aggregator
from starling.algorithms.aggregators.geometric_median import GeometricMedian
from starling.algorithms.aggregators.gram import GramAggregator, finite_rows, gram, squared_distances
from starling.algorithms.aggregators.krum import Krum, MultiKrum
from starling.algorithms.api import AllReduce
from starling.algorithms.codecs import Codec, Identity
from starling.algorithms.codecs.int8 import Int8
from starling.algorithms.federated.fedavg import FedAvg
from starling.algorithms.registry import table

if TYPE_CHECKING:
    from starling.algorithms.aggregators.gram import Matrix

VECTORS: dict[str, Any] = json.loads(Path(__file__).parent.joinpath("vectors/gram_rules.json").read_text())
RULES: list[GramAggregator] = [
    Krum(f=1),
    Krum(f=1, neighbors="n-f-2"),
    MultiKrum(f=2),
    MultiKrum(f=1, m=2),
    GeometricMedian(),
    GeometricMedian(start="origin", steps=3, nu=0.1),
]


def draw(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1000 * seed + count)
    return [torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]


def direct(rows: list[Tensor]) -> Matrix:
    """Squared distances by definition, those to the origin last."""
    wide = [*(row.double() for row in rows), torch.zeros(rows[0].numel(), dtype=torch.float64)]
    return np.array([[float((one - other).square().sum()) for other in wide] for one in wide])


def in_parts(rule: GramAggregator, rows: list[Tensor], weights: list[float], num_parts: int, codec: Codec) -> Tensor:
    """The combination as an exchange makes it: cut, encoded, measured and reduced part by part."""
    half = rows[0].numel() // 3
    payloads = [{"a": row[:half], "b": row[half:]} for row in rows]
    specs = tuple(TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in payloads[0].items())
    cuts = Cuts(specs, codec, Identity(), num_parts)
    operation = AllReduce(None, aggregator=rule, codec=codec)
    encoded = [cuts.encode(payload) for payload in payloads]
    by_part = [[one[part] for one in encoded] for part in range(num_parts)]
    measures = [cuts.measure(operation, part, found) for part, found in enumerate(by_part)]
    found = coefficients(operation, measures, weights)
    result = cuts.assemble([cuts.reduce(operation, part, data, found) for part, data in enumerate(by_part)], CPU)
    assert isinstance(result, dict)
    return torch.cat([result["a"], result["b"]])


CPU = torch.device("cpu")


def test_are_in_the_table():
    names = {"krum": Krum, "multi_krum": MultiKrum, "geometric_median": GeometricMedian}
    assert table(Aggregator).items() >= names.items()
    for rule in RULES:
        assert TypeAdapter(Aggregator).validate_python(rule.model_dump()) == rule


# --- the rules ------------------------------------------------------------------------------------------------------


def _rule(name: str, params: dict[str, Any]) -> GramAggregator:
    if name == "GeometricMedian":
        return GeometricMedian(start="origin", nu=params.get("nu", 0.1), steps=params.get("T", 3), tol=0)
    return (Krum if name == "Krum" else MultiKrum)(f=params["f"])


@pytest.mark.parametrize("case", VECTORS["byzfl"], ids=lambda case: f"{case['rule']} {case['params']} {case['input']}")
def test_vectors(case: dict[str, Any]):
    rows = [torch.tensor(row, dtype=torch.float64) for row in VECTORS["inputs"][case["input"]]]
    found = _rule(case["rule"], case["params"]).combine(rows, [1.0] * len(rows))
    expected = torch.tensor(case["output"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_score_of_the_paper():
    case = VECTORS["krum_paper"]
    rows = [torch.tensor(row, dtype=torch.float64) for row in case["input"]]
    rule = Krum(f=case["f"], neighbors="n-f-2")
    assert torch.equal(rule.combine(rows, [1.0] * len(rows)), rows[case["selected"]])
    assert rule.least == 2 * case["f"] + 3


@given(st.integers(0, 2**31), st.integers(5, 12), st.integers(0, 2), st.integers(1, 6))
def test_krum_is_its_definition(seed: int, count: int, f: int, m: int):
    rows = draw(count, 20, seed)
    distances = direct(rows)
    scores = [sum(sorted(distances[row][:count])[1 : count - f]) for row in range(count)]
    best = sorted(range(count), key=scores.__getitem__)[: min(m, count - f)]
    expected = torch.stack([rows[row] for row in best]).double().mean(dim=0)
    found = MultiKrum(f=f, m=m).combine(rows, [1.0] * count)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(Krum(f=f).combine(rows, [1.0] * count), rows[best[0]])


@given(st.integers(0, 2**31), st.lists(st.floats(0.2, 5.0), min_size=4, max_size=9))
def test_the_geometric_median_is_where_unit_vectors_cancel(seed: int, weights: list[float]):
    """At the least Σ wᵢ‖xᵢ − z‖ its gradient is zero, or no longer than the weight of the row that z lies in."""
    rows = draw(len(weights), 12, seed, torch.float64)
    found = GeometricMedian(steps=500, tol=1e-9).combine(rows, weights)
    away = [(row - found, weight) for row, weight in zip(rows, weights, strict=True)]
    near = sum(weight for row, weight in away if row.norm() < 1e-3)
    pull = sum((weight * row / row.norm() for row, weight in away if row.norm() >= 1e-3), torch.zeros(12).double())
    assert pull.norm() <= near + 0.01 * sum(weights)


def test_the_geometric_median_of_points_on_a_line():
    rows = [torch.tensor([value, 2 * value]) for value in (0.0, 1.0, 5.0)]
    found = GeometricMedian(steps=1000, tol=0).combine(rows, [1.0] * 3)
    torch.testing.assert_close(found, rows[1], rtol=1e-4, atol=1e-4)
    heavy = GeometricMedian(steps=1000, tol=0).combine(rows, [1.0, 1.0, 5.0])
    torch.testing.assert_close(heavy, rows[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equal_rows_are_the_result(rule: GramAggregator):
    (row,) = draw(1, 50)
    torch.testing.assert_close(rule.combine([row] * 7, [1.0] * 7), row, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES[:5], ids=repr)
def test_moved_scaled_and_reordered_rows_move_scale_and_keep_the_result(rule: GramAggregator):
    rows = draw(7, 64, dtype=torch.float64)
    weights = [1.0] * 7
    found = rule.combine(rows, weights)
    (offset,) = draw(1, 64, seed=5, dtype=torch.float64)
    torch.testing.assert_close(
        rule.combine([8 * row + 100 * offset for row in rows], weights), 8 * found + 100 * offset
    )
    torch.testing.assert_close(rule.combine(rows[3:] + rows[:3], weights), found)


def test_f_of_zero_with_all_chosen_is_the_mean():
    rows = draw(6, 100)
    found = MultiKrum(f=0).combine(rows, [1.0] * 6)
    torch.testing.assert_close(found, torch.stack(rows).mean(dim=0), rtol=1e-5, atol=1e-6)


# --- one bad row ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES[:5], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_that_is_far_off_or_not_finite_has_no_part(rule: GramAggregator, bad: float, place: int):
    rows = [row + 5 for row in draw(7, 20_000)]
    rows[place] = rows[place].clone()
    rows[place][17_000] = bad
    found = rule.combine(rows, [1.0] * 7)
    assert found.isfinite().all()
    honest = torch.stack([row for node, row in enumerate(rows) if node != place])
    spread = (honest - honest.mean(dim=0)).norm(dim=1).max()
    assert (found - honest.mean(dim=0)).norm() <= 2 * spread


@pytest.mark.parametrize("place", [0, 1])
def test_a_huge_row_does_not_round_the_distances_of_others(place: int):
    """Were it the reference, or in a mean that is, then all others would be one point as seen from there."""
    rows = [1.0 + 1e-4 * row for row in draw(5, 30_000)]
    rows.insert(place, torch.full((30_000,), 1e30))
    measured = gram([row.numpy() for row in rows])
    others = [node for node in range(6) if node != place]
    found = squared_distances(measured)[others][:, others]
    np.testing.assert_allclose(found, direct([rows[node] for node in others])[:5, :5], rtol=1e-9)


def test_a_common_offset_costs_no_digits():
    rows = [1000.0 + 1e-3 * row for row in draw(6, 50_000)]
    found = squared_distances(gram([row.numpy() for row in rows]))
    expected = direct(rows)
    np.testing.assert_allclose(found[:6, :6], expected[:6, :6], rtol=1e-9)
    np.testing.assert_allclose(found[6], expected[6], rtol=1e-9)
    stacked = torch.stack(rows)
    single = stacked @ stacked.T
    naive = (single.diagonal()[:, None] + single.diagonal() - 2 * single).double().numpy()
    assert (np.abs(naive - expected[:6, :6]) / expected[:6, :6].max()).max() > 1, "float32 would be good enough"


def test_too_many_that_are_not_finite_make_a_result_that_is_none():
    rows = [torch.tensor([math.nan])] * 3 + [torch.tensor([1.0])]
    assert Krum(f=1, neighbors="n-f-2").combine(rows, [1.0] * 4).isnan().all()
    assert GeometricMedian().combine(rows[:3], [1.0] * 3).isnan().all()
    assert Krum(f=0).combine(rows, [1.0] * 4).item() == 1.0, "one is left, which is as many as f = 0 needs"


def test_rows_that_are_not_finite_in_any_part_are_found():
    rows = draw(4, 10)
    rows[2] = torch.full((10,), math.inf)
    total = gram([row[:5].numpy() for row in rows]) + gram([row[5:].numpy() for row in rows])
    assert finite_rows(total) == [0, 1, 3]
    assert np.isinf(squared_distances(total)[2, [0, 1, 3, 4]]).all()


# --- whole and in parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_parts_is_the_rule_on_whole_vectors(rule: GramAggregator, num_parts: int, dtype: torch.dtype):
    rows, weights = draw(7, 40_001, dtype=dtype), [1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 0.5]
    whole = rule.combine(rows, weights)
    found = in_parts(rule, rows, weights, num_parts, Identity())
    if isinstance(rule, Krum):
        assert torch.equal(found, whole)
    else:
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)


def test_what_is_measured_is_what_the_codec_brings():
    rows = draw(7, 5000)
    found = in_parts(Krum(f=1), rows, [1.0] * 7, 3, Int8(block_size=16))
    arrived = [torch.cat([Int8(block_size=16).through(half) for half in (row[:1666], row[1666:])]) for row in rows]
    assert torch.equal(found, Krum(f=1).combine(arrived, [1.0] * 7))


def test_empty_parts_measure_nothing():
    specs = (TensorSpec("", torch.float32, (1,)),)
    cuts = Cuts(specs, Identity(), Identity(), 2)
    operation = AllReduce(None, aggregator=Krum(f=0))
    rows = [cuts.encode(torch.tensor([value])) for value in (1.0, 2.0)]
    measures = [cuts.measure(operation, part, [row[part] for row in rows]) for part in range(2)]
    assert [one.nbytes for one in measures] == [Krum().measured_nbytes(2)] * 2
    assert sum(bool(one.any()) for one in measures) == 1


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_contributions_are_not_written_to(rule: GramAggregator):
    rows = draw(7, 100)
    kept = [row.clone() for row in rows]
    rule.combine(rows, [1.0] * 7)
    assert all(torch.equal(row, before) for row, before in zip(rows, kept, strict=True))


SCRIPT = """
import hashlib, torch
from starling.algorithms.aggregators.gram import gram
rng = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for count, size in (2, 100), (5, 30_000), (20, 70_001), (33, 20_000):
    digest.update(gram([torch.randn(size, generator=rng).numpy() for _ in range(count)]).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_number_of_threads():
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in "124"
    }
    assert len(found) == 1


# --- programs that hold all contributions ---------------------------------------------------------------------------


class Nearest(GramAggregator, name="test_nearest"):
    """The mean of the own contribution and the nearest to it."""

    def weigh(self, measured: Matrix, weights: Any, own: int | None = None) -> list[float]:
        assert own is not None
        row = squared_distances(measured)[own][: len(weights)]
        chosen = sorted(range(len(weights)), key=row.__getitem__)[:2]
        return [0.5 if place in chosen else 0.0 for place in range(len(weights))]


class Clipped(GramAggregator, name="test_clipped"):
    """The mean of rows that are cut down to length 1: norms are distances to the origin."""

    def weigh(self, measured: Matrix, weights: Any, own: int | None = None) -> list[float]:
        norms = np.sqrt(squared_distances(measured)[-1])
        return [min(1.0, 1.0 / float(norms[row])) / len(weights) for row in range(len(weights))]


def test_a_rule_may_measure_from_ones_own():
    rows = [torch.tensor([value]) for value in (0.0, 1.0, 10.0, 12.0)]
    assert [Nearest().combine(rows, [1.0] * 4, own).item() for own in (0, 3)] == [0.5, 11.0]


def test_norms_are_distances_to_the_origin():
    rows = [1000 + row for row in draw(5, 3000)]
    expected = sum(row / row.norm() for row in rows) / 5
    torch.testing.assert_close(Clipped().combine(rows, [1.0] * 5), expected)


# --- what is refused ------------------------------------------------------------------------------------------------


class Masked(Codec, name="test_masked"):
    """Values under masks that cancel in the sum."""

    @property
    def hides_contributions(self) -> bool:
        return True

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return num_values * dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        return data.view(dtype)


@pytest.mark.parametrize("rule", RULES[::2], ids=repr)
def test_a_codec_that_hides_contributions_is_refused(rule: GramAggregator):
    text = (
        f"aggregator: {rule.name} compares contributions, and codec .*Masked hides them; take codec identity, or mean"
    )
    with pytest.raises(ValueError, match=text):
        AllReduce(torch.zeros(1), aggregator=rule, codec=Masked())
    with pytest.raises(ValidationError, match=text):
        FedAvg(aggregator=rule, codec=Masked())
    AllReduce(torch.zeros(1), codec=Masked())


@pytest.mark.parametrize("fields", [{"f": -1}, {"f": 1.5}, {"neighbors": "n"}, {"m": 0}])
def test_impossible_settings_are_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        MultiKrum(**fields)


def test_least():
    assert [Krum(f=f).least for f in range(3)] == [1, 3, 5]
    assert GeometricMedian().least == 1
    for count in range(1, 9):
        for f in itertools.takewhile(lambda f, count=count: 2 * f < count, range(9)):
            assert math.fsum(MultiKrum(f=f).weigh(gram([np.ones(2)] * count), [1.0] * count)) == pytest.approx(1.0)
