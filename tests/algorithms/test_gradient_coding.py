"""Gradient coding, exactly: the steps of plain SGD, whoever straggles, and nobody waits for them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.data import Iid, assign
from starling.algorithms.api import AllGather, AllReduce, Batch, Gradient, GradientReport, Reduced
from starling.algorithms.closing import Waited
from starling.algorithms.closing.coded import OneOfEach
from starling.algorithms.coded.gradient_coding import GradientCoding, groups_of, representatives
from starling.algorithms.rules import DataBatch
from tests.toys import Ran, Toy, begin, replica, simulate

ROUNDS = 4


def run(*, nodes: int, stragglers: int, slow: Any = (), model: str = "mlp", batch: int = 4, **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": "gradient_coding", "stragglers": stragglers, "outer": {"name": "sgd", "lr": 0.2}} | keys,
        task={"name": "test_toy", "model": model},
        cluster={"nodes": {"target": nodes}, "quorum_fraction": 0.25, "round_deadline_s": 1000},
        rounds=ROUNDS,
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": batch},
        evaluation={"every_rounds": 0},
        network={"speeds": dict.fromkeys(slow, 1e-4)},
    )


def model(ran: Ran) -> Tensor:
    """Of a node that took part in the last round."""
    return ran.replicas[ran.sought("commit")[-1]["committed"][0]].parameters


def descent(nodes: int, batch: int = 4) -> Tensor:
    """SGD on a batch of every node's samples: twelve lines without groups, exchanges or a simulator."""
    task = Toy()
    one = replica(task=task, num_nodes=nodes, precision="fp64")
    one.data.parts = assign(task.train_samples(nodes), Iid(), nodes, 0)
    for number in range(ROUNDS):
        begin(one, number)
        drawn = [one.data.batch(Batch(part=node, size=batch)) for node in range(nodes)]
        tensors = tuple(torch.cat(parts) for parts in zip(*(part.tensors for part in drawn), strict=True))
        whole = DataBatch(tensors, sum(part.num_samples for part in drawn))
        one.parameters.sub_(one.trainer.gradient(Gradient(batch=whole)).gradient, alpha=0.2)
    return one.parameters


# --- the code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", range(1, 11))
def test_any_s_can_be_missing(nodes: int):
    for stragglers in range(nodes):
        groups = groups_of(range(nodes), stragglers)
        assert sorted(node for group in groups for node in group) == list(range(nodes))
        assert min(map(len, groups)) >= min(stragglers + 1, nodes)
        assert len(groups) == nodes // (stragglers + 1), "no more is computed than must be"
        policy = OneOfEach(groups=groups)
        for missing in itertools.combinations(range(nodes), stragglers):
            done = set(range(nodes)) - set(missing)
            chosen = representatives(groups, done)
            assert [len(chosen & set(group)) for group in groups] == [1] * len(groups)
            assert chosen <= done
            assert policy.enough(done, set(range(nodes)), Waited(0.0, 0.0))
        for group in groups:
            rest = set(range(nodes)) - set(group)
            assert len(representatives(groups, rest)) == len(groups) - 1
            assert not policy.enough(rest, set(range(nodes)), Waited(0.0, 1e9))
            assert not policy.past_deadline(rest, set(range(nodes)))


# --- the steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "stragglers"), [(4, 0), (4, 1), (5, 1), (6, 2), (3, 5), (1, 1)])
def test_it_is_sgd_on_all_batches(nodes: int, stragglers: int):
    ran = run(nodes=nodes, stragglers=stragglers)
    torch.testing.assert_close(model(ran), descent(nodes), rtol=1e-12, atol=1e-12)
    assert not ran.sought("late")


