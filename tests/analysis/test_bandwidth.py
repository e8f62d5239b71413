"""``starling bandwidth``: dry runs against real ones, and the links that a run needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from starling.algorithms.api import Algorithm, AllReduce, Node, Train
from starling.orchestrator.analysis.bandwidth import MOST_ROUNDS, TARGETS, Workload
from starling.orchestrator.analysis.dry_run import dry_run
from starling.orchestrator.cli.main import app
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.cases import CASES
from tests.conformance import Case
from tests.paths import ROOT
from tests.toys import simulate

# --- dry runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_dry_run_has_the_bytes_and_the_time_of_a_real_one(case: Case):
    rounds = 3 if case.algorithm.synchronous else 8
    network = {"bandwidth_mbps": 50, "latency_ms": 2, "speeds": {0: 0.7}}
    real = case.run(rounds=rounds, network=network)
    keys = {"tracking": "none", "evaluation": {"every_rounds": 0}, "network": network, "rounds": rounds}
    dry = dry_run(parse(case.config | keys), rounds)
    assert real.summary is not None
    assert dry.bytes == real.summary.bytes
    assert dry.virtual_seconds == pytest.approx(real.virtual_seconds, rel=1e-9)


class Mean(Algorithm):
    """Of a user: train, then average."""

    replicated = False

    async def round(self, node: Node) -> None:
        await Train(steps=5)
        node.parameters.copy_((await AllReduce(node.parameters)).value)


def test_an_algorithm_of_a_users_own_has_an_answer():
    work = Workload(parse(RUN | {"algorithm": f"{__name__}:Mean"}))
    assert work.bytes_per_round >= 3 * work.layout.nbytes
    assert all(cell is not None and cell > 0 for cell in work.table())


def test_a_dry_run_trains_nothing_and_disturbs_nothing():
    raw = RUN | {
        "algorithm": {"name": "diloco", "inner_steps": 3},
        "optimizer": {"name": "adamw", "lr": 1e30, "schedule": {"name": "cosine", "warmup_steps": 500}},
        "faults": {"events": [{"kind": "kill", "node": 1, "round": 0}]},
        "cluster": {"nodes": {"target": 4}, "round_deadline_s": 0.001},
        "network": {"step_ms": 20, "bandwidth_mbps": 0.1},
        "rounds": 300,
    }
    summary = dry_run(parse(raw), 2)
    assert (summary.rounds, summary.nodes["lost"], summary.nodes["started"]) == (2, 0, 4)


# --- what links must carry ------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "algorithm": {"name": "streaming_diloco", "inner_steps": 12, "fragments": 3, "overlap_steps": 2, "pattern": "size"},
    "task": {"name": "digits", "model": {"name": "mlp", "width": 1000}},
    "cluster": {"nodes": {"target": 4}},
    "data": {"batch_size": 1},
    "network": {"step_ms": 20, "latency_ms": 0.5, "speeds": {2: 0.8}},
    "tracking": "none",
    "evaluation": {"every_rounds": 0, "max_batches": 1},
    "rounds": 6,
}
WHOLE = RUN["algorithm"] | {"codec": "identity", "result_codec": "identity"}
METHODS: dict[str, Any] = {
    "data_parallel": {"name": "ddp"},
    "diloco": {"name": "diloco", "inner_steps": 12},
    "streaming": WHOLE | {"overlap_steps": 0},
    "streaming_overlap": WHOLE,
    "streaming_overlap_fp4": RUN["algorithm"],
}


def simulated(raw: dict[str, Any], gbit_s: float) -> float:
    """What a run that trains says: the slowest node's steps, of the time that it all took."""
    network = raw["network"] | {"bandwidth_mbps": gbit_s * 1000}
    ran = simulate(raw, network=network, nodes=4)
    steps = raw["rounds"] * ran.config.algorithm.steps_per_round(1, 1)
    return steps * network["step_ms"] / 1000 / min(network.get("speeds", {0: 1.0}).values()) / ran.virtual_seconds


@pytest.mark.parametrize("method", METHODS)
def test_the_simulator_agrees(method: str):
    """Large and small exchanges, unequal nodes, latency."""
    for width, target in ((1000, 0.5), (1000, 0.9), (100, 0.8)):
        task = {"name": "digits", "model": {"name": "mlp", "width": width}}
        raw = RUN | {"task": task, "algorithm": METHODS[method]}
        needed = Workload(parse(raw)).needed(target)
        assert needed is not None
        assert simulated(raw, needed) == pytest.approx(target, rel=1e-3)


def test_overlap_hides_an_exchange_that_costs_a_third_of_the_time():
    """At the link at which 30 % of the time is waiting, less than 5 % is when a fragment may take three steps."""
    raw = RUN | {"network": {"step_ms": 20, "latency_ms": 0.5}}
    alone = raw | {"algorithm": WHOLE | {"overlap_steps": 0}}
    link = Workload(parse(alone)).needed(0.7)
    assert link is not None
    assert simulated(alone, link) == pytest.approx(0.7, rel=1e-3)
    assert simulated(raw | {"algorithm": WHOLE | {"overlap_steps": 3}}, link) > 0.95


@pytest.mark.parametrize("method", ["data_parallel", "diloco", "streaming_overlap_fp4"])
def test_buffers_are_counted(method: str):
    raw = RUN | {"task": {"name": "digits", "model": {"name": "cnn"}}, "network": {"step_ms": 20, "latency_ms": 1}}
    raw |= {"algorithm": METHODS[method], "rounds": 3}
    assert simulated(raw, 0.05) == pytest.approx(Workload(parse(raw)).utilization(0.05), rel=1e-6)


def test_latency_may_be_too_much():
    slow = RUN | {"network": {"step_ms": 1, "latency_ms": 2}}
    assert Workload(parse(slow | {"algorithm": METHODS["data_parallel"]})).needed(0.5) is None
    assert Workload(parse(slow | {"algorithm": METHODS["streaming_overlap"]})).needed(0.5) is not None
    alone = Workload(parse(RUN | {"cluster": {"nodes": {"target": 1}}, "network": {"step_ms": 1}}))
    assert alone.table() == [0.0] * 5


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="step_ms is 0: there is nothing to utilize"):
        Workload(parse(RUN | {"network": {"step_ms": 0}}))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**5}))
    with pytest.raises(ConfigError, match=r"a dry round of 4 nodes of this model needs .* of memory, .* 100 kB left"):
        Workload(parse(RUN))


# --- the command ----------------------------------------------------------------------------------------------------


def answer(*arguments: str) -> tuple[int, Any, str]:
    result = CliRunner().invoke(app, ["bandwidth", *arguments])
    lines = result.stdout.strip().splitlines()
    return result.exit_code, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, result.output


def test_json_of_a_run():
    path = str(ROOT / "examples/dsgd.yaml")
    code, found, _ = answer(path, "--json", "--set", "network.bandwidth_mbps=100", "--rounds", "3")
    assert code == 0
    assert (found["rounds"], found["algorithm"], found["targets"]) == (3, "dsgd", list(TARGETS))
    assert found["bytes_per_round"] == 615040
    assert found["gbit_s"] == sorted(found["gbit_s"])
    assert 0 < found["utilization"] < 1


def test_the_page():
    code, _, text = answer(str(ROOT / "examples/dsgd.yaml"), "--set", "network.bandwidth_mbps=100")
    assert code == 0
    assert f"{MOST_ROUNDS} rounds in the simulator, without training" in text
    assert "615 kB a round over all nodes" in text
    assert "At 100 Mbit/s: " in text
