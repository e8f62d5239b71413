"""MoDeST: FedAvg where everybody is sampled, the same sample for all, and progress where most do not answer."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from starling.algorithms.seeds import generator
from tests.sketches.modest import MoDeST
from tests.toys import Ran, simulate

TASK = {"name": "quadratic", "dimension": 4, "noise": 0.3}


def run(*, nodes: int, rounds: int, speeds: Any = None, **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": "tests.sketches.modest:MoDeST"} | keys,
        task=TASK,
        nodes=nodes,
        rounds=rounds,
        optimizer={"lr": 0.1, "precision": "fp64"},
        evaluation={"every_rounds": 0},
        network={"latency_ms": 5, "speeds": speeds or {}},
    )


def order(nodes: int, number: int, *, without: int | None = None) -> list[int]:
    """As a node sees it that knows of all."""
    counters = torch.ones(nodes, dtype=torch.int64)
    if without is not None:
        counters[without] = -2
    node: Any = SimpleNamespace(id=0, local={"counters": counters, "activity": torch.full_like(counters, number)})
    return MoDeST().order(node, number)


def reached(ran: Ran) -> int:
    """The last round for which somebody has aggregated."""
    numbers: list[Any] = [one.local["aggregated"] for one in ran.replicas.values()]
    return max(numbers)


@pytest.mark.parametrize("aggregators", [1, 2])
def test_with_everybody_in_the_sample_it_is_fedavg(aggregators: int):
    """The mean that a node is sent for round k is FedAvg's model after k rounds; what comes twice is ignored."""
    ran = run(nodes=4, rounds=12 * aggregators, sample_size=4, num_aggregators=aggregators)
    for one in ran.replicas.values():
        number: Any = one.local["round"]
        assert number >= 4
        assert one.schedule.step == 5 * (number + 1)
        theirs = simulate(
            algorithm={"name": "fedavg", "steps": 5, "weighting": "uniform"},
            task=TASK,
            nodes=4,
            rounds=number,
            optimizer={"lr": 0.1, "precision": "fp64"},
        )
        mean: Any = one.local["mean"]
        torch.testing.assert_close(mean, theirs.parameters, rtol=1e-12, atol=1e-12)


def test_samples_are_the_same_for_all_fair_and_stable():
    times = Counter(one for number in range(600) for one in order(30, number)[:6])
    assert min(times.values()) > 120 - 4 * (600 * 0.2 * 0.8) ** 0.5
    for number in range(100):
        whole, less = order(30, number), order(30, number, without=7)
        assert less == [one for one in whole if one != 7]
        assert len(set(whole[:6]) - set(less[:6])) <= 1


def test_bytes():
    """Per round s models up and s down for each aggregator, less what a node sends to itself, and the views."""
    ran = run(nodes=8, rounds=20, sample_size=3)
    received = [(event["node"], event["outcome"][0]) for event in ran.sought("received")]
    across = sum(node != sender for node, sender in received)
    size = 4 * 8 + 2 * 8 * 8 + 2 * 8
    sent = sum(record.payload_bytes for record in ran.rounds)
    assert 0 <= sent - across * size <= 3 * size, "the rest is on its way at the end"
    own = len(received) - across
    assert len(received) == pytest.approx(2 * 3 * reached(ran), abs=6)
    assert 0 < own <= 2 * reached(ran)


def test_progress_although_four_in_five_do_not_answer():
    """Of 20 in the registry 4 are there; the others cost a ping each, until nobody has heard of them for long."""
    ran = run(nodes=4, rounds=30, sample_size=3, num_registered=20, ping_timeout_s=1.0, activity_window=6)
    assert reached(ran) >= 15
    assert ran.summary is not None
    assert ran.summary.metrics["loss"] < 1.5 * ran.summary.baselines["optimum"]
    for one in ran.replicas.values():
        algorithm: Any = one.spec.algorithm
        assert set(algorithm.order(one, reached(ran))) <= set(range(4))
    seconds = [record.seconds for record in ran.rounds]
    assert sum(seconds[:10]) > 5.0, "timeouts"
    assert sum(seconds[-10:]) < 1.0


def test_a_slow_node_is_waited_for_no_longer_than_agreed():
    ran = run(nodes=4, rounds=20, sample_size=4, aggregation_timeout_s=0.3, speeds={2: 0.01})
    assert reached(ran) >= 8
    numbers: Any = {node: one.local["round"] for node, one in ran.replicas.items()}
    assert numbers[2] < min(numbers[node] for node in (0, 1, 3))
    patient = run(nodes=4, rounds=4, sample_size=4, speeds={2: 0.01})
    assert patient.virtual_seconds > 5.0


def test_views_merge_alike_in_any_order():
    rng = generator("views")
    # A node's k-th statement is one for all, wherever it is read.
    statements = torch.randint(0, 2, (9, 6), generator=rng).mul(2).sub(1)
    views: list[dict[str, Any]] = []
    for _ in range(3):
        counts = torch.randint(1, 9, (6,), generator=rng)
        signed = counts * statements[counts, torch.arange(6)]
        views.append({"counters": signed, "activity": torch.randint(0, 50, (6,), generator=rng), "round": 3})

    def merged(*turn: int) -> dict[str, Any]:
        node: Any = SimpleNamespace(local={"counters": torch.zeros(6, dtype=torch.int64), "activity": torch.zeros(6)})
        for place in turn:
            MoDeST._merge(node, views[place], sender=0)
        return {key: value.tolist() for key, value in node.local.items()}

    assert merged(0, 1, 2) == merged(2, 1, 0) == merged(1, 0, 2, 0, 1)
    assert merged(0, 1) != merged(0, 2)
