"""Transfers of state that fail, take too long, or lose their donor: no run ends for them while others can go on."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from starling.actors.data import Position
from starling.algorithms.api import Message, Node, Receive, Send
from starling.orchestrator.runtimes.events import NotLoaded
from starling.orchestrator.runtimes.simulator.states import SimulatedStates
from tests.control.test_membership import fault, members, suffer
from tests.toys import Program, attempt, simulate


class Talking(Program, name="test_talking"):
    """Asynchronous: each of two nodes waits for a message of the other."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    async def round(self, node: Node) -> None:
        await Send(1 - node.id, float(node.round))
        while not isinstance(await Receive(), Message):
            pass


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[tuple[int, int]]:
    """Let so many transfers fail though their donors live; return the list of all, as it grows."""
    asked: list[tuple[int, int]] = []
    really = SimulatedStates.transfer

    def transfer(self: SimulatedStates, joiner: int, donor: int, position: Position | None = None) -> None:
        asked.append((joiner, donor))
        if len(asked) <= times:
            self._clock.at(self._clock.now, joiner, NotLoaded(joiner, donor))
        else:
            really(self, joiner, donor, position)

    monkeypatch.setattr(SimulatedStates, "transfer", transfer)
    return asked


@pytest.mark.parametrize("who", ["donor", "joiner"])
@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_a_donor_or_joiner_that_dies_during_the_transfer(who: str, kind: str):
    network = {"start_s": 0.01, "step_ms": 10, "bandwidth_mbps": 40}
    (calm,) = suffer(fault(2, 1), network=network).sought("transfer")
    victim = calm["donor"] if who == "donor" else 2
    if kind == "hang" and who == "joiner":
        pytest.skip("a simulated node that has its state cannot hang before the round begins")
    ran = suffer(fault(2, 1), fault(victim, calm["round"], "transfer", kind=kind), network=network, rounds=14)
    assert members(ran)[-1] == (0, 1, 2, 3)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == 2
    if who == "donor" and kind == "kill":
        (second,) = [one for one in ran.sought("transfer") if one["node"] == 2]
        assert second["round"] == calm["round"]
        assert second["donor"] != calm["donor"]


def test_a_donor_that_is_there_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    """As where a transfer fails for the network's sake: the run ended, for want of a node that has the model."""
    asked = failing(monkeypatch, 2)
    ran = suffer(fault(1, 2), nodes=2)
    assert asked == [(1, 0)] * 3
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == 1
    assert ran.sought("transfer")[-1]["donor"] == 0


def test_it_is_asked_again_after_a_while_though_nothing_else_happens(monkeypatch: pytest.MonkeyPatch):
    """The other node waits for a message of the joiner: the run ended, as if all waited for one another."""
    failing(monkeypatch, 2)
    events = {"events": [fault(1, 2, "receive")]}
    ran = simulate(algorithm="test_talking", nodes=2, rounds=8, faults=events, network={"start_s": 0.01})
    (transfer,) = ran.sought("transfer")
    assert (transfer["donor"], transfer["seconds"]) == (0, 2.0)


def test_a_joiner_that_is_not_given_the_model_in_time_is_given_up_and_the_others_go_on():
    """The run ended, though enough nodes were ready; its own exchanges take as long as the transfer."""
    network = {"start_s": 0.01, "step_ms": 10, "bandwidth_mbps": 2}
    cluster = {"nodes": {"min": 3, "target": 4}, "min_nodes_timeout_s": 0.2, "round_deadline_s": 60}
    ran = suffer(fault(2, 1), network=network, cluster=cluster)
    assert members(ran)[2:] == [(0, 1, 3)] * 6
    reasons = [one["reason"] for one in ran.sought("lost")]
    assert reasons[1] == "it was not given the model within 0.2 s (cluster.min_nodes_timeout_s)"


def test_a_joiner_that_nobody_can_give_the_model_is_given_up_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, 10**9)
    ran = suffer(fault(1, 2), nodes=2, cluster={"nodes": {"min": 1, "target": 2}})
    assert members(ran)[2:] == [(0,)] * 6
    reasons = [one["reason"] for one in ran.sought("lost")]
    assert reasons[1] == "it could not be given the model: 3 transfers from each of nodes 0 failed"


def test_what_a_donors_process_could_not_give_its_successor_may(monkeypatch: pytest.MonkeyPatch):
    """Failures are those of a process: the third would have been one too many."""
    asked = failing(monkeypatch, 2)
    ran = suffer(fault(1, 2), nodes=3, cluster={"nodes": {"min": 3, "target": 3}})
    assert asked[:2] == [(1, 0), (1, 2)]
    assert members(ran)[-1] == (0, 1, 2)


def test_the_loss_of_the_only_donor_is_in_the_log():
    """That its transfer has failed may be known before: the run ended without a word of the death."""
    keys: dict[str, Any] = {"algorithm": "fedavg", "task": "digits", "network": {"start_s": 0.3, "step_ms": 100}}
    keys |= {"cluster": {"nodes": {"min": 1, "target": 2}}, "rounds": 9}
    (calm,) = attempt(faults={"events": [fault(0, 1)]}, **keys).sought("transfer")
    ran = attempt(faults={"events": [fault(0, 1), fault(1, calm["round"], "transfer")]}, **keys)
    assert str(ran.error) == f"round {calm['round']}: no node is left that has the model of round {calm['round'] - 1}"
    assert [one["node"] for one in ran.sought("lost")] == [0, 1]
