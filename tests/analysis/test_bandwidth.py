"""``starling bandwidth``: the published table, and the user's run against the simulator."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from starling.orchestrator.analysis import bandwidth
from starling.orchestrator.analysis.bandwidth import (
    GRID,
    METHODS,
    PRESETS,
    TARGETS,
    Workload,
    places_in_grid,
    preset_table,
    printed,
)
from starling.orchestrator.cli.main import app
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.paths import ROOT
from tests.toys import simulate

PUBLISHED = {
    "1b": {
        "data_parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
        "diloco": (1.4, 6.2, 13.3, 23.3, 86.8),
        "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
        "streaming_overlap": (1.4, 4.3, 6.2, 9.1, 11.0),
        "streaming_overlap_fp4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    "10b": {
        "data_parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
        "diloco": (1.7, 7.5, 16.0, 33.9, 104.8),
        "streaming": (1.7, 5.2, 9.1, 13.3, 19.3),
        "streaming_overlap": (1.7, 3.6, 5.2, 6.2, 7.5),
        "streaming_overlap_fp4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
    "100b": {
        "data_parallel": (184.2, 323.8, 390.7, 390.7, 471.5),
        "diloco": (3.0, 11.0, 23.3, 49.4, 184.2),
        "streaming": (2.4, 6.2, 9.1, 11.0, 19.3),
        "streaming_overlap": (1.7, 3.6, 4.3, 5.2, 5.2),
        "streaming_overlap_fp4": (0.5, 0.9, 1.1, 1.1, 1.4),
    },
}
"""arXiv:2501.18512, table 4."""

LABELS = [printed(float(value)) for value in GRID]


# --- the published table --------------------------------------------------------------------------------------------


def test_the_published_table():
    distances = [
        min(abs(place - other) for other, label in enumerate(LABELS) if label == cell)
        for model, rows in PUBLISHED.items()
        for method, cells in rows.items()
        for place, cell in zip(places_in_grid(PRESETS[model], method), cells, strict=True)
    ]
    assert len(distances) == 75
    assert max(distances) <= 1
    assert distances.count(0) == 69


def test_every_published_number_is_of_the_grid():
    assert {cell for rows in PUBLISHED.values() for cells in rows.values() for cell in cells} <= set(LABELS)
    # Twice rounded, and not once: 0.954 is 0.95 and that is 0.9.
    assert printed(0.9541) == 0.9


@pytest.mark.parametrize("model", PRESETS)
def test_order_of_methods(model: str):
    table = preset_table(model)
    assert list(table) == list(METHODS)
    for better, worse in zip(METHODS[1:], METHODS, strict=False):
        assert all(one <= other for one, other in zip(table[better], table[worse], strict=True))
    for row in table.values():
        assert list(row) == sorted(row)


@pytest.mark.parametrize("method", METHODS)
def test_utilization_grows_with_the_bandwidth(method: str):
    shares = bandwidth.utilization_of(PRESETS["1b"], method, GRID)
    assert (np.diff(shares) >= -1e-12).all()
    assert 0 < shares[0] < shares[-1] <= 1 + 1e-12


def test_sequential_fragments_need_more():
    """Figure 7's effect: their layers are next to one another, so that what is waited for comes at once."""
    preset = PRESETS["100b"]
    strided, sequential = (places_in_grid(preset, "streaming", strided=one) for one in (True, False))
    assert all(one <= other for one, other in zip(strided, sequential, strict=True))
    assert (LABELS[strided[-1]], LABELS[sequential[-1]]) == (19.3, 33.9)


def test_data_parallel_at_infinite_speed_is_compute():
    shares = bandwidth.utilization_of(PRESETS["1b"], "data_parallel", np.array([1e9]))
    assert shares[0] == pytest.approx(1.0, abs=1e-6)
    # At a crawl the link is all there is: 16 bits a parameter in each step.
    share = bandwidth.utilization_of(PRESETS["1b"], "data_parallel", np.array([1.0]))[0]
    assert share == pytest.approx(0.1 / (16e9 * 1.02 / 1e9), rel=0.01)


# --- the user's run -------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "algorithm": {"name": "streaming_diloco", "inner_steps": 12, "fragments": 3, "overlap_steps": 2, "pattern": "size"},
    "task": {"name": "digits", "model": {"name": "mlp", "width": 1000}},
    "cluster": {"nodes": {"target": 4}},
    "data": {"batch_size": 1},
    "network": {"step_ms": 20, "latency_ms": 0.5, "speeds": {2: 0.8}},
    "tracking": "none",
    "evaluation": {"every_rounds": 0, "max_batches": 1},
}


