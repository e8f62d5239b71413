"""Every operation on Ray: the same programs as in the simulator, with the same bits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from starling import run, simulate
from starling.orchestrator.api import replay
from tests import operations

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starling.orchestrator.config.schema import Config

    Make = Callable[..., Config]

pytestmark = pytest.mark.cluster

HERE = operations.__name__
LARGE = 40_000


def events(run_dir: Path, what: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == what]


IN_CI = [pytest.mark.slow, pytest.mark.smoke]


def rounds(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Two processes of two nodes each, unless said otherwise.
APART = "cluster.nodes_per_actor=1"
SMALL = [
    {"name": f"{HERE}:Gossiping", "values": 5},
    {"name": f"{HERE}:Overlapping"},
    {"name": f"{HERE}:Mailing"},
    {"name": f"{HERE}:Computing"},
    {"name": f"{HERE}:Pinging"},
    {"name": f"{HERE}:Training"},
]
GOSSIP: dict[str, Any] = {"name": f"{HERE}:Gossiping", "values": LARGE}
OVERLAP = {"name": f"{HERE}:Overlapping", "values": 400_000}
MAIL = {"name": f"{HERE}:Mailing", "values": LARGE}
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "small": ({"name": f"{HERE}:InTurn", "parts": SMALL}, ["cluster.nodes.target=5", "rounds=12"]),
    "large": ({"name": f"{HERE}:InTurn", "parts": [GOSSIP, OVERLAP, MAIL]}, [APART, "rounds=6"]),
    "large, in shared processes": (
        {"name": f"{HERE}:InTurn", "parts": [GOSSIP | {"topology": "one_peer_exponential"}, OVERLAP, MAIL]},
        ["cluster.nodes.target=5", "rounds=6"],
    ),
    "participants": ({"name": f"{HERE}:Changing"}, ["rounds=2"]),
}
SOME = [pytest.param(one, marks=[] if one in ("small", "large") else IN_CI) for one in RUNS]


@pytest.mark.parametrize("which", SOME)
def test_both_runtimes_end_with_the_same_bits_and_bytes(which: str, config: Make, tmp_path: Path):
    algorithm, overrides = RUNS[which]
    settings = config(algorithm, *overrides)
    real = run(settings, run_dir=tmp_path / "real")
    simulated = simulate(settings, run_dir=tmp_path / "simulated")
    assert real.digest == simulated.digest
    assert real.bytes["payload"] == simulated.bytes["payload"]
    mine, its = (
        [(one["round"], one["payload_bytes"], one["reported"]) for one in rounds(tmp_path / where)]
        for where in ("real", "simulated")
    )
    assert mine == its


@pytest.mark.slow
@pytest.mark.smoke
def test_a_throttled_cluster_does_the_same(config: Make, tmp_path: Path):
    algorithm, overrides = RUNS["large, in shared processes"]
    slow = ["network.bandwidth_mbps=100", "network.latency_ms=5"]
    real = run(config(algorithm, *overrides, *slow), run_dir=tmp_path / "run")
    free = simulate(config(algorithm, *overrides), run_dir=tmp_path / "free")
    assert (real.digest, real.bytes["payload"]) == (free.digest, free.bytes["payload"])


@pytest.mark.slow
@pytest.mark.smoke
def test_contributions_are_compared_and_a_maker_that_dies_meanwhile_is_replaced(config: Make, tmp_path: Path):
    """Six megabytes in as many parts as there are nodes; the simulator comes to the bits of both."""
    algorithm = {"name": "fedavg", "steps": 1, "aggregator": "geometric_median"}
    kill = json.dumps([{"kind": "kill", "node": 2, "round": 2, "phase": "measure"}])
    wide = ["task.model.name=mlp", "task.model.width=20000", "rounds=5", "cluster.nodes.min=4", APART]
    settings = config(algorithm, *wide, f"faults.events={kill}")
    real = run(settings, run_dir=tmp_path / "real")
    assert real.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    assert replay(tmp_path / "real", run_dir=tmp_path / "again").digest == real.digest
    simulated = simulate(config(algorithm, *wide), run_dir=tmp_path / "simulated")
    sent = [[one["payload_bytes"] for one in rounds(tmp_path / where)][:2] for where in ("real", "simulated")]
    assert sent[0] == sent[1]
    assert simulated.rounds == real.rounds


@pytest.mark.slow
@pytest.mark.smoke
def test_the_first_suffice_and_the_late_one_comes_back(config: Make, tmp_path: Path):
    settings = config({"name": f"{HERE}:Hasty", "first": 3, "seconds": 20.0}, "rounds=3", APART)
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.nodes["lost"] == 0
    assert [one["node"] for one in events(tmp_path / "run", "late")] == [3, 3, 3]
    assert [one["node"] for one in events(tmp_path / "run", "transfer")] == [3, 3]
    assert summary.digest == replay(tmp_path / "run", run_dir=tmp_path / "replay").digest


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ({"name": f"{HERE}:Counting"}, [APART]),
        pytest.param({"name": f"{HERE}:Counting", "large": LARGE}, [], marks=IN_CI),
        pytest.param({"name": f"{HERE}:Passing"}, [], marks=IN_CI),
        pytest.param(
            {"name": "fedbuff", "buffer_size": 2, "steps": 3},
            ["optimizer.schedule={name: cosine, warmup_steps: 4}"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["server", "large, in shared processes", "token", "schedule"],
)
def test_an_asynchronous_run_is_replayed_to_its_digest(
    algorithm: dict[str, Any], overrides: list[str], config: Make, tmp_path: Path
):
    summary = run(config(algorithm, "rounds=6", *overrides), run_dir=tmp_path / "run")
    assert summary.rounds == 6
    repeated = replay(tmp_path / "run", run_dir=tmp_path / "replay")
    assert repeated.digest == summary.digest
