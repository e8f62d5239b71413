"""Fault histories: the shortest one of each kind of fault that was found, and a slice of ``make soak``."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from orchestrator.errors import RunError
from tests.soak.histories import draw
from tests.soak.watch import Wrong, live
from tests.toys import attempt

UNEQUAL = "tests.soak.programs:Unequal"


def history(algorithm: Any, *faults: tuple[str, Any, int, str], nodes: int = 3, **keys: Any) -> dict[str, Any]:
    """A configuration; ``faults`` are (kind, node, round, phase)."""
    network, cluster = ({"start_s": 0.02} | keys.pop("network", {})), ({"min": 1} | keys.pop("least", {}))
    events = [{"kind": kind, "node": node, "round": number, "phase": phase} for kind, node, number, phase in faults]
    return {
        "rounds": max((number for _, _, number, _ in faults), default=0) + 4,
        "algorithm": algorithm,
        "task": UNEQUAL,
        "tracking": "none",
        "optimizer": {"lr": 0.01},
        "evaluation": {"every_rounds": 0},
        "network": network,
        "cluster": {"nodes": cluster | {"target": nodes}} | keys.pop("cluster", {}),
        "faults": {"events": events},
    } | keys


DRAINED = ("kill", 1, 2, "post"), ("preempt", 1, 3, "secure")
"""Whoever takes the place of a node that died is told to leave before it has been given anything."""


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "diloco", "inner_steps": 2},
        {"name": "fedavg", "steps": 2},
        {"name": "dsgd", "steps": 2},
        {"name": "gradient_tracking", "steps": 2},
        {"name": "single_merge", "steps": 2, "neighbors": 2.0},
        {"name": "mezo", "lr": 0.01},
        {"name": "just_one_byte"},
    ],
    ids=lambda one: one["name"],
)
def test_a_replacement_that_is_told_to_leave_before_its_first_commit_hands_over_nothing(algorithm: dict[str, Any]):
    raw = history(algorithm, *DRAINED, network={"start_s": 0.01, "step_ms": 20})
    assert live(raw) == "finished"
    ran = attempt(raw)
    assert [event["kept_nbytes"] for event in ran.sought("left")] == [0]


def test_what_a_predecessor_handed_over_outlives_a_replacement_that_leaves_at_once():
    raw = history(
        {"name": "tests.soak.programs:Mixer"},
        ("preempt", 1, 2, "train"),
        ("preempt", 1, 3, "train"),
        network={"start_s": 0.015},
        cluster={"drain_s": 0.005},
    )
    assert live(raw) == "finished"


def test_rounds_without_a_barrier_that_are_always_late_end_the_run():
    raw = history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, network={"step_ms": 100})
    for algorithm in (raw["algorithm"], "random_walk"):
        ran = attempt(raw | {"algorithm": algorithm, "cluster": {"nodes": {"target": 3}, "round_deadline_s": 0.05}})
        assert str(ran.error) == (
            "node 0 cannot finish its round 0: it computes for longer than 0.05 s without a word, tried 10 times; "
            "raise cluster.round_deadline_s if it is only slow"
        )


def test_a_worker_that_is_always_late_does_not_end_a_run_that_goes_on():
    raw = history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, network={"speeds": {0: 0.1}}, rounds=60)
    ran = attempt(raw | {"cluster": {"nodes": {"target": 3}, "round_deadline_s": 0.05}})
    assert ran.error is None
    assert len(ran.sought("late")) > 10


def test_a_server_that_is_given_up_ends_the_run():
    faults = [("kill", "server", number, "train") for number in [3] * 8]
    ran = attempt(history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, *faults))
    assert isinstance(ran.error, RunError | None)


def test_steps_of_an_exchange_that_was_given_up_do_not_reach_the_next_attempt():
    raw = history(
        {"name": "fedavg", "steps": 2},
        ("kill", 3, 2, "secure"),
        nodes=4,
        task={"name": UNEQUAL, "width": 3000},
        network={"latency_ms": 400},
        cluster={"quorum_fraction": 1},
    )
    assert live(raw) == "finished"
    assert attempt(raw).sought("abort")


def test_a_dead_node_is_not_given_a_result():
    raw = history(
        {"name": "fedavg", "steps": 2},
        ("late_join", 3, 10, "train"),
        ("kill", 1, 10, "post"),
        ("preempt", 0, 10, "train"),
        nodes=4,
        network={"step_ms": 20, "latency_ms": 3, "start_s": 5},
        cluster={"drain_s": 0.03},
    )
    assert live(raw) == "finished"


@pytest.mark.parametrize("seed", range(3))
def test_some_random_histories(seed: int):
    lived(f"quick {seed}", 4)


@pytest.mark.slow
def test_more_random_histories():
    ends = lived("slow", 100)
    assert ends["finished"] > 40


def lived(seed: str, number: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    for place in range(number):
        raw = draw(random.Random(f"{seed}:{place}"))
        try:
            ends[live(raw)] += 1
        except Wrong as wrong:
            pytest.fail(f"{wrong}\n{raw}")
    return ends