def simulated(raw: dict[str, Any], algorithm: Any, gbit_s: float, rounds: int) -> float:
    """What the simulator says: the slowest node's steps, of the time that it all took."""
    network = raw["network"] | {"bandwidth_mbps": gbit_s * 1000}
    ran = simulate(raw, algorithm=algorithm.model_dump(), network=network, rounds=rounds, nodes=4)
    steps = rounds * algorithm.steps_per_round(1, 1)
    return steps * network["step_ms"] / 1000 / min(network.get("speeds", {0: 1.0}).values()) / ran.virtual_seconds


@pytest.mark.parametrize("method", METHODS)
def test_the_simulator_agrees(method: str):
    """Within 2 %; large and small exchanges, unequal nodes, latency."""
    for width, target in ((1000, 0.5), (1000, 0.9), (100, 0.8)):
        raw = RUN | {"task": {"name": "digits", "model": {"name": "mlp", "width": width}}}
        work = Workload.of(parse(raw))
        needed = work.needed(method, target)
        assert needed is not None
        assert work.utilization(method, needed) == pytest.approx(target, rel=1e-3)
        assert simulated(raw, work.methods[method], needed, rounds=6) == pytest.approx(target, rel=0.02)


def test_overlap_hides_an_exchange_that_costs_a_third_of_the_time():
    """At the link at which 30 % of the time is waiting, less than 5 % is when a fragment may take three steps."""
    algorithm = RUN["algorithm"] | {"overlap_steps": 3}
    raw = RUN | {"algorithm": algorithm, "network": {"step_ms": 20, "latency_ms": 0.5}}
    work = Workload.of(parse(raw))
    link = work.needed("streaming", 0.7)
    assert link is not None
    assert simulated(raw, work.methods["streaming"], link, rounds=6) == pytest.approx(0.7, rel=0.02)
    assert simulated(raw, work.methods["streaming_overlap"], link, rounds=6) > 0.95


def test_buffers_are_counted():
    raw = RUN | {"task": {"name": "digits", "model": {"name": "cnn"}}, "network": {"step_ms": 20, "latency_ms": 1}}
    work = Workload.of(parse(raw))
    for method in ("data_parallel", "diloco", "streaming_overlap_fp4"):
        share = work.utilization(method, 0.05)
        assert simulated(raw, work.methods[method], 0.05, rounds=3) == pytest.approx(share, rel=1e-6)


def test_latency_may_be_too_much():
    work = Workload.of(parse(RUN | {"network": {"step_ms": 1, "latency_ms": 2}}))
    assert work.needed("data_parallel", 0.5) is None
    assert work.needed("streaming_overlap", 0.5) is not None
    alone = Workload.of(parse(RUN | {"cluster": {"nodes": {"target": 1}}, "network": {"step_ms": 1}}))
    assert alone.table() == dict.fromkeys(METHODS, [0.0] * 5)


def test_what_it_takes_from_the_algorithm():
    work = Workload.of(parse(RUN))
    assert (work.inner_steps, work.fragments, work.overlap_steps) == (12, 3, 2)
    work = Workload.of(parse(RUN | {"algorithm": {"name": "diloco", "inner_steps": 25}}))
    assert (work.inner_steps, work.fragments, work.overlap_steps) == (25, 5, 1)
    work = Workload.of(parse(RUN | {"algorithm": "fedavg"}))
    assert (work.inner_steps, work.fragments) == (100, 4)
    assert Workload.of(parse(RUN | {"algorithm": {"name": "diloco", "inner_steps": 1}})).overlap_steps == 0
    with pytest.raises(ConfigError, match="step_ms is 0: there is nothing to utilize"):
        Workload.of(parse(RUN | {"network": {"step_ms": 0}}))


# --- the command ----------------------------------------------------------------------------------------------------


def answer(*arguments: str) -> tuple[int, Any, str]:
    result = CliRunner().invoke(app, ["bandwidth", *arguments])
    lines = result.stdout.strip().splitlines()
    return result.exit_code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, result.output


@pytest.mark.parametrize("model", PRESETS)
def test_json_of_a_model(model: str):
    code, found, _ = answer("--model", model, "--json")
    assert code == 0
    assert found["table"] == preset_table(model)
    assert found["targets"] == list(TARGETS)


def test_json_of_a_run():
    path = str(ROOT / "examples/diloco.yaml")
    code, found, _ = answer(path, "--json", "--set", "network.bandwidth_mbps=100")
    assert code == 0
    assert list(found["table"]) == list(METHODS)
    assert all(len(row) == 5 and row == sorted(row) for row in found["table"].values())
    assert set(found["utilization"]) == set(METHODS)


def test_the_page():
    code, _, text = answer()
    assert code == 0
    assert "1b: 24 layers, 0.1 s a step" in text
    assert "86.8" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "7b"), "--model 7b: there is no such model in the table (there are: 1b, 10b, 100b)"),
        (("x.yaml", "--model", "1b"), "takes a CONFIG, or --model instead"),
        (("--set", "rounds=3"), "--set needs a CONFIG"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], message: str):
    code, _, text = answer(*arguments)
    assert code == 2
    assert message in " ".join(text.split())
