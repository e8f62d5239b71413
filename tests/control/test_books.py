"""The parts of the control loop that keep books, each by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from starling.algorithms.api import SERVER
from starling.orchestrator.control.compute_watch import ComputeWatch
from starling.orchestrator.control.departures import Departures
from starling.orchestrator.control.holdings import Holdings
from starling.orchestrator.control.node_rounds import NodeRounds
from starling.orchestrator.control.roster import Residuals
from starling.orchestrator.control.round_records import Cost
from starling.orchestrator.errors import RunError


class Run:
    """As much of a run as these parts ask for."""

    def __init__(self) -> None:
        self.runtime = SimpleNamespace(now=0.0, retire=self._retire)
        self.config = SimpleNamespace(cluster=SimpleNamespace(round_deadline_s=2.0))
        self.retired: list[tuple[list[int], set[int]]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _retire(self, nodes: list[int], empty: set[int]) -> None:
        self.retired.append((nodes, empty))

    def record(self, what: str, **facts: Any) -> None:
        self.events.append((what, facts))


def test_what_a_node_left_is_kept_until_its_successor_has_committed():
    holdings = Holdings()
    assert holdings.committed(3, [0, 1]) == []
    holdings.left(1)
    holdings.gone(1)
    assert (holdings.keeps(3), holdings.keeps(2), holdings.keeps(None)) == (True, False, True)
    assert not holdings.keeps(3, other_than=1)
    holdings.new.add(1)  # its successor
    assert holdings.to_save([0, 1]) == [0, 1]
    assert holdings.kept_alone(down=[]) == {1}
    holdings.left(1)  # before it has got anything: what its predecessor left stays
    assert holdings.kept == {1: 3}
    holdings.restored(1)
    assert holdings.kept_alone(down=[]) == set()
    assert holdings.committed(4, [0, 1]) == [1]
    assert holdings.to_save([0]) == [0]


def test_a_node_that_was_given_state_lacks_a_round_when_others_commit():
    holdings = Holdings()
    holdings.new.add(2)
    holdings.given(2, 5)
    holdings.committed(6, [0])
    assert holdings.loaded == set()
    again = Holdings()
    again.restore(holdings.to_json())
    again.left(2)
    assert again.kept == {}, "it has committed nothing itself"


def test_a_node_is_withdrawn_with_a_fifth_of_its_time_left():
    run, holdings = Run(), Holdings()
    departures = Departures(run.runtime, holdings)  # type: ignore[arg-type]
    departures.noticed(1, 10.0)
    holdings.new.add(2)
    departures.noticed(2, 20.0)
    assert departures.next_withdrawal() == 8.0
    run.runtime.now = 7.9
    assert departures.withdraw() == []
    run.runtime.now = 16.0
    assert [departures.withdraw(), departures.withdraw(), departures.withdraw()] == [[1], [2], []]
    departures.stands_still(1)
    departures.retire([1, 2])
    assert run.retired == [([1], set()), ([2], {2})]
    assert departures.handing_over == {1}
    again = Departures(run.runtime, holdings)  # type: ignore[arg-type]
    again.restore(departures.to_json())
    again.gone(1)
    assert (again.leaving.keys(), again.is_retiring, again.handing_over) == ({2}, True, set())


def test_views_count_changes_from_the_last_one_that_a_node_saw():
    nodes = NodeRounds([SERVER, 0, 1], has_server=True)
    first = nodes.view_of(0)
    assert (first.number, first.members, first.joined) == (0, (0, 1), (0, 1))
    assert nodes.see(0, first) is None
    assert nodes.gone(1)
    assert not nodes.gone(SERVER)
    assert nodes.donors == ()
    nodes.numbers[2] = 0
    nodes.enter(2)
    changed = nodes.view_of(0)
    assert (changed.number, changed.joined, changed.left) == (2, (2,), (1,))
    nodes.enter(SERVER, 4)
    assert (nodes.donors, nodes.needs_state(2), nodes.last_of([SERVER])) == ((SERVER,), True, {SERVER: 3})
    again = NodeRounds([], has_server=True)
    again.restore(nodes.to_json(), {SERVER, 0})
    assert again.view_of(0).number == 3, "another node has not come back"


def test_a_node_may_be_late_ten_times_while_the_run_stands_still():
    run = Run()
    watch = ComputeWatch(run)  # type: ignore[arg-type]
    watch.computes(0, 1.0)
    watch.computes(1, 0.0)
    watch.rests(1)
    assert watch.next_due() == 3.0
    assert watch.late({0: 4}, committed=7) == []
    run.runtime.now = 3.0
    for committed in [7] * 9 + [8] * 9:  # progress of others counts
        assert watch.late({0: 4}, committed) == [0]
    assert run.events[-1] == ("late", {"node": 0, "round": 4, "reason": "it has not been heard of"})
    with pytest.raises(RunError, match=r"^node 0 cannot finish its round 4: .* tried 10 times"):
        watch.late({0: 4}, 8)
    watch.committed(0)
    assert (watch.any_computes, watch.next_due()) == (False, None)


def test_a_lost_residual_is_told_once():
    run = Run()
    residuals = Residuals(run)  # type: ignore[arg-type]
    assert residuals.to_json() is None
    residuals.committed({0: SimpleNamespace(unsent=3.0), 1: SimpleNamespace(unsent=4.0)})  # type: ignore[dict-item]
    residuals.forfeit(5, 0)
    residuals.forfeit(6, 1)
    residuals.forfeit(7, 1)
    assert residuals.totals == {"residuals": 2, "residual_norm": 5.0}
    assert (residuals.untold(), residuals.untold()) == ([3.0, 4.0], [])
    again = Residuals(run)  # type: ignore[arg-type]
    again.restore(residuals.to_json())
    assert (again.exist, again.untold(), again.lost) == (True, [], [3.0, 4.0])


def test_costs_are_differences():
    assert Cost(5.0, 30, 7).since(Cost(2.0, 10, 7)) == Cost(3.0, 20, 0)
