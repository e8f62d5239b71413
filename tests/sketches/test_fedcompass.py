"""FedCompass: groups that arrive together, whatever the speeds."""

from __future__ import annotations

from typing import Any

import pytest

from starling.algorithms.api import SERVER
from tests.sketches.fedcompass import Client, Group, Scheduler
from tests.toys import Ran, simulate


def run(speeds: dict[int, float], rounds: int, nodes: int = 5) -> Ran:
    return simulate(
        algorithm={"name": "tests.sketches.fedcompass:FedCompass", "min_steps": 4, "max_steps": 20},
        task={"name": "quadratic", "dimension": 4, "heterogeneity": 0.5},
        nodes=nodes,
        rounds=rounds,
        optimizer={"lr": 0.1},
        evaluation={"every_rounds": 0},
        network={"speeds": speeds},
    )


def log(ran: Ran) -> list[dict[str, Any]]:
    entries: Any = ran.replicas[SERVER].local["log"]
    return list(entries)


def arrivals(ran: Ran) -> list[tuple[int, float]]:
    """(client, second) of every update, in order."""
    return [(event["outcome"][0], event["at_s"]) for event in ran.sought("received") if event["node"] == SERVER]


def test_equal_clients_form_one_synchronous_group():
    entries = log(run({}, rounds=12))
    assert [len(one["clients"]) for one in entries] == [1] * 5 + [5] * 7, "five first contacts, then all together"
    assert all(one["steps"] == [20] * 5 for one in entries[5:])
    assert all(one["ages"] == [0] * 5 for one in entries[6:])


def test_unequal_clients_arrive_together():
    """Speeds from 1 to 1/3: the slower do fewer steps, and each arrives within its last step before the others."""
    speeds = {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.45, 4: 1 / 3}
    ran = run(speeds, rounds=14)
    entries = log(ran)
    last = [one for one in entries[8:] if len(one["clients"]) == 5]
    assert len(last) >= 4
    steps = dict(zip(last[-1]["clients"], last[-1]["steps"], strict=True))
    assert all(4 <= count <= 20 for count in steps.values())
    assert [steps[client] for client in range(5)] == sorted(steps.values(), reverse=True)
    assert steps[0] >= 2 * steps[4]
    seconds = [second for _, second in arrivals(ran)[-5:]]
    assert max(seconds) - min(seconds) <= 0.01 / speeds[4] + 1e-6
    assert last[-1]["ages"] == [0] * 5
    assert ran.summary is not None
    assert ran.summary.metrics["loss"] < 1.5 * ran.summary.baselines["optimum"]


def test_a_client_that_is_too_slow_for_any_group_holds_up_nobody():
    """Ten times slower, where steps can differ five times: late for each group, but its updates count."""
    ran = run({4: 0.1}, rounds=40)
    entries = log(ran)
    assert {client for one in entries for client in one["clients"]} == set(range(5))
    ages = [age for one in entries for client, age in zip(one["clients"], one["ages"], strict=True) if client == 4]
    assert len(ages) >= 3
    assert max(ages) >= 1
    # The others' groups of 20 steps of 10 ms, with the slack of those in which the slow one was awaited.
    assert ran.virtual_seconds < 40 * 0.2 * 1.5 + 1e-6


def test_timer_of_a_group_that_nobody_reached_aggregates_nothing():
    scheduler = Scheduler(4, 20, 1.5, {0: Client(20, 0.0, 0.01, 3)}, {3: Group(0.2, 0.3, running=[0])})
    assert scheduler.next_timer() == 0.3
    assert scheduler.close(3) == []
    assert scheduler.next_timer() is None
    assert 3 in scheduler.groups, "its client is late, not forgotten"
    scheduler.leave(0)
    assert not scheduler.groups


def test_assignment():
    """The group that leaves time for most steps; else one that ends with the next round of another."""
    scheduler = Scheduler(4, 20, 1.5, {0: Client(20, 0.0, 0.02), 1: Client(20, 0.0, 0.01, 7)})
    scheduler.groups = {7: Group(0.2, 0.3, running=[1])}
    assert scheduler.assign(0, 0.1) == 5
    assert scheduler.clients[0].group == 7
    scheduler.clients[2] = Client(20, 0.0, 0.1)
    assert scheduler.assign(2, 0.1) == pytest.approx(4)
    assert scheduler.clients[2].group == 8
    assert scheduler.groups[8].expected == pytest.approx(0.1 + 4 * 0.1)
    assert scheduler.groups[8].latest == pytest.approx(0.1 + 1.5 * 4 * 0.1)
