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


# Two processes of two nodes each, unless said otherwise.
APART = "cluster.nodes_per_actor=1"
SYNCHRONOUS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "neighbours": ({"name": f"{HERE}:Gossiping", "values": 5}, ["cluster.nodes.target=5"]),
    "large neighbours": ({"name": f"{HERE}:Gossiping", "values": LARGE}, [APART]),
    "large neighbours in shared processes": (
        {"name": f"{HERE}:Gossiping", "values": LARGE, "topology": "one_peer_exponential"},
        ["cluster.nodes.target=5"],
    ),
    "overlap": ({"name": f"{HERE}:Overlapping"}, []),
    "large overlap": ({"name": f"{HERE}:Overlapping", "values": 400_000}, [APART]),
    "large overlap in shared processes": ({"name": f"{HERE}:Overlapping", "values": 400_000}, []),
    "messages": ({"name": f"{HERE}:Mailing"}, []),
    "large messages": ({"name": f"{HERE}:Mailing", "values": LARGE}, []),
    "compute": ({"name": f"{HERE}:Computing"}, []),
    "pings": ({"name": f"{HERE}:Pinging"}, []),
    "participants": ({"name": f"{HERE}:Changing"}, []),
}


@pytest.mark.parametrize("which", SYNCHRONOUS)
def test_both_runtimes_end_with_the_same_bits_and_bytes(which: str, config: Make, tmp_path: Path):
    algorithm, overrides = SYNCHRONOUS[which]
    settings = config(algorithm, "rounds=2", *overrides)
    real = run(settings, run_dir=tmp_path / "real")
    simulated = simulate(settings, run_dir=tmp_path / "simulated")
    assert real.digest == simulated.digest
    assert real.bytes["payload"] == simulated.bytes["payload"]


@pytest.mark.parametrize(
    "which",
    ["large overlap", *(pytest.param(one, marks=pytest.mark.slow) for one in ("large messages", "neighbours"))],
)
def test_a_throttled_cluster_does_the_same(which: str, config: Make, tmp_path: Path):
    algorithm, overrides = SYNCHRONOUS[which]
    slow = ["network.bandwidth_mbps=100", "network.latency_ms=5"]
    settings = config(algorithm, "rounds=2", *overrides, *slow)
    real = run(settings, run_dir=tmp_path / "real")
    free = simulate(config(algorithm, "rounds=2", *overrides), run_dir=tmp_path / "free")
    assert (real.digest, real.bytes["payload"]) == (free.digest, free.bytes["payload"])


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
        ({"name": f"{HERE}:Counting", "large": LARGE}, []),
        ({"name": f"{HERE}:Passing"}, []),
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
