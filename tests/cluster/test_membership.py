"""Losses on Ray: processes that are really killed or stopped, at each phase of an exchange."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from orchestrator.config import Config

    Make = Callable[..., Config]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

FEDAVG: dict[str, Any] = {"name": "fedavg", "steps": 1}
APART = "cluster.nodes_per_actor=1"
LARGE = ["task.model.name=mlp", "task.model.width=20000", APART]
"""6 MB, in parts."""


def events(run_dir: Path, what: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == what]


def faults(*which: dict[str, Any]) -> str:
    return f"faults.events={json.dumps(which)}"


@pytest.mark.parametrize(
    "phase", ["secure", *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("train", "post", "deliver"))]
)
def test_a_killed_node_is_replaced_and_all_end_alike(phase: str, config: Make, tmp_path: Path):
    # With all four needed the run waits for the new one, and its last rounds show that it has the others' state.
    kill = {"kind": "kill", "node": 2, "round": 1, "phase": phase}
    settings = config(FEDAVG, "rounds=5", "cluster.nodes.min=4", *LARGE, faults(kill))
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.rounds == 5
    assert summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    # Digests are compared at every commit: had the newcomer other bits, the run would have ended there.
    assert events(tmp_path / "run", "commit")[-1]["committed"] == [0, 1, 2, 3]
    assert [one["node"] for one in events(tmp_path / "run", "transfer")] == [2]


def test_survivors_go_on_at_once(config: Make, tmp_path: Path):
    kill = {"kind": "kill", "node": 1, "round": 1, "phase": "train"}
    settings = config(FEDAVG, "rounds=3", *LARGE, faults(kill))
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.nodes["lost"] == 1
    assert events(tmp_path / "run", "abort") == []
    assert events(tmp_path / "run", "commit")[1]["committed"] == [0, 2, 3]


def test_a_stopped_process_is_ended_and_replaced(config: Make, tmp_path: Path):
    hang = {"kind": "hang", "node": 3, "round": 1, "phase": "train"}
    settings = config(
        FEDAVG,
        "rounds=3",
        "cluster.nodes.min=3",
        "cluster.round_deadline_s=2",
        "cluster.cancel_grace_s=1",
        APART,
        faults(hang),
    )
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.rounds == 3
    assert summary.nodes["lost"] == 1
    assert [one["node"] for one in events(tmp_path / "run", "late")] == [3]
    assert "within 1 s (cluster.cancel_grace_s)" in events(tmp_path / "run", "lost")[0]["reason"]
