"""Aggregators: what they compute, and the same bits wherever an exchange is cut."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from starling.algorithms.aggregators import Aggregator, Mean
from starling.algorithms.aggregators.base import BLOCK, Uniform
from starling.algorithms.aggregators.robust import Median, TrimmedMean
from starling.algorithms.aggregators.sorting import _MAX_NETWORK, network
from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import table

ALL = [Mean(), Uniform(), Median(), TrimmedMean(trim=1), TrimmedMean(trim=0.3)]


def reduce(
    aggregator: Aggregator,
    contributions: list[Tensor],
    weights: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full((contributions[0].numel(),), torch.nan, dtype=dtype)
    aggregator.reduce(contributions, weights or [1.0] * len(contributions), out)
    return out


def mean(contributions: list[Tensor], weights: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return reduce(Mean(), contributions, weights, dtype)


def column(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def value(aggregator: Aggregator, values: list[float], weights: list[float] | None = None) -> float:
    return reduce(aggregator, column(*values), weights, torch.float64).item()


def draw(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(count * size)
    return [torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), size=st.integers(0, 70))
def test_weighted_mean(weights: list[float], size: int):
    contributions = draw(len(weights), size, torch.float64)
    expected = sum(one * weight for one, weight in zip(contributions, weights, strict=True)) / sum(weights)
    assert torch.is_tensor(expected)
    torch.testing.assert_close(mean(contributions, weights, torch.float64), expected, rtol=1e-13, atol=1e-13)
    single = mean([one.float() for one in contributions], weights)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_definition_in_single_precision():
    """acc = w₀·x₀; acc += wᵢ·xᵢ; acc /= Σw, each operation rounded."""
    contributions, weights = draw(4, 1000), [3.0, 1.0, 0.1, 700.0]
    total = contributions[0] * weights[0]
    for one, weight in zip(contributions[1:], weights[1:], strict=True):
        total = total + one * weight
    assert torch.equal(mean(contributions, weights), total / sum(weights))
    plain = ((contributions[0] + contributions[1]) + contributions[2]) / 3
    assert torch.equal(mean(contributions[:3], [1.0, 1.0, 1.0]), plain)


def test_order_is_that_of_the_arguments():
    big, one, minus = torch.tensor([2.0**30]), torch.tensor([1.0]), torch.tensor([-(2.0**30)])
    assert mean([big, minus, one], [1.0] * 3).item() == pytest.approx(1 / 3)
    assert mean([big, one, minus], [1.0] * 3).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype, weights: list[float]):
    contributions = draw(5, 300, dtype)
    assert torch.equal(mean(contributions, weights), mean([one.float() for one in contributions], weights))


def test_one_contribution_of_weight_one_is_itself():
    (only,) = draw(1, 100)
    assert torch.equal(mean([only], [1.0]), only)


def test_equal_contributions_of_a_power_of_two_are_themselves():
    (only,) = draw(1, 100)
    assert torch.equal(mean([only] * 4, [1.0] * 4), only)


def test_not_finite_stays_not_finite():
    value = mean([torch.tensor([torch.nan, torch.inf]), torch.tensor([1.0, 1.0])], [1.0, 2.0])
    assert value.isnan().tolist() == [True, False]
    assert value.isinf().tolist() == [False, True]


def test_uniform_ignores_weights():
    contributions = draw(5, 1000)
    assert torch.equal(reduce(Uniform(), contributions, [3.0, 1.0, 0.1, 700.0, 2.0]), mean(contributions, [1.0] * 5))


# --- all of them ----------------------------------------------------------------------------------------------------


def test_are_in_the_table():
    names = {"mean": Mean, "uniform": Uniform, "median": Median, "trimmed_mean": TrimmedMean}
    assert table(Aggregator).items() >= names.items()
    for aggregator in ALL:
        assert TypeAdapter(Aggregator).validate_python(aggregator.model_dump()) == aggregator


@pytest.mark.parametrize("aggregator", ALL, ids=repr)
@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3, 5.0, 11.0, 0.3, 2.0]])
@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, 2 * BLOCK + 17])
def test_same_bits_for_any_cut(aggregator: Aggregator, weights: list[float], size: int):
    contributions = draw(5, size)
    whole = reduce(aggregator, contributions, weights)
    rng = torch.Generator().manual_seed(size)
    for _ in range(3):
        places = sorted({0, size, *torch.randint(0, size + 1, (4,), generator=rng).tolist()})
        parts = [
            reduce(aggregator, [one[low:high] for one in contributions], weights)
            for low, high in itertools.pairwise(places)
        ]
        assert torch.equal(torch.cat(parts).view(torch.int32), whole.view(torch.int32))


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan]


@given(data=st.data(), aggregator=st.sampled_from(ALL[2:]), count=st.integers(3, 12), size=st.integers(1, 80))
def test_same_bits_for_any_cut_of_any_values(data: st.DataObject, aggregator: Aggregator, count: int, size: int):
    """Zeros of both signs, ties, NaN: whatever a vector loop and its tail could treat differently."""
    choices = torch.tensor(SPECIAL)
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    contributions = [choices[torch.randint(len(SPECIAL), (size,), generator=rng)] for _ in range(count)]
    weights = data.draw(st.sampled_from([[1.0] * count, [float(node % 3 + 1) for node in range(count)]]))
    whole = reduce(aggregator, contributions, weights)
    cut = data.draw(st.integers(0, size))
    parts = [
        reduce(aggregator, [one[here] for one in contributions], weights) for here in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts).view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("aggregator", ALL, ids=repr)
@pytest.mark.parametrize("count", [4, _MAX_NETWORK + 1])
def test_contributions_are_not_written_to(aggregator: Aggregator, count: int):
    contributions = draw(count, 100)
    kept = [one.clone() for one in contributions]
    reduce(aggregator, contributions)
    reduce(aggregator, contributions, [float(node + 1) for node in range(count)])
    assert all(torch.equal(one, before) for one, before in zip(contributions, kept, strict=True))


@pytest.mark.parametrize("aggregator", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(aggregator: Aggregator, dtype: torch.dtype):
    contributions = draw(5, 300, dtype)
    assert torch.equal(reduce(aggregator, contributions), reduce(aggregator, [one.float() for one in contributions]))


@pytest.mark.parametrize("aggregator", ALL, ids=repr)
def test_double_precision_stays_double(aggregator: Aggregator):
    contributions = column(1.0, 1.0, 1.0, 1.0 + 2**-40, 1.0 + 2**-40, 1.0 + 2**-40)
    assert reduce(aggregator, contributions, dtype=torch.float64).item() == 1.0 + 2**-41


# --- median and trimmed mean ----------------------------------------------------------------------------------------

INTEGERS = [[1, -2, 3, 0], [2, -1, 4, 1], [0, -3, 2, -1], [1, -2, 4, 1], [10, 20, -30, 40]]
NORMAL = [
    [-0.086, -0.429, -2.873, 3.245, 0.147],
    [1.312, 0.351, -0.72, 0.817, -2.118],
    [0.294, 0.564, -0.979, -1.001, 0.572],
    [0.592, -1.142, -1.441, 2.093, 0.513],
    [0.029, -1.168, -0.889, -0.558, -0.559],
    [-0.573, 2.058, 0.578, -1.417, 0.466],
    [-1.952, -0.86, -0.383, 0.884, -1.249],
]
OUTLIERS = [
    [1.277, 2.272, 0.603, 1.243, 3.183, 2.483, 1.009, 1.824],
    [2.909, 1.216, 1.194, 0.794, 1.932, 1.314, 3.337, 1.813],
    [2.128, 3.107, 2.21, 4.104, 1.272, 0.627, 1.887, 0.667],
    [2.559, 1.315, 2.509, 2.495, 0.29, 3.252, 0.339, 2.578],
    [1.736, 3.34, 2.126, 2.07, 2.28, 0.723, 2.111, -0.168],
    [1.721, 0.01, 2.038, 1.213, 2.125, 2.334, 1.809, 3.689],
    [0.709, 2.535, 3.218, 3.664, 2.273, -0.266, 2.774, 1.945],
    [1.965, 3.201, 2.033, 1.61, 1.907, 2.765, 0.9, 1.017],
    [-13.351, 56.013, 21.509, -6.637, -26.463, 7.006, -6.795, -17.253],
    [8.278, 3.71, -8.275, -24.446, -10.337, -2.928, -10.714, -11.04],
]


@pytest.mark.parametrize(
    ("aggregator", "rows", "expected"),
    [
        (Median(), INTEGERS, [1, -2, 3, 1]),
        (TrimmedMean(trim=0), INTEGERS, [2.8, 2.4, -3.4, 8.2]),
        (TrimmedMean(trim=1), INTEGERS, [4 / 3, -5 / 3, 3, 2 / 3]),
        (TrimmedMean(trim=2), INTEGERS, [1, -2, 3, 1]),
        (Median(), NORMAL, [0.029, -0.429, -0.889, 0.817, 0.147]),
        (TrimmedMean(trim=1), NORMAL, [0.0512, -0.3032, -0.8824, 0.447, -0.1364]),
        (TrimmedMean(trim=2), NORMAL, [0.079, -0.938 / 3, -2.588 / 3, 0.381, 0.018]),
        (TrimmedMean(trim=3), NORMAL, [0.029, -0.429, -0.889, 0.817, 0.147]),
        (Median(), OUTLIERS, [1.8505, 2.821, 2.082, 1.4265, 1.9195, 1.824, 1.409, 1.415]),
        (TrimmedMean(trim=1), OUTLIERS, [1.8755, 2.587, 1.991375, 0.8065, 0.21775, 1.654, 0.50425, -0.1705]),
        (TrimmedMean(trim=3), OUTLIERS, [1.8875, 2.77875, 2.10175, 1.534, 1.809, 1.7135, 1.40125, 1.33025]),
        (TrimmedMean(trim=0.3), OUTLIERS, [1.8875, 2.77875, 2.10175, 1.534, 1.809, 1.7135, 1.40125, 1.33025]),
        (TrimmedMean(trim=4), OUTLIERS, [1.8505, 2.821, 2.082, 1.4265, 1.9195, 1.824, 1.409, 1.415]),
    ],
)
def test_as_byzfl(aggregator: Aggregator, rows: list[list[float]], expected: list[float]):
    """Numbers that byzfl 0.0.11 gives for these inputs, in float64."""
    actual = reduce(aggregator, [torch.tensor(row, dtype=torch.float64) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


finite = st.floats(-1e6, 1e6)


@given(
    values=st.lists(finite, min_size=1, max_size=9) | st.lists(finite, min_size=_MAX_NETWORK, max_size=_MAX_NETWORK + 4)
)
def test_median_is_that_of_the_standard_library(values: list[float]):
    expected = statistics.median(values)
    assert value(Median(), values) == expected
    assert value(Median(), values, [3.0] * len(values)) == expected


@given(values=st.lists(finite, min_size=3, max_size=12), trim=st.integers(0, 5))
def test_trimmed_mean_by_sorting(values: list[float], trim: int):
    trim = min(trim, (len(values) - 1) // 2)
    expected = statistics.fmean(sorted(values)[trim : len(values) - trim])
    assert value(TrimmedMean(trim=trim), values) == pytest.approx(expected, rel=1e-12, abs=1e-9)


@given(pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), min_size=1, max_size=8))
def test_weighted_median_is_the_median_with_repetitions(pairs: list[tuple[int, int]]):
    repeated = [float(number) for number, weight in pairs for _ in range(weight)]
    weights = [float(weight) for _, weight in pairs]
    assert value(Median(), [float(number) for number, _ in pairs], weights) == statistics.median(repeated)


@given(pairs=st.lists(st.tuples(finite, st.floats(1e-3, 1e3)), min_size=1, max_size=8))
def test_weighted_median_has_half_of_the_weight_on_either_side(pairs: list[tuple[float, float]]):
    values, weights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    middle = value(Median(), values, weights)
    half = sum(map(Fraction, weights)) / 2 * Fraction(1 + 1e-12)
    for side in (
        [weight for number, weight in pairs if number < middle],
        [weight for number, weight in pairs if number > middle],
    ):
        assert sum(map(Fraction, side)) <= half


def test_one_node_of_nearly_all_weight_is_the_weighted_median():
    assert value(Median(), [1.0, 7.0, 3.0], [1e-20, 1e20, 1e-20]) == 7.0


@given(values=st.lists(finite, min_size=2, max_size=8), seed=st.integers(0, 1000), shift=st.integers(-100, 100))
def test_order_and_shift(values: list[float], seed: int, shift: int):
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [values[index] for index in order]
    for aggregator in (Median(), TrimmedMean(trim=0.25)):
        one = value(aggregator, values)
        assert value(aggregator, shuffled) == one
        assert value(aggregator, [number + shift for number in values]) == pytest.approx(one + shift, abs=1e-8)


@given(data=st.data(), num_bad=st.integers(0, 3))
def test_bounded_by_the_honest_values(data: st.DataObject, num_bad: int):
    honest = data.draw(st.lists(finite, min_size=num_bad + 1, max_size=num_bad + 5))
    bad = data.draw(st.lists(st.floats(width=64), min_size=num_bad, max_size=num_bad))
    for aggregator in (Median(), TrimmedMean(trim=num_bad)):
        result = value(aggregator, [*bad, *honest])
        assert min(honest) - 1e-6 <= result <= max(honest) + 1e-6


def test_not_finite_only_where_too_many_are_not():
    nan, inf = math.nan, math.inf
    assert value(Median(), [nan, 1.0, 2.0]) == 2.0  # NaN counts as +∞
    assert value(Median(), [nan, -inf, 2.0, nan, 3.0], [1.0, 1.0, 1.0, 1.0, 2.0]) == 3.0
    assert value(Median(), [nan, nan, 2.0]) == inf
    assert math.isnan(value(Median(), [inf, -inf]))
    assert value(TrimmedMean(trim=1), [nan, -inf, 2.0, 3.0]) == 2.5
    assert value(TrimmedMean(trim=1), [nan, nan, 2.0, 3.0]) == inf


def test_zero_has_no_sign():
    for aggregator in (Median(), TrimmedMean(trim=1)):
        assert math.copysign(1.0, value(aggregator, [-0.0, -0.0, -0.0])) == 1.0


def test_trim_of_too_few():
    with pytest.raises(
        SettingsError, match="trimmed_mean with trim 2 needs 5 contributions, got 4; lower trim"
    ) as caught:
        reduce(TrimmedMean(trim=2), draw(4, 3))
    assert "\n" not in str(caught.value)
    assert [TrimmedMean(trim=2).num_trimmed(count) for count in (5, 6, 100)] == [2, 2, 2]
    with pytest.raises(SettingsError):
        TrimmedMean(trim=2).num_trimmed(4)


def test_trim_as_a_fraction():
    assert [TrimmedMean(trim=0.2).num_trimmed(count) for count in (1, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]
    assert TrimmedMean(trim=0.29).num_trimmed(100) == 29  # 28.999999999999996 as a product
    assert all(2 * TrimmedMean(trim=0.5 - 1e-12).num_trimmed(count) < count for count in range(1, 200))
    part = TypeAdapter(Aggregator).validate_python({"name": "trimmed_mean", "trim": 0.2})
    assert part == TrimmedMean(trim=0.2)
    for wrong in (-1, 0.5, 1.5, -0.1):
        with pytest.raises(ValidationError):
            TrimmedMean(trim=wrong)


@pytest.mark.parametrize("num_rows", range(1, 11))
def test_network_sorts_zeros_and_ones(num_rows: int):
    """What sorts all sequences of zeros and ones sorts everything."""
    rows = torch.tensor(list(itertools.product([0, 1], repeat=num_rows))).T
    middle = range((num_rows - 1) // 2, num_rows // 2 + 1)
    for wanted in (range(num_rows), middle):
        state = rows.clone()
        for first, second, needs_first, needs_second in network(num_rows, wanted):
            low, high = torch.minimum(state[first], state[second]), torch.maximum(state[first], state[second])
            state[first] = low if needs_first else -1
            state[second] = high if needs_second else -1
        assert all(torch.equal(state[place], rows.sort(dim=0).values[place]) for place in wanted)


def test_network_and_sort_give_the_same_bits():
    for count in (_MAX_NETWORK, _MAX_NETWORK + 1):
        rows = torch.stack(draw(count, 500))
        expected = rows.sort(dim=0).values
        middle = expected[count // 2] if count % 2 else (expected[count // 2 - 1] + expected[count // 2]) / 2
        assert torch.equal(reduce(Median(), list(rows)), middle)
