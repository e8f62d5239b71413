"""Nodes that die or hang and come back, in the simulator: nothing diverges, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from starling.algorithms.api import AllReduce, Node
from starling.orchestrator.errors import DivergedError, RunError
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
    cluster = {"nodes": {"target": nodes}, "round_deadline_s": 5, "cancel_grace_s": 1} | keys.pop("cluster", {})
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


@pytest.mark.parametrize("aggregator", [{"name": "multi_krum", "f": 1}, "geometric_median"], ids=str)
@pytest.mark.parametrize(("node", "phase"), [(0, "measure"), (3, "measure"), (1, "secure"), (2, "deliver")])
def test_a_node_that_dies_while_contributions_are_compared_is_replaced_and_all_end_alike(
    aggregator: Any, node: int, phase: str
):
    """A model of two parts: the measures of both, by two nodes, make the coefficients."""
    algorithm = {"name": "fedavg", "steps": 2, "aggregator": aggregator}
    task = {"name": "digits", "model": {"name": "mlp", "width": 5000}}
    ran = suffer(fault(node, 1, phase), algorithm=algorithm, task=task)
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert ran.rounds[0].payload_bytes == ran.planned_bytes(0)


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


EVERYTHING = [
    {"kind": "late_join", "node": 4, "round": 2},
    fault(1, 1, "train"),
    fault(2, 2, kind="hang"),
    fault(1, 4, "post"),
    fault(3, 4),
    fault(0, 5, kind="preempt"),
    fault(1, 6, "commit"),
    fault(4, 7, kind="preempt"),
]
"""A late join, a crash at several moments, flapping, a hang, and two that are told to leave."""


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm.synchronous], ids=lambda case: case.name)
@pytest.mark.parametrize("warm_spares", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_algorithm_lives_through_joins_leaves_crashes_hangs_and_flapping(case: Case, warm_spares: int):
    keys: dict[str, Any] = {
        "rounds": 11,
        "faults": {"events": EVERYTHING},
        "cluster": case.config.get("cluster", {})
        | {"nodes": {"target": 5}, "round_deadline_s": 2, "cancel_grace_s": 0.1, "warm_spares": warm_spares},
        "network": {"start_s": 0.02, "adopt_s": 0.001, "speeds": {2: 0.5}},
    }
    ran = case.run(**keys)
    assert ran.error is None
    assert len(ran.rounds) == 11
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 8, "lost": 5, "drained": 2}
    if case.algorithm.replicated:
        final = members(ran)[-1]
        assert len({ran.replicas[node].shared.digest() for node in final}) == 1
    again = case.run(**keys)
    assert again.digest == ran.digest
    assert again.events == ran.events


@pytest.mark.parametrize("case", [case for case in CASES if not case.algorithm.synchronous], ids=lambda case: case.name)
@pytest.mark.parametrize("victim", [1, 3])
def test_asynchronous_algorithms_live_through_joins_leaves_and_crashes(case: Case, victim: int):
    if case.name == "random_walk":
        pytest.skip("there is one token, and it is lost with its holder")
    events = [
        {"kind": "late_join", "node": 4, "round": 2},
        fault(victim, 1),
        fault(0, 2, "receive"),
        fault(2, 3, kind="preempt"),
        fault(victim, 5, kind="hang"),
    ]
    if case.algorithm.has_server:
        events.append({"kind": "kill", "node": "server", "round": 4, "phase": "receive"})
    keys: dict[str, Any] = {
        "rounds": 30,
        "faults": {"events": events},
        "cluster": {"nodes": {"target": 5}, "round_deadline_s": 2, "cancel_grace_s": 0.1, "drain_s": 1},
        "network": {"start_s": 0.02},
    }
    ran = case.run(**keys)
    assert ran.error is None
    assert ran.summary is not None
    assert ran.summary.rounds == 30
    assert ran.summary.nodes["lost"] == 3 + case.algorithm.has_server
    assert ran.summary.nodes["drained"] == 1
    again = case.run(**keys)
    assert again.digest == ran.digest
    assert again.events == ran.events


@pytest.mark.parametrize(("phase", "number", "latency"), [("receive", 1, 0), ("commit", 1, 0), ("commit", 2, 30)])
def test_a_worker_that_comes_back_while_the_server_is_away_waits_for_it(phase: str, number: int, latency: int):
    """It is up before the server is, or was about to be given the server's state: nobody else has that."""
    ran = attempt(
        {
            "algorithm": {"name": "fedbuff", "buffer_size": 2, "steps": 2},
            "task": "test_toy",
            "rounds": 12,
            "evaluation": {"every_rounds": 0},
            "network": {"step_ms": 10, "latency_ms": latency, "start_s": 0.05, "bandwidth_mbps": 1},
            "faults": {
                "events": [
                    {"kind": "kill", "node": "server", "round": 3, "phase": phase},
                    fault(1, number),
                    fault(2, number + 1),
                ]
            },
        },
        nodes=3,
    )
    assert ran.error is None
    assert ran.summary is not None
    assert (ran.summary.rounds, ran.summary.nodes["lost"], ran.summary.nodes["joined"]) == (12, 3, 3)


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


