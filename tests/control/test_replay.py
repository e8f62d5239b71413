"""Replays of logs, in one process; those of a cluster's are in tests/cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from starling import simulate
from starling.orchestrator.api import replay
from starling.orchestrator.errors import ConfigError, DivergedError, RunError
from starling.orchestrator.runtimes.simulator import runtime as simulator
from tests import operations
from tests.cases import CASES
from tests.conformance import Case

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.config.schema import Config

HERE = operations.__name__


def config(program: str, rounds: int = 4, **keys: Any) -> dict[str, Any]:
    return {
        "algorithm": f"{HERE}:{program}",
        "task": "quadratic",
        "rounds": rounds,
        "cluster": {"nodes": {"target": 3}},
        "tracking": "none",
    } | keys


def edit(run_dir: Path, change: Any) -> None:
    path = run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in change(events)))


@pytest.mark.parametrize("program", ["Counting", "Passing", "Mailing", "Hasty"])
def test_a_log_leads_to_the_same_digest_whatever_the_speeds(program: str, tmp_path: Path):
    network = {"speeds": {0: 0.2, 1: 3.0}, "latency_ms": 7}
    once = simulate(config(program, network=network), run_dir=tmp_path / "run")
    # Without the log other speeds would lead elsewhere: they decide who comes first.
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace(": 0.2\n", ": 5.0\n").replace(": 3.0\n", ": 0.7\n"))
    if program == "Counting":
        other = simulate(tmp_path / "run/config.yaml", run_dir=tmp_path / "other")
        assert other.digest != once.digest
        edit(tmp_path / "run", lambda events: [*events, *_seen(events, network["speeds"])])
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == once.digest


def _seen(events: list[dict[str, Any]], speeds: dict[int, float]) -> list[dict[str, Any]]:
    """What a cluster would have logged: for each round of a worker the seconds of its ``Train``, and its clock."""
    return [
        {"event": "seen", "node": node, "values": [(1 + node) * 0.01 / speeds.get(node, 1.0), 0.0] * len(events)}
        for node in range(3)
    ]


def test_a_replay_that_ends_otherwise_says_so(tmp_path: Path):
    simulate(config("Computing"), run_dir=tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("problem_seed: 0\n", "problem_seed: 5\n"))
    with pytest.raises(DivergedError, match=r"the replay ends with digest [0-9a-f]{64}, and .*run with [0-9a-f]{64}"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")


def test_a_log_that_does_not_fit_is_named(tmp_path: Path):
    simulate(config("Counting"), run_dir=tmp_path / "run")

    def foreign(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for event in events:
            if event["event"] == "received" and event["node"] == -1:
                event["outcome"] = [1, 77, 0]
        return events

    edit(tmp_path / "run", foreign)
    with pytest.raises(RunError, match="its log does not fit its configuration and this version of the code"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")


LOSSES = [
    {"kind": "late_join", "node": 4, "round": 2},
    {"kind": "kill", "node": 1, "round": 1, "phase": "post"},
    {"kind": "preempt", "node": 2, "round": 3},
    {"kind": "hang", "node": 3, "round": 4},
    {"kind": "kill", "node": 0, "round": 5, "phase": "secure"},
    {"kind": "kill", "node": 1, "round": 6, "phase": "commit"},
    {"kind": "preempt", "node": 0, "round": 7, "phase": "post"},
]


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm.synchronous], ids=lambda case: case.name)
def test_a_synchronous_run_that_lost_nodes_is_repeated_to_the_same_digest(case: Case, tmp_path: Path):
    cluster = {"nodes": {"target": 5}, "round_deadline_s": 2, "cancel_grace_s": 0.1, "drain_s": 5}
    # Else the inner optimizer would remember steps of attempts that were given up, which a replay does not repeat.
    rollback = {"optimizer": case.config.get("optimizer", {}) | {"rollback": True}}
    keys = {
        "faults": {"events": LOSSES},
        "cluster": cluster,
        "rounds": 12,
        "tracking": "none",
        "network": {"start_s": 0.02},
    }
    once = simulate(case.config | rollback | keys, run_dir=tmp_path / "run")
    assert once.nodes == {"started": 4, "joined": 7, "lost": 4, "drained": 2}
    # Without the log nodes that take longer to start would come back rounds later.
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace("start_s: 0.02\n", "start_s: 0.3\n"))
    again = replay(tmp_path / "run", run_dir=tmp_path / "again")
    assert again.digest == once.digest
    if case.name == "fedavg":
        assert simulate(tmp_path / "run/config.yaml", run_dir=tmp_path / "other").digest != once.digest


def test_who_draws_what_of_others_is_repeated(tmp_path: Path):
    """Plans made for attempts that were given up hold too; parts of nodes that never came are drawn by others."""
    events = [
        {"kind": "late_join", "node": 4, "round": 9},
        *({"kind": "kill", "node": 1, "round": number} for number in range(1, 30)),
        *({"kind": "kill", "node": node, "round": 12, "phase": "post"} for node in (2, 3)),
        {"kind": "preempt", "node": 0, "round": 15},
    ]
    keys = {
        "algorithm": {"name": "fedavg", "steps": 4},
        "task": {"name": "digits"},
        "data": {"batch_size": 40},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "faults": {"events": events},
        "cluster": {"nodes": {"target": 5}, "drain_s": 50, "quorum_fraction": 0.7},
        "network": {"start_s": 0.02, "latency_ms": 300},
    }
    once = simulate(config("Counting", rounds=30, **keys), run_dir=tmp_path / "run")
    plans, aborted = logged(tmp_path / "run", "plan"), logged(tmp_path / "run", "abort")
    assert {one["node"] for one in plans} == {0, 1, 2, 3, 4}
    assert any(one["extras"] for one in plans)
    assert {one["round"] for one in aborted} == {12}
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == once.digest
    edit(tmp_path / "run", lambda events: [event for event in events if event["event"] != "plan"])
    with pytest.raises(RunError, match="samples would be committed twice, or not at all"):
        replay(tmp_path / "run", run_dir=tmp_path / "other")


def test_an_asynchronous_run_with_room_for_fewer_nodes_than_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody comes or goes, and yet nodes are handed what nobody else draws: when, the log says."""

    class Crowded(simulator.Simulator):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.num_parts = 5

    keys = {"task": "digits", "data": {"batch_size": 80}, "network": {"speeds": {0: 0.3}, "latency_ms": 7}}
    once_config = config("Counting", rounds=20, algorithm={"name": "fedbuff", "steps": 3}, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(simulator, "Simulator", Crowded)
        once = simulate(once_config, run_dir=tmp_path / "run")
    plans = logged(tmp_path / "run", "plan")
    assert {part for one in plans for part, *_ in one["extras"]} == {3, 4}
    # At other speeds others are there first; the log says who drew what.
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace(": 0.3\n", ": 2.0\n"))
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == once.digest


