"""A run with faults that is killed behind any of its commits, and resumed, is the run that nobody killed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.cases import CASES
from tests.control.test_membership_fuzz import PHASES, TASK, history
from tests.resuming import differences

if TYPE_CHECKING:
    from pathlib import Path

QUICK: dict[str, Any] = {
    "task": TASK,
    "rounds": 5,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "evaluation": {"every_rounds": 0},
    "cluster": {
        "nodes": {"target": 4},
        "drain_s": 0.03,
        "round_deadline_s": 0.3,
        "cancel_grace_s": 0.05,
        "warm_spares": 1,
    },
    "network": {"start_s": 0.02, "step_ms": 5, "bandwidth_mbps": 20, "speeds": {0: 0.4}},
}


def event(node: int | str, number: int, kind: str = "kill", phase: str = "train") -> dict[str, Any]:
    return {"kind": kind, "node": node, "round": number, "phase": phase}


@pytest.mark.parametrize(
    ("algorithm", "events", "rounds"),
    [
        # What is to happen with the commit that is saved; who is being started; who is given up for a while.
        ("scaffold", [event(1, 1, phase="commit"), event(2, 2, "preempt", "commit")], (1, 2)),
        # One hangs and is late; one has left, and its successor is not there yet, or does not know what was kept.
        ("dsgd", [event(1, 1, "hang"), event(3, 1, "preempt", "commit")], (1, 2)),
        # One is to come; what joiners catch up by is in the log of rounds.
        ("just_one_byte", [event(3, 1, "late_join"), event(2, 3)], (1, 3)),
        # Who has begun with the server's model has committed nothing yet.
        ("fedbuff", [event(3, 1, "late_join"), event(1, 2), event(0, 3, "preempt")], (1, 2)),
    ],
)
def test_what_happens_to_nodes_happens_after_a_resume(
    algorithm: str, events: list[dict[str, Any]], rounds: tuple[int, ...], tmp_path: Path
):
    more = {"buffer_size": 2, "steps": 1} if algorithm == "fedbuff" else {}
    raw = QUICK | {"algorithm": {"name": algorithm} | more, "faults": {"events": events}}
    assert differences(raw, tmp_path, rounds) == []


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("optimizer", [{"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "adamw", "lr": 0.01}])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_algorithm_from_every_commit(case: Any, optimizer: dict[str, Any], tmp_path: Path):
    """The same with all kinds of faults, in any order, at every phase."""
    algorithm = case.algorithm
    phases = PHASES if algorithm.synchronous else ("train", "receive", "commit", "transfer")
    small = {
        "task": TASK if case.name != "streaming_diloco" else {"name": "digits", "model": {"name": "mlp", "width": 16}}
    }
    rng, lived = random.Random(case.name), 0
    while lived < 3:
        raw = case.config | history(rng, phases, has_server=algorithm.has_server) | small
        schedule = rng.choice([{}, {"schedule": {"name": "cosine"}}]) if case.name != "mezo" else {}
        raw |= {"rounds": 8, "on_nan": "stop", "optimizer": optimizer | schedule}
        raw["faults"]["events"] = [one | {"round": one["round"] % 8} for one in raw["faults"]["events"]]
        raw["data"] = {"batch_size": 1, "sampler": rng.choice(["epoch", "replacement", "poisson"])}
        try:
            parse({"tracking": "none"} | raw)
        except ConfigError:
            continue
        lived += 1
        assert differences(raw, tmp_path / str(lived)) == [], raw