# --- leaving on notice ----------------------------------------------------------------------------------------------


def test_who_is_told_to_leave_finishes_the_round_and_hands_over_all_that_it_holds():
    ran = suffer(fault(2, 2, kind="preempt"), algorithm={"name": "scaffold", "steps": 2})
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 1, "lost": 0, "drained": 1}
    (notice,) = ran.sought("notice")
    assert (notice["round"], notice["node"], notice["left_s"]) == (2, 2, 30)
    assert members(ran)[2] == (0, 1, 2, 3)
    (left,) = ran.sought("left")
    assert left["kept_nbytes"] > 0
    transfers = [(one["node"], one["donor"]) for one in ran.sought("transfer")]
    # What it held itself, its control variate too; then, rounds having passed, what the others have committed since.
    assert transfers[0] == (2, 2)
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert ran.replicas[2].incarnation == 1


def test_a_successor_that_is_ready_misses_no_round_and_nobody_notices():
    calm = suffer(algorithm={"name": "scaffold", "steps": 2})
    network = {"start_s": 0.01, "step_ms": 10}
    ran = suffer(fault(2, 2, kind="preempt"), algorithm={"name": "scaffold", "steps": 2}, network=network)
    assert members(ran) == [(0, 1, 2, 3)] * 8
    assert [(one["node"], one["donor"]) for one in ran.sought("transfer")] == [(2, 2)]
    assert ran.digest == calm.digest


def test_who_cannot_finish_in_time_is_withdrawn_and_others_go_on():
    cluster = {"nodes": {"target": 4}, "drain_s": 1, "round_deadline_s": 100}
    ran = simulate(
        {"algorithm": {"name": "fedavg", "steps": 100}, "task": "digits", "network": {"step_ms": 50, "start_s": 2}},
        nodes=4,
        rounds=4,
        faults={"events": [fault(1, 1, kind="preempt")]},
        cluster=cluster,
    )
    (late,) = ran.sought("late")
    assert (late["node"], late["reason"]) == (1, "its time to leave is over")
    assert late["at_s"] - ran.sought("notice")[0]["at_s"] == pytest.approx(0.8)
    assert ran.sought("lost") == []
    assert members(ran) == [(0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]


def test_a_machine_that_is_gone_before_its_time_is_a_loss_like_any_other():
    ran = suffer(fault(1, 1, kind="preempt"), fault(1, 1, "post"))
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    assert members(ran)[-1] == (0, 1, 2, 3)


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_late_node_joins_with_the_others_state():
    ran = suffer({"kind": "late_join", "node": 3, "round": 2})
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 3, "joined": 1, "lost": 0, "drained": 0}
    assert members(ran)[0] == (0, 1, 2)
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert [one["node"] for one in ran.sought("transfer")] == [3]
    assert ran.replicas[3].incarnation == 0
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_a_warm_spare_takes_a_lost_nodes_place_within_two_rounds():
    network = {"start_s": 0.5, "adopt_s": 0.01, "step_ms": 10}
    cold, warm = (
        suffer(
            fault(2, 40),
            rounds=80,
            network=network,
            cluster={"warm_spares": spares},
        )
        for spares in (0, 1)
    )

    def missed(ran: Ran) -> int:
        return sum(2 not in committed for committed in members(ran))

    assert 0 < missed(warm) <= 2 < missed(cold)
    (recovered,) = [one for one in warm.sought("recovered") if one["node"] == 2]
    assert recovered["seconds"]["replace"] == pytest.approx(0.01)
    assert recovered["total_s"] <= 0.07