def test_an_asynchronous_run_that_lost_nodes_is_refused(tmp_path: Path):
    faults = {"events": [{"kind": "kill", "node": 1, "round": 1}]}
    simulate(config("Counting", faults=faults), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="in that run nodes came and went, and it is asynchronous"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")


def test_who_was_late_is_late_again(tmp_path: Path):
    slow = {"step_ms": 1000, "speeds": {2: 0.1}}
    cluster = {"nodes": {"target": 4}, "round_deadline_s": 5}
    once = simulate(config("Computing", algorithm="fedavg", network=slow, cluster=cluster), run_dir=tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("2: 0.1\n", "1: 0.1\n"))  # whoever is slow now
    assert {one["node"] for one in logged(tmp_path / "run", "late")} == {2}
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == once.digest
    assert {one["node"] for one in logged(tmp_path / "again", "late")} == {2}


def logged(run_dir: Path, what: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == what]


def test_only_the_directory_of_a_finished_run_is_taken(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing/config.yaml: cannot be read"):
        replay(tmp_path / "nothing")
    simulate(config("Mailing"), run_dir=tmp_path / "run")
    whole = (tmp_path / "run/events.jsonl").read_text()
    (tmp_path / "run/events.jsonl").write_text("{broken\n")
    with pytest.raises(ConfigError, match=r"events\.jsonl, line \d+: is not whole JSON"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")
    (tmp_path / "run/events.jsonl").write_text(whole)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (tmp_path / "run/summary.json").write_text(json.dumps(summary | {"status": "failed"}))
    with pytest.raises(ConfigError, match="that run is failed, and only a finished one has an end"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(ConfigError, match=r"it has no summary.json; it takes the directory"):
        replay(tmp_path / "run", run_dir=tmp_path / "again")
