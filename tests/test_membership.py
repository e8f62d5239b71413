"""Nodes that die or hang and come back, in the simulator: nothing diverges, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from algorithms.api import AllReduce, Node
from orchestrator.errors import RunError
from tests.cases import CASES
from tests.conformance import Case
from tests.toys import Program, Ran, attempt, simulate

PHASES = ("train", "post", "secure", "deliver", "commit")


def fault(node: int, number: int, phase: str = "train", kind: str = "kill") -> dict[str, Any]:
    return {"kind": kind, "node": node, "round": number, "phase": phase}


def suffer(*events: dict[str, Any], rounds: int = 8, nodes: int = 4, **keys: Any) -> Ran:
    """FedAvg on digits, with a model that travels in parts."""
    base = {
        "algorithm": {"name": "fedavg", "steps": 2},
        "task": {"name": "digits", "model": {"name": "mlp", "width": 300}},
        "network": {"start_s": 0.03, "step_ms": 10},
    }
    cluster = {"nodes": {"target": nodes}, "round_deadline_s": 5, "cancel_grace_s": 1}
    return simulate(base | keys, nodes=nodes, rounds=rounds, faults={"events": list(events)}, cluster=cluster)


def members(ran: Ran) -> list[tuple[int, ...]]:
    return [tuple(one["committed"]) for one in ran.sought("commit")]


@pytest.mark.parametrize("phase", PHASES)
def test_a_node_that_dies_is_replaced_and_the_round_goes_on(phase: str):
    ran = suffer(fault(2, 1, phase))
    assert len(ran.rounds) == 8
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert (0, 1, 3) in members(ran)
    (transfer,) = ran.sought("transfer")
    assert transfer["node"] == 2
    assert transfer["donor"] != 2
    assert ran.summary.bytes["recovery"] == transfer["nbytes"] > 0
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert ran.replicas[2].incarnation == 1


@pytest.mark.parametrize("phase", PHASES)
def test_small_exchanges_have_the_same_moments(phase: str):
    ran = suffer(fault(2, 1, phase), task="digits")
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}


def test_a_moment_that_a_round_does_not_have_is_told():
    ran = simulate(nodes=2, rounds=3, faults={"events": [fault(1, 1, "deliver")]})
    assert ran.sought("lost") == []
    assert "faults.events: round 1 has no moment 'deliver'; nothing happened to this node" in ran.logs


def test_a_node_that_hangs_is_late_then_ended_and_replaced():
    ran = suffer(fault(1, 2, kind="hang"))
    assert [one["node"] for one in ran.sought("late")] == [1]
    (lost,) = ran.sought("lost")
    assert lost["reason"] == "it did not stop within 1 s (cluster.cancel_grace_s)"
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_several_joiners_have_several_donors():
    ran = suffer(*(fault(node, 1) for node in (1, 2, 3)), nodes=8)
    transfers = ran.sought("transfer")
    assert sorted(one["node"] for one in transfers) == [1, 2, 3]
    assert len({one["donor"] for one in transfers}) == 3


def test_too_few_begin_the_same_round_again_and_lose_nothing():
    calm = suffer()
    ran = suffer(*(fault(node, 3) for node in (1, 2, 3)))
    (abort,) = ran.sought("abort")
    assert (abort["round"], abort["reason"]) == (3, "1 of 4 members are left, 2 are needed")
    begins = [(one["round"], one["epoch"]) for one in ran.sought("begin")]
    assert begins[:6] == [(0, 0), (1, 1), (2, 2), (3, 3), (3, 4), (4, 5)]
    assert [one["round"] for one in ran.sought("commit")] == list(range(8))
    assert ran.summary is not None
    assert calm.summary is not None
    assert ran.summary.metrics["loss"] == pytest.approx(calm.summary.metrics["loss"], rel=0.3)


def test_a_run_waits_for_nodes_min():
    strict = attempt(
        {"algorithm": {"name": "fedavg", "steps": 2}, "task": "digits", "network": {"start_s": 3}},
        nodes=4,
        rounds=4,
        faults={"events": [fault(3, 2)]},
        cluster={"nodes": {"min": 4, "target": 4}},
    )
    assert strict.error is None
    assert [one["round"] for one in strict.sought("abort")] == [2]
    assert members(strict) == [(0, 1, 2, 3)] * 4
    assert 3 <= strict.virtual_seconds < 4


def test_a_run_whose_nodes_do_not_come_back_says_so():
    ran = attempt(
        {"algorithm": {"name": "fedavg", "steps": 2}, "task": "digits", "network": {"start_s": 1000}},
        nodes=4,
        rounds=4,
        faults={"events": [fault(3, 2)]},
        cluster={"nodes": {"min": 4, "target": 4}, "min_nodes_timeout_s": 60},
    )
    assert isinstance(ran.error, RunError)
    assert str(ran.error).startswith("round 2: 3 nodes are there, and cluster.nodes.min is 4; waited for 60 s")


def test_when_all_who_had_the_model_are_gone_a_new_node_does_not_go_on_alone():
    """The wipe: freshly started nodes must not become donors, or train a model of their own."""
    ran = attempt(
        {"algorithm": {"name": "fedavg", "steps": 2}, "task": "digits", "network": {"start_s": 0.01}},
        nodes=2,
        rounds=6,
        faults={"events": [fault(0, 3), fault(1, 3)]},
        cluster={"nodes": {"min": 1, "target": 2}},
    )
    assert isinstance(ran.error, RunError)
    assert str(ran.error) == "round 3: no node is left that has the model of round 2"
    assert [one["round"] for one in ran.sought("commit")] == [0, 1, 2]


def test_before_the_first_commit_all_begin_alike():
    ran = suffer(fault(0, 0), fault(1, 0), fault(2, 0))
    assert all(one["round"] > 0 for one in ran.sought("transfer"))
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm.synchronous], ids=lambda case: case.name)
@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_every_algorithm_lives_through_losses_hangs_and_flapping(case: Case, phase: str):
    events = [fault(1, 1, phase), fault(2, 2, kind="hang"), fault(1, 4, phase), fault(3, 4), fault(1, 6, phase)]
    cluster = case.config.get("cluster", {}) | {"nodes": {"target": 5}, "round_deadline_s": 2, "cancel_grace_s": 0.1}
    ran = case.run(rounds=10, faults={"events": events}, cluster=cluster, network={"start_s": 0.02})
    assert ran.error is None
    assert len(ran.rounds) == 10
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == 5
    if case.algorithm.replicated:
        final = members(ran)[-1]
        assert len({ran.replicas[node].shared.digest() for node in final}) == 1
    again = case.run(rounds=10, faults={"events": events}, cluster=cluster, network={"start_s": 0.02})
    assert again.digest == ran.digest
    assert again.events == ran.events


class Joining(Program, name="test_joining"):
    """Tells of its joins and of changes of the view."""

    def init(self, node: Node) -> None:
        node.shared["changes"] = 0
        node.local["joins"] = 0

    async def join(self, node: Node) -> None:
        joins: Any = node.local["joins"]
        node.local["joins"] = joins + 1

    async def on_view_change(self, node: Node) -> None:
        changes: Any = node.shared["changes"]
        node.shared["changes"] = changes + 1

    async def round(self, node: Node) -> None:
        mean = await AllReduce(torch.full((2,), float(len(node.view.members))))
        node.parameters.fill_(float(mean.value[0]))


def test_hooks_run_when_members_change():
    ran = simulate(
        algorithm="test_joining", nodes=3, rounds=8, faults={"events": [fault(1, 2, "commit")]}, network={"start_s": 0}
    )
    assert [one.local["joins"] for one in ran.replicas.values()] == [0, 1, 0]
    # One node less, and one more: at once, or one after the other.
    assert {one.shared["changes"] for one in ran.replicas.values()} <= {1, 2}
    assert len({one.shared.digest() for one in ran.replicas.values()}) == 1
