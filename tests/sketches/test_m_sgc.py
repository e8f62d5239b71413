"""M-SGC: every gradient is the one of the job's whole batch, and nobody waits for stragglers that the code can bear."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.data import Iid, assign
from starling.algorithms.api import Batch, Gradient, Node, Sleep
from starling.algorithms.closing import Waited
from tests.sketches.m_sgc import MSGC, WithinModel, joined
from tests.toys import Ran, Toy, begin, replica, simulate

PAUSE_S = 50.0


class Pausing(MSGC):
    """Some nodes pause in some rounds."""

    pauses: tuple[tuple[int, ...], ...] = ()  # by round

    async def round(self, node: Node) -> None:
        if node.round < len(self.pauses) and node.id in self.pauses[node.round]:
            await Sleep(PAUSE_S)
        await super().round(node)


def run(pauses: Any, *, nodes: int = 4, rounds: int = 8, **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": "tests.sketches.test_m_sgc:Pausing", "pauses": pauses, "chunk": 2} | keys,
        task="test_toy",
        nodes=nodes,
        rounds=rounds,
        optimizer={"lr": 0.1, "precision": "fp64"},
        evaluation={"every_rounds": 0},
    )


def check(ran: Ran, nodes: int = 4) -> None:
    """All models are where SGD on the jobs' batches is after as many steps as there were jobs."""
    algorithm: Any = ran.config.algorithm
    node = ran.replicas[ran.sought("commit")[-1]["committed"][0]]
    models: Any = node.shared["models"]
    finished = ran.config.rounds - (algorithm.window - 2 + algorithm.burst)
    assert finished >= 2 * len(models)
    for model, expected in zip(models, descent(algorithm, nodes, finished), strict=True):
        torch.testing.assert_close(model, expected, rtol=1e-11, atol=1e-12)


def descent(algorithm: MSGC, nodes: int, jobs: int) -> list[Tensor]:
    """The models after SGD, each job on all of its samples at once, without rounds, slots or a code."""
    task, size = Toy(), algorithm.stragglers + 1
    one = replica(task=task, num_nodes=nodes, precision="fp64")
    one.data.parts = assign(task.train_samples(nodes), Iid(), nodes, 0)
    begin(one, 0)
    models = [one.parameters.clone() for _ in range(algorithm.window - 1 + algorithm.burst)]
    for job in range(jobs):
        owned = [(size, f"job {job}, chunk {chunk}") for chunk in range(algorithm.window - 1)]
        coded = [(1, f"job {job}, group {group}") for group in range(algorithm.burst)]
        drawn = [
            one.data.batch(Batch(part=part, size=times * algorithm.chunk, key=key))
            for part in range(nodes)
            for times, key in owned + coded
        ]
        model = models[job % len(models)]
        model -= algorithm.lr * one.trainer.gradient(Gradient(at=model, batch=joined(drawn))).gradient
    return models


def test_without_stragglers():
    ran = run(())
    check(ran)
    assert [record.payload_bytes for record in ran.rounds[1:]] == [ran.expected_bytes] * 7
    nbytes = ran.replicas[0].layout.nbytes
    assert ran.expected_bytes == 4 * 3 * 8 + 4 * 3 * (2 * nbytes), "two vectors of each node to each other"


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        (((1,), (), (3,), (), (0,), (), (2,)), {}),
        (((), (0,), (), (0,), (), (0,)), {}),
        (((2,), (2,), (), (), (1,), (1,)), {"burst": 2, "window": 3}),
        (((3,), (), (), (0,), (), (), (3,)), {"window": 3}),
        (((0, 3), (), (1, 2), (), (), (4, 5)), {"stragglers": 2}),
        (((5,), (2,), (), (1,), (4,), ()), {"stragglers": 2, "burst": 1, "window": 2}),
    ],
    ids=str,
)
def test_bursts_that_the_code_can_bear_cost_no_waiting(pattern: Any, keys: dict[str, Any]):
    nodes = 6 if keys.get("stragglers") == 2 else 4
    ran = run(pattern, nodes=nodes, rounds=12, **keys)
    late = [(event["round"], event["node"]) for event in ran.sought("late")]
    assert late == [(number, node) for number, nodes in enumerate(pattern) for node in nodes]
    assert ran.virtual_seconds < PAUSE_S
    check(ran, nodes)


def test_all_bursts_of_four_rounds():
    """No straggler in the round after one, which is what B = 1, W = 2, λ = 1 says."""
    patterns = [
        pattern
        for pattern in itertools.product([(), (0,), (3,)], repeat=4)
        if not any(one and two for one, two in itertools.pairwise(pattern))
    ]
    assert len(patterns) == 21
    for pattern in patterns:
        ran = run(pattern, rounds=6)
        assert ran.virtual_seconds < PAUSE_S
        check(ran)


def test_what_the_code_cannot_bear_is_waited_for():
    """In two rounds running, the same node or another; two at once. Exact all the same."""
    for pattern in (((1,), (1,)), ((1,), (2,)), ((0, 1),)):
        ran = run(pattern)
        assert PAUSE_S < ran.virtual_seconds < 2 * PAUSE_S
        check(ran)


def test_close_policy():
    policy = WithinModel(recent=(1, 2), blocked=(1,), stragglers=2, mu=1.0)
    everybody = {0, 1, 2, 3}
    assert policy.enough({0, 1, 3}, everybody, Waited(3.0, 3.0)), "node 2 straggles on, within its burst"
    assert not policy.enough({0, 1, 3}, everybody, Waited(3.0, 2.5))
    assert policy.ask_again_s({0, 1, 3}, everybody, Waited(3.0, 2.5)) == 0.5
    assert policy.ask_again_s({0, 1, 3}, everybody, Waited(3.0, 3.0)) is None
    assert policy.ask_again_s({0, 2, 3}, everybody, Waited(3.0, 2.5)) is None, "time alone does not help"
    assert not policy.enough({0, 2, 3}, everybody, Waited(3.0, 90.0)), "node 1 has straggled too long ago"
    assert not policy.enough({0, 1, 2}, everybody, Waited(3.0, 90.0)), "node 3 would be the third"
    assert not policy.past_deadline({0, 1, 2}, everybody)
    assert policy.enough(everybody, everybody, Waited(3.0, 0.0))
    assert WithinModel(recent=(), blocked=(), stragglers=1, mu=0.0).enough({0, 1, 3}, everybody, Waited(3.0, 0.0))


def test_rounds_take_twice_what_the_fastest_takes():
    """A slot takes 10 ms, and a round has one in round 0 and two later on. Who pauses is left behind at twice that."""
    ran = run(((1,), (), (2,), ()), rounds=4)
    began = [event["at_s"] for event in ran.sought("begin")]
    late = [event["at_s"] for event in ran.sought("late")]
    assert [one - began[number] for one, number in zip(late, (0, 2), strict=True)] == pytest.approx([0.02, 0.04])