@pytest.mark.parametrize("nodes", [4, 6])
def test_whoever_straggles(nodes: int):
    """All pairs of six, and each of four. They are left behind in every round, and cost none of its time."""
    stragglers = nodes // 2 - 1
    for slow in itertools.combinations(range(nodes), stragglers):
        ran = run(nodes=nodes, stragglers=stragglers, slow=slow)
        assert {event["node"] for event in ran.sought("late")} == set(slow)
        torch.testing.assert_close(model(ran), descent(nodes), rtol=1e-12, atol=1e-12)
        assert ran.virtual_seconds == pytest.approx(ROUNDS * (nodes // 2 * 0.01 + 0.1), rel=0.02)


def test_more_than_s_are_waited_for_only_if_they_are_a_whole_group():
    spread = run(nodes=6, stragglers=1, slow=(0, 1, 2))
    assert spread.virtual_seconds == pytest.approx(ROUNDS * (2 * 0.01 + 0.1), rel=0.02), (
        "of each group there is another"
    )
    group = run(nodes=6, stragglers=1, slow=(0, 3))
    assert group.virtual_seconds > ROUNDS * 100
    for ran in (spread, group):
        torch.testing.assert_close(model(ran), descent(6), rtol=1e-12, atol=1e-12)


def test_who_was_late_comes_back():
    """Late in the rounds that it takes long for, and there again after them, with the model of all."""
    ran = run(nodes=4, stragglers=1, slow=(2,))
    assert len(ran.sought("late")) == ROUNDS
    donated = [(event["round"], event["node"]) for event in ran.sought("transfer")]
    assert donated == [(number, 2) for number in range(1, ROUNDS)]


def test_a_group_draws_the_same():
    """Members of a group contribute the same bits, so it does not matter which of them does."""
    bits: dict[int, Any] = {}
    for slow in range(4):
        ran = run(nodes=4, stragglers=1, slow=(slow,), model="batch_norm")
        bits[slow] = (model(ran).tolist(), ran.digest)
    assert bits[0] == bits[1] == bits[2] == bits[3]


def test_bytes():
    ran = run(nodes=6, stragglers=1, batch=2)
    nbytes = ran.replicas[0].layout.nbytes
    assert [record.payload_bytes for record in ran.rounds] == [6 * 5 * 8 + 3 * 5 * nbytes] * ROUNDS
    assert ran.expected_bytes == 6 * 5 * 8 + 3 * 5 * nbytes


# --- losses within a round ------------------------------------------------------------------------------------------


def drive(lost: tuple[int, ...]) -> tuple[list[Any], Any]:
    """A round of node 3 of four in groups (0, 2), (1, 3), in which ``lost`` go between the two exchanges."""
    state: dict[str, Any] = {}
    node: Any = SimpleNamespace(
        id=3,
        view=SimpleNamespace(members=(0, 1, 2, 3)),
        parameters=torch.zeros(1),
        buffers=torch.zeros(0),
        shared=state,
    )
    algorithm = GradientCoding(outer={"name": "sgd", "lr": 1.0})  # type: ignore[arg-type]
    algorithm.init(node)
    program = algorithm.round(node)
    awaited: list[Any] = [program.send(None)]
    contributors: set[int] = set()
    try:
        while True:
            match awaited[-1]:
                case Batch(part=part):
                    answer: Any = DataBatch((torch.tensor([float(part or 0)]),), 2)
                case Gradient(batch=batch):
                    answer = GradientReport(batch.tensors[0] if batch else torch.zeros(1), 0.0, 2)
                case AllGather():
                    answer = dict.fromkeys((0, 1, 2, 3), 1.0)
                    contributors = {0, 1}
                case AllReduce():
                    there = tuple(sorted(contributors - set(lost)))
                    answer = Reduced({"gradient": torch.ones(1), "buffers": torch.zeros(0)}, there, 4.0 * len(there))
                    contributors = {{0: 2, 1: 3}.get(one, one) if one in lost else one for one in contributors}
            awaited.append(program.send(answer))
    except StopIteration:
        return awaited, node


def test_who_is_lost_is_replaced_by_one_of_its_group():
    awaited, node = drive(lost=(1,))
    reductions = [one for one in awaited if isinstance(one, AllReduce)]
    assert [one.tensors is not None for one in reductions] == [False, True], "node 3 takes the place of node 1"
    assert reductions[1].tensors["gradient"].tolist() == [2.0], "the mean of the gradients of parts 1 and 3"
    assert reductions[1].weight == 4
    assert node.parameters.tolist() == [-1.0]


def test_without_losses_one_reduction_is_enough():
    awaited, _ = drive(lost=())
    assert [one.part for one in awaited if isinstance(one, Batch)] == [1, 3]
    assert sum(isinstance(one, AllReduce) for one in awaited) == 1


def test_a_group_that_is_lost_as_a_whole_is_left_out():
    awaited, node = drive(lost=(0, 2))
    assert sum(isinstance(one, AllReduce) for one in awaited) == 2
    assert node.parameters.tolist() == [-1.0]
