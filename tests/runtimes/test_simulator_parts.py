"""The parts of the simulator one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from starling.actors.host.round_order import RoundOrder
from starling.algorithms.api import View
from starling.orchestrator.config.schema import parse
from starling.orchestrator.protocol.mailboxes import Envelope
from starling.orchestrator.runtimes.events import Arrived, Died, Halted, Loaded, Notice, NotLoaded, Retired, Up
from starling.orchestrator.runtimes.simulator.clock import VirtualClock
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from starling.orchestrator.runtimes.simulator.state import End


def started(**keys: Any) -> Simulator:
    network = {"start_s": 10, "adopt_s": 1, "latency_ms": 500} | keys.pop("network", {})
    base: dict[str, Any] = {"algorithm": "fedavg", "task": "quadratic", "tracking": "none", "network": network}
    simulator = Simulator(parse(base | {"cluster": {"nodes": {"target": 3}, "cancel_grace_s": 2, "drain_s": 5}} | keys))
    simulator.start()
    return simulator


def at(simulator: Simulator, until: float) -> list[Any]:
    """What has happened by a moment."""
    found: list[Any] = []
    while (happening := simulator.next(until)) is not None:
        found.append(happening)
    return found


# --- the clock --------------------------------------------------------------------------------------------------------


def test_what_is_due_at_one_moment_comes_by_node_and_then_in_the_order_in_which_it_was_scheduled():
    clock = VirtualClock()
    clock.at(2.0, 1, Halted(1))
    clock.at(1.0, 2, Halted(2))
    clock.at(1.0, 0, Halted(0))
    clock.at(1.0, 0, End(0, None))
    due = clock.advance(5.0)
    assert due is not None
    assert [item[2] for item in due] == [Halted(0), End(0, None), Halted(2)]
    assert clock.now == 1.0
    assert clock.advance(1.5) is None
    assert clock.now == 1.5


def test_a_clock_without_anything_to_come_does_not_wait_for_ever():
    with pytest.raises(AssertionError, match="nothing is on its way"):
        VirtualClock().advance(math.inf)


def test_a_resumption_carries_the_attempt_in_which_it_was_scheduled():
    clock = VirtualClock()
    clock.interrupt(4)
    clock.resume_at(1.0, 4, "result")
    clock.interrupt(4)
    ((node, _, what, attempt, result, seq),) = clock.advance(1.0) or []
    assert (node, what, attempt, result, seq) == (4, None, 1, "result", None)
    assert clock.attempts == {4: 2}


def test_a_clock_is_brought_back_without_what_belongs_to_a_round():
    clock = VirtualClock()
    clock.attempts[1] = 0
    clock.at(3.0, 1, Died(1, "gone"))
    clock.at(2.0, 0, Loaded(0, 1, 5))
    clock.resume_at(1.0, 1)
    clock.ready.append(Retired(2, 7))
    clock.at(2.5, 1, Arrived(Envelope(0, 3, 0, 4, 8, 17, 0)))  # its receiver has left: no mailbox has it
    again = VirtualClock()
    again.bring_back(clock.to_json(), {})
    assert list(again.ready) == [Retired(2, 7)]
    assert [item[2] for item in again.advance(9.0) or []] == [Died(1, "gone")]
    assert again.now == 3.0


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_spare_is_sooner_there_than_a_new_process():
    simulator = started()
    simulator.processes.stand_by(1)
    at(simulator, 20.0)
    simulator.processes.kill(0)
    simulator.processes.kill(1)
    assert [one.node for one in at(simulator, 20.0)] == [0, 1]
    simulator.processes.launch([0, 1])
    assert simulator.processes.num_spares == 0
    (first,) = at(simulator, 21.0)
    (second,) = at(simulator, 30.0)
    assert isinstance(first, Up)
    assert isinstance(second, Up)
    assert (first.facts.node, second.facts.node) == (0, 1)


def test_a_successor_waits_until_the_one_before_has_left():
    simulator = started()
    before = simulator.host.replicas[1]
    simulator.processes.launch([1])
    assert [type(one) for one in at(simulator, 10.0)] == [Up]
    assert simulator.host.replicas[1] is before
    simulator.retire([1])
    assert [type(one) for one in at(simulator, 10.0)] == [Retired]
    assert simulator.host.replicas[1] is not before
    assert simulator.host.replicas[1].incarnation == 1


def test_a_notice_ends_the_process_of_then_and_no_later_one():
    simulator = started()
    simulator.processes.preempt(1)
    assert at(simulator, 0.0) == [Notice(1, 5.0, "it was preempted (faults.events)")]
    simulator.processes.kill(1)
    at(simulator, 0.0)
    simulator.processes.embody_again(1)
    assert at(simulator, 9.0) == [], "another process is there at 5 s"
    simulator.processes.preempt(2)
    assert [type(one) for one in at(simulator, 14.0)] == [Notice, Died]


def test_who_hangs_is_ended_when_it_is_probed_or_halted():
    simulator = started()
    for node in (0, 1):
        simulator.processes.hang(node)
    assert at(simulator, 9.0) == []
    simulator.processes.probe([0, 2])
    simulator.programs.halt([1, 2])
    assert at(simulator, 9.0) == [Halted(2)]
    reason = "it did not stop within 2 s (cluster.cancel_grace_s)"
    assert at(simulator, 11.0) == [Died(0, reason), Died(1, reason)]


# --- states -----------------------------------------------------------------------------------------------------------


def test_state_arrives_when_the_network_has_brought_it():
    simulator = started()
    simulator.host.replicas[0].committed_round = 0  # else it has nothing to give
    simulator.states.transfer(1, 0)
    assert at(simulator, 0.4) == []
    (loaded,) = at(simulator, 0.6)
    assert isinstance(loaded, Loaded)
    assert (loaded.node, loaded.source) == (1, 0)


def test_state_of_a_donor_that_is_gone_meanwhile_does_not_arrive():
    simulator = started()
    simulator.host.replicas[0].committed_round = 0  # else it has nothing to give
    simulator.states.transfer(1, 0)
    simulator.processes.kill(0)
    assert [type(one) for one in at(simulator, 9.0)] == [Died, NotLoaded]


def test_what_was_kept_of_a_node_is_there_until_it_is_released():
    simulator = started()
    simulator.retire([1, 2], empty=[2])
    (kept, empty) = at(simulator, 0.0)
    assert kept.nbytes > 0
    assert empty == Retired(2, 0)
    assert [node for node, _ in simulator.states.snapshot([0, 1, 2], None)] == [0, 1]
    assert not simulator.states.restore(2)
    simulator.processes.embody_again(1)
    assert simulator.states.restore(1)
    simulator.states.release(1)
    assert not simulator.states.restore(1)


# --- programs ---------------------------------------------------------------------------------------------------------


def test_what_was_to_happen_to_a_program_is_void_once_it_is_halted():
    simulator = started(network={"step_ms": 1000})
    view = View(0, (0, 1, 2))
    simulator.programs.begin(RoundOrder(0, 0, view, -1), (0, 1, 2))
    assert at(simulator, 0.5) == [], "all of them train"
    simulator.programs.halt([0, 1, 2])
    assert at(simulator, 99.0) == [Halted(node) for node in range(3)]


# --- standing ---------------------------------------------------------------------------------------------------------


def test_processes_are_brought_back_as_they_were_and_at_the_same_moment():
    simulator = started()
    simulator.processes.stand_by(2)
    simulator.processes.hang(2)
    simulator.processes.probe([2])
    simulator.processes.kill(1)
    at(simulator, 0.0)
    simulator.processes.launch([1])
    saved = dict(simulator.states.snapshot([0], None))
    form = simulator.standing.to_json()

    again = started()
    at(again, 0.0)
    again.standing.bring_back(form, saved, (), (), ())
    assert again.standing.to_json() == form
    for one in (simulator, again):
        assert [type(happening) for happening in at(one, 30.0)] == [Died, Up]
        assert one.processes.num_spares == 1