def test_transfers_take_time_and_bytes():
    network = {"start_s": 0.01, "step_ms": 10, "bandwidth_mbps": 100}
    ran = suffer(fault(2, 2), network=network)
    (transfer,) = ran.sought("transfer")
    assert transfer["seconds"] == pytest.approx(transfer["nbytes"] * 8 / 100e6, rel=0.01)


# --- replicas that differ -------------------------------------------------------------------------------------------


class Drifting(Program, name="test_drifting"):
    """Once some nodes' shared state differs."""

    odd_ones: tuple[int, ...] = (2,)

    def init(self, node: Node) -> None:
        node.shared["sum"] = torch.zeros(2)

    async def round(self, node: Node) -> None:
        mean = await AllReduce(torch.ones(2))
        total = node.shared["sum"] + mean.value
        node.shared["sum"] = total + (node.round == 1 and node.id in self.odd_ones and not node.incarnation)


def test_the_majority_heals_who_differs():
    ran = simulate(algorithm="test_drifting", nodes=4, rounds=5, on_divergence="heal")
    (diverged,) = ran.sought("diverged")
    assert (diverged["round"], diverged["groups"], diverged["healed"]) == (1, ((0, 1, 3), (2,)), True)
    assert members(ran) == [(0, 1, 2, 3), (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert [(one["node"], one["round"]) for one in ran.sought("transfer")] == [(2, 2)]
    assert [one.shared["sum"].tolist() for one in ran.replicas.values()] == [[5.0, 5.0]] * 4


def test_where_nobody_is_the_majority_the_run_stops():
    ran = attempt(algorithm={"name": "test_drifting", "odd_ones": (2, 3)}, nodes=4, rounds=5, on_divergence="heal")
    assert isinstance(ran.error, DivergedError)
    assert str(ran.error) == (
        "round 1: the shared state of replicas differs: nodes 0, 1 against nodes 2, 3; "
        "no majority of them agrees, so none can be healed"
    )


# --- conserved quantities -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "preempt"])
def test_scaffold_reaches_the_optimum_after_a_leave_and_a_rejoin(kind: str):
    """Its control variates add up to the shared one: what a lost node's was is taken out again."""
    config = {
        "algorithm": {"name": "scaffold", "steps": 5},
        "task": {"name": "quadratic", "condition": 4},
        "optimizer": {"name": "sgd", "lr": 0.1, "precision": "fp64"},
        "evaluation": {"every_rounds": 0},
        "network": {"start_s": 0.2},
    }
    ran = simulate(config, nodes=4, rounds=100, faults={"events": [fault(1, 20, kind=kind)]})
    assert ran.summary is not None
    assert ran.summary.nodes["joined"] == 1
    calm = simulate(config, nodes=4, rounds=100)
    assert torch.allclose(ran.parameters, calm.parameters, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "preempt"])
def test_gradient_tracking_reaches_the_optimum_after_a_leave_and_a_rejoin(kind: str):
    config = {
        "algorithm": {"name": "gradient_tracking"},
        "task": {
            "name": "quadratic",
            "dimension": 4,
            "condition": 2,
            "curvature_heterogeneity": 1.0,
            "samples_per_node": 1,
        },
        "optimizer": {"name": "sgd", "lr": 0.2, "precision": "fp64"},
        "evaluation": {"every_rounds": 0},
        "network": {"start_s": 0.1},
    }
    ran = simulate(config, nodes=4, rounds=300, faults={"events": [fault(1, 20, kind=kind)]})
    calm = simulate(config, nodes=4, rounds=300)
    assert ran.summary is not None
    assert ran.summary.nodes["joined"] == 1
    for node in range(4):
        assert torch.allclose(ran.replicas[node].parameters, calm.replicas[0].parameters, atol=1e-8)
