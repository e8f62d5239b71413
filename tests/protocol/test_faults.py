"""Scheduled faults, exactly: each event is due once, at its moment and for its node; and what bytes are booked as."""

from __future__ import annotations

from typing import Any

from starling.orchestrator.config.sections import FaultsConfig
from starling.orchestrator.protocol.byte_ledger import Ledger
from starling.orchestrator.protocol.faults import Faults


def faults(*events: dict[str, Any]) -> Faults:
    return Faults(FaultsConfig.model_validate({"events": list(events)}))


def kill(node: int, number: int, phase: str) -> dict[str, Any]:
    return {"kind": "kill", "node": node, "round": number, "phase": phase}


def test_an_event_is_due_once_at_its_moment():
    ours = faults(kill(1, 3, "post"), kill(2, 3, "post"), kill(1, 3, "commit"), kill(1, 4, "post"))
    assert not ours.due(2, "post", 1)
    assert not ours.due(3, "train", 1)
    assert not ours.due(3, "post", 0)
    assert [(one.who, one.round, one.phase) for one in ours.due(3, "post", 1)] == [(1, 3, "post")]
    assert not ours.due(3, "post", 1), "the round is tried again, and nobody is killed again"
    assert [one["node"] for one in ours.to_json()] == [2, 1, 1]
    assert [(one.who, one.phase) for one in ours.due(3, "commit")] == [(1, "commit")], "of all nodes at once"
    assert [one.who for one in ours.missed(3)] == [2]
    assert not ours.missed(3)
    assert ours.is_pending
    assert [one.who for one in ours.due(4, "post")] == [1]
    assert not ours.is_pending


def test_late_joins_are_those_of_a_round():
    late = [{"kind": "late_join", "node": node, "round": number} for node, number in ((2, 1), (3, 1), (4, 2))]
    ours = faults(kill(1, 1, "post"), *late)
    assert [one.who for one in ours.late_joins(1)] == [2, 3]
    assert not ours.late_joins(1)
    assert [one.who for one in ours.late_joins(2)] == [4]
    assert [one.who for one in ours.missed(1)] == [1]


def test_the_payload_is_what_peers_and_the_server_were_sent():
    ledger = Ledger()
    booked: Any = [("peer", 5), ("server", 100), ("peer", 7), ("recovery", 1000), ("evaluation", 3), ("server", 200)]
    for kind, nbytes in booked:
        ledger.book(kind, nbytes)
    assert [ledger[kind] for kind in ("peer", "server", "recovery", "evaluation")] == [12, 300, 1000, 3]
    assert ledger.payload == 312
    again = Ledger()
    again.restore(ledger.to_json())
    again.book("peer", 1)
    assert (again.payload, again["recovery"]) == (313, 1000)
