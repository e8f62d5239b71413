"""The rendezvous, row by row: which event in which state leads to which decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from starling.actors.wire.buffers import Signature, TensorSpec
from starling.actors.wire.tickets import Measured, Posted, Returned, Secured, Waiting
from starling.algorithms.closing import ClosePolicy
from starling.orchestrator.protocol.events import (
    Abort,
    Advance,
    Cancel,
    Close,
    Commit,
    Deadline,
    Deliver,
    Delivered,
    Diverged,
    GiveUp,
    Lost,
    Measure,
    Posts,
    ProgramsDiverge,
    Reached,
    Returns,
    Secure,
)
from starling.orchestrator.protocol.exchange import Exchange, Phase
from starling.orchestrator.protocol.rendezvous import Rendezvous
from tests.tickets import post, returned, waits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starling.orchestrator.protocol.events import Decision, Event

REDUCE = Signature("AllReduce", "mean", (TensorSpec("", torch.float32, (10,)),))
GATHER = Signature("AllGather", "quorum", None)


def silent(signature: Signature) -> Signature:
    """The signature of a member that contributes nothing."""
    return Signature(signature.operation, signature.parts, None)


def inline(node: int, seq: int = 0, *, nbytes: int = 40, signature: Signature = REDUCE, **keys: Any) -> Reached:
    return post(node, seq, signature, part_nbytes=(nbytes,), result_nbytes=(nbytes,), inline=True, **keys)


def large(
    node: int, seq: int = 0, sizes: tuple[int, ...] = (400, 400), results: tuple[int, ...] | None = None, **keys: Any
) -> Reached:
    return post(node, seq, REDUCE, part_nbytes=sizes, result_nbytes=sizes if results is None else results, **keys)


def gather(node: int, seq: int = 0, nbytes: int = 100_000, **keys: Any) -> Reached:
    return post(node, seq, GATHER, part_nbytes=(nbytes,), **keys)


def nothing(node: int, seq: int = 0, signature: Signature = REDUCE, **keys: Any) -> Reached:
    return post(node, seq, silent(signature), contributes=False, **keys)


@dataclass
class Meeting:
    """A rendezvous, and all that it decided."""

    nodes: int | tuple[int, ...] = 4
    need: int = 2
    replicated: bool = True
    began: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        members = range(self.nodes) if isinstance(self.nodes, int) else self.nodes
        self.machine = Rendezvous(tuple(members), self.need, replicated=self.replicated, began=self.began)

    def tell(self, *events: Event, at: float = 0.0) -> list[Decision]:
        """What the events lead to, besides closed exchanges being told as such."""
        decisions = [decision for event in events for decision in self.machine.handle(event, at)]
        self.decisions += decisions
        return [decision for decision in decisions if not isinstance(decision, Close)]

    def secure(self, requests: Iterable[Decision], got: Iterable[int] | None = None) -> list[Decision]:
        """Answer requests, with all that was asked for or with ``got``."""
        answers = [
            Secured(one.seq, one.part, one.by, frozenset(one.members if got is None else got), one.generation)
            for one in requests
            if isinstance(one, Secure)
        ]
        return self.tell(*answers)

    def measure(self, requests: Iterable[Decision], got: Iterable[int] | None = None) -> list[Decision]:
        """Answer requests for measures of 8 bytes, with all that was asked for or with ``got``."""
        answers = [
            Measured(
                one.seq,
                one.part,
                one.by,
                frozenset(one.members if got is None else got),
                one.generation,
                np.full(8, one.part, dtype=np.uint8),
            )
            for one in requests
            if isinstance(one, Measure)
        ]
        return self.tell(*answers)

    def deliver(self, decision: Decision, *nodes: int) -> list[Decision]:
        assert isinstance(decision, Deliver)
        receivers = nodes or decision.nodes
        return self.tell(*(Delivered(decision.seq, node, decision.generation) for node in receivers))

    def end(self, num_collectives: int = 1, digest: str = "d") -> list[Decision]:
        """All that are active return."""
        return self.tell(*(returned(node, num_collectives, digest) for node in sorted(self.machine.active)))

    @property
    def phase(self) -> Phase:
        return self.machine.exchanges[0].phase

    @property
    def nbytes(self) -> int:
        return self.machine.payload_nbytes


def posted(meeting: Meeting, *, but: Iterable[int] = ()) -> list[Decision]:
    """Everybody posts a large contribution, except some."""
    return meeting.tell(*(large(node) for node in meeting.machine.view if node not in but))


# --- an exchange's way ----------------------------------------------------------------------------------------------


def test_large_contributions_are_secured_delivered_and_advanced():
    meeting = Meeting()
    assert posted(meeting, but=[3]) == []
    requests = meeting.tell(large(3))
    assert requests == [Secure(0, 0, 0, (0, 1, 2, 3), 1), Secure(0, 1, 1, (0, 1, 2, 3), 1)]
    assert meeting.secure(requests[:1]) == []
    assert meeting.phase is Phase.SECURING
    (deliver,) = meeting.secure(requests[1:])
    assert deliver == Deliver(0, (0, 1, 2, 3), (0, 1, 2, 3), (0, 1), 1)
    assert meeting.deliver(deliver, 0, 1, 2) == []
    assert meeting.phase is Phase.DELIVERING
    assert meeting.deliver(deliver, 3) == [Advance(0, (0, 1, 2, 3), (0, 1, 2, 3), inline=False)]
    assert meeting.phase is Phase.CLOSED
    assert meeting.end() == [Commit((0, 1, 2, 3))]


def test_inline_contributions_close_at_once():
    meeting = Meeting()
    assert meeting.tell(inline(2), inline(0), inline(3)) == []
    assert meeting.tell(inline(1)) == [Advance(0, (0, 1, 2, 3), (0, 1, 2, 3), inline=True)]
    assert meeting.phase is Phase.CLOSED


def test_one_large_payload_of_a_gather_makes_all_of_them_travel():
    meeting = Meeting(3)
    small = inline(1, nbytes=8, signature=GATHER)
    requests = meeting.tell(gather(0), small, gather(2, nbytes=70_000))
    assert requests == [Secure(0, 0, node, (0, 1, 2), 1) for node in range(3)]


def test_gather_is_secured_by_everybody_and_nothing_is_made():
    meeting = Meeting(3)
    requests = meeting.tell(*(gather(node) for node in range(3)))
    (deliver,) = meeting.secure(requests)
    assert deliver == Deliver(0, (0, 1, 2), (0, 1, 2), (), 1)
    assert meeting.deliver(deliver) == [Advance(0, (0, 1, 2), (0, 1, 2), inline=False)]


def test_what_any_member_could_not_get_leaves_a_gather_for_all():
    meeting = Meeting(4, need=2)
    requests = meeting.tell(*(gather(node) for node in range(4)))
    meeting.secure(requests[:3])
    cancel, deliver = meeting.secure(requests[3:], got=[0, 1, 3])
    assert isinstance(cancel, Cancel)
    assert cancel.node == 2
    assert deliver == Deliver(0, (0, 1, 3), (0, 1, 3), (), 1)


def test_a_single_member_meets_itself():
    meeting = Meeting(1, need=1)
    (request,) = meeting.tell(large(0, sizes=(400,)))
    (deliver,) = meeting.secure([request])
    assert meeting.deliver(deliver) == [Advance(0, (0,), (0,), inline=False)]
    assert meeting.nbytes == 0
    assert meeting.end() == [Commit((0,))]


def test_members_are_in_order_whatever_the_order_of_arrival():
    meeting = Meeting((7, 3, 11), need=1)
    (advance,) = meeting.tell(inline(11), inline(3), inline(7))
    assert advance == Advance(0, (3, 7, 11), (3, 7, 11), inline=True)


def test_two_exchanges_are_open_at_the_same_time():
    meeting = Meeting(2, need=1)
    assert meeting.tell(large(0, 0, waits=False), large(0, 1), large(1, 0, waits=False)) == [
        Secure(0, 0, 0, (0, 1), 1),
        Secure(0, 1, 1, (0, 1), 1),
    ]
    requests = meeting.tell(large(1, 1))
    assert {one.seq for one in requests if isinstance(one, Secure)} == {1}
    (deliver,) = meeting.secure(requests)
    assert meeting.deliver(deliver) == [Advance(1, (0, 1), (0, 1), inline=False)]
    assert meeting.phase is Phase.SECURING


# --- contributions of None ------------------------------------------------------------------------------------------


def test_none_receives_and_counts_for_need():
    meeting = Meeting(4, need=4)
    requests = meeting.tell(nothing(0), large(1), nothing(2), large(3))
    # Contributors make the parts: each has its own share already.
    assert requests == [Secure(0, 0, 1, (1, 3), 1), Secure(0, 1, 3, (1, 3), 1)]
    (deliver,) = meeting.secure(requests)
    assert deliver == Deliver(0, (0, 1, 2, 3), (1, 3), (1, 3), 1)
    assert meeting.deliver(deliver) == [Advance(0, (0, 1, 2, 3), (1, 3), inline=False)]
    assert meeting.end() == [Commit((0, 1, 2, 3))]


def test_none_fixes_no_shape_and_violates_none():
    other = Signature("AllReduce", "mean", (TensorSpec("", torch.float32, (11,)),))
    meeting = Meeting(4)
    assert meeting.tell(nothing(0), inline(1), nothing(2)) == []
    (diverge,) = meeting.tell(inline(3, signature=other))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.seq, diverge.first, diverge.second) == (0, 1, 3)
    assert "[10]" in diverge.message
    assert "[11]" in diverge.message


def test_none_must_still_be_the_same_operation():
    meeting = Meeting(2)
    (diverge,) = meeting.tell(nothing(0), gather(1))
    assert isinstance(diverge, ProgramsDiverge)


def test_nobody_contributes():
    meeting = Meeting(2)
    (abort,) = meeting.tell(nothing(0), nothing(1))
    assert isinstance(abort, Abort)
    assert "nobody contributes" in abort.reason


# --- Start and Wait -------------------------------------------------------------------------------------------------


def test_who_waits_later_is_advanced_later():
    meeting = Meeting(3)
    assert meeting.tell(inline(0, waits=False), inline(1), inline(2, waits=False)) == [
        Advance(0, (1,), (0, 1, 2), inline=True)
    ]
    assert meeting.tell(waits(2, 0)) == [Advance(0, (2,), (0, 1, 2), inline=True)]
    assert meeting.tell(waits(0, 0)) == [Advance(0, (0,), (0, 1, 2), inline=True)]


def test_waiting_before_the_close():
    meeting = Meeting(2)
    assert meeting.tell(inline(0, waits=False), waits(0, 0)) == []
    assert meeting.tell(inline(1)) == [Advance(0, (0, 1), (0, 1), inline=True)]


def test_waiting_before_ones_own_announcement():
    meeting = Meeting(2)
    # The program is at its Wait while the contribution is still being put into the store.
    assert meeting.tell(waits(0, 0), inline(1, waits=False)) == []
    assert meeting.tell(inline(0, waits=False)) == [Advance(0, (0,), (0, 1), inline=True)]


def test_a_commit_waits_for_exchanges_that_nobody_waits_for():
    meeting = Meeting(2)
    requests = meeting.tell(large(0, waits=False), large(1, waits=False))
    assert meeting.end() == []
    (deliver,) = meeting.secure(requests)
    assert meeting.deliver(deliver) == [Commit((0, 1))]


# --- losses ---------------------------------------------------------------------------------------------------------


def test_lost_while_open_drops_the_post_and_closes():
    meeting = Meeting(4)
    meeting.tell(large(0), large(1), large(2))
    requests = meeting.tell(Lost(3))
    assert [one for one in requests if isinstance(one, GiveUp)] == []
    assert {one.members for one in requests if isinstance(one, Secure)} == {(0, 1, 2)}
    meeting = Meeting(4)
    meeting.tell(inline(0), inline(1), inline(2), Lost(1))
    assert meeting.tell(inline(3)) == [Advance(0, (0, 2, 3), (0, 2, 3), inline=True)]


def test_lost_reducer_is_replaced_in_cyclic_order_and_contributions_stay():
    meeting = Meeting(4)
    requests = meeting.tell(*(large(node, sizes=(1, 1, 1, 1)) for node in range(4)))
    meeting.secure(requests[:1])
    assert meeting.tell(Lost(1)) == [GiveUp(1), Secure(0, 1, 2, (0, 1, 2, 3), 1)]
    assert meeting.tell(Lost(3)) == [GiveUp(3), Secure(0, 3, 0, (0, 1, 2, 3), 1)]
    # What a lost reducer answered on its last breath comes too late: its part is another's now.
    assert meeting.secure(requests[1:2]) == []
    assert 1 not in meeting.machine.exchanges[0].secured
    assert meeting.secure([Secure(0, 1, 2, (0, 1, 2, 3), 1), requests[2]]) == []
    (deliver,) = meeting.secure([Secure(0, 3, 0, (0, 1, 2, 3), 1)])
    assert deliver == Deliver(0, (0, 2), (0, 1, 2, 3), (0, 2, 2, 0), 1)
    assert meeting.deliver(deliver) == [Advance(0, (0, 2), (0, 1, 2, 3), inline=False)]
    assert meeting.end() == [Commit((0, 2))]


def test_lost_reducer_of_a_finished_part_stays_its_maker():
    meeting = Meeting(4)
    requests = posted(meeting)
    meeting.secure(requests[:1])
    assert meeting.tell(Lost(0)) == [GiveUp(0)]
    (deliver,) = meeting.secure(requests[1:])
    assert deliver == Deliver(0, (1, 2, 3), (0, 1, 2, 3), (0, 1), 1)


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(meeting: Meeting, sizes: tuple[int, ...] = (400, 400)) -> list[Decision]:
    """Everybody posts to an exchange whose aggregator measures."""
    return meeting.tell(*(large(node, sizes=sizes, measures=True) for node in meeting.machine.view))


def shown(decisions: Iterable[Decision]) -> list[tuple[str, int, int, tuple[int, ...], set[int]]]:
    """Requests: the step, the part, whose it is, of which contributions, and which of them are there."""
    requests = [one for one in decisions if isinstance(one, Measure | Secure)]
    return [(type(one).__name__, one.part, one.by, one.members, set(one.held)) for one in requests]


def test_contributions_are_measured_before_they_are_secured():
    meeting = Meeting()
    everybody = (0, 1, 2, 3)
    requests = measured(meeting)
    assert requests == [Measure(0, 0, 0, everybody, 1), Measure(0, 1, 1, everybody, 1)]
    assert meeting.phase is Phase.MEASURING
    assert meeting.machine.is_waited_for
    assert meeting.measure(requests[1:]) == []
    secures = meeting.measure(requests[:1])
    assert shown(secures) == [("Secure", 0, 0, everybody, {0, 1, 2, 3}), ("Secure", 1, 1, everybody, {0, 1, 2, 3})]
    for one in secures:
        assert isinstance(one, Secure)
        assert [measure.part for measure in one.measured] == [0, 1], "of all parts, in their order"
    # Three contributions to each part; with the parts each maker has the other's measure.
    assert meeting.nbytes == 2 * 3 * 400
    (deliver,) = meeting.secure(secures)
    assert meeting.nbytes == 2 * 3 * 400 + 2 * 8
    assert meeting.deliver(deliver) == [Advance(0, everybody, everybody, inline=False)]
    assert meeting.nbytes == 2 * 2 * 3 * 400 + 2 * 8
    assert meeting.end() == [Commit(everybody)]


def test_a_maker_that_is_lost_while_it_measures_is_replaced_and_contributions_stay():
    meeting = Meeting()
    requests = measured(meeting)
    meeting.measure(requests[:1])
    give_up, again = meeting.tell(Lost(1))
    assert give_up == GiveUp(1)
    assert shown([again]) == [("Measure", 1, 2, (0, 1, 2, 3), set())]
    assert meeting.measure(requests[1:]) == [], "its last breath comes too late"
    secures = meeting.measure([again])
    # Who has measured a part makes it, though another maker would be the first in the order.
    assert shown(secures) == [
        ("Secure", 0, 0, (0, 1, 2, 3), {0, 1, 2, 3}),
        ("Secure", 1, 2, (0, 1, 2, 3), {0, 1, 2, 3}),
    ]


def test_a_maker_that_is_lost_after_it_has_measured_is_replaced_by_who_fetches_anew():
    meeting = Meeting()
    secures = meeting.measure(measured(meeting))
    before = meeting.nbytes
    _, again = meeting.tell(Lost(1))
    assert shown([again]) == [("Secure", 1, 2, (0, 1, 2, 3), set())]
    assert isinstance(again, Secure)
    assert [one.by for one in again.measured] == [0, 1], "what was measured is of all, and stays"
    (deliver,) = meeting.secure([secures[0], again])
    assert isinstance(deliver, Deliver)
    assert deliver.closed == (0, 1, 2, 3)
    assert meeting.nbytes == before + 3 * 400 + 8 + 2 * 8


def test_parts_of_different_sets_are_measured_again():
    meeting = Meeting()
    requests = measured(meeting)
    meeting.tell(Lost(3))
    assert meeting.measure(requests[:1]) == []
    again = meeting.measure(requests[1:], got=[0, 1, 2])
    assert shown(again) == [("Measure", 0, 0, (0, 1, 2), {0, 1, 2, 3})]
    assert meeting.measure(requests[:1]) == [], "an answer to the older request"
    assert [one[3] for one in shown(meeting.measure(again))] == [(0, 1, 2), (0, 1, 2)]


def test_what_is_left_is_measured_again_if_a_contribution_is_lost_after_it_was_measured():
    """Its coefficients would be those of contributions that are no longer in."""
    meeting = Meeting()
    secures = meeting.measure(measured(meeting))
    meeting.tell(Lost(3))
    meeting.secure(secures[:1])
    again = meeting.secure(secures[1:], got=[0, 1, 2])
    assert shown(again) == [("Measure", part, part, (0, 1, 2), {0, 1, 2, 3}) for part in (0, 1)]
    assert meeting.phase is Phase.MEASURING
    last = meeting.measure(again)
    assert [one[:2] for one in shown(last)] == [("Secure", 0), ("Secure", 1)]
    (deliver,) = meeting.secure(last)
    assert isinstance(deliver, Deliver)
    assert deliver.closed == (0, 1, 2)


def test_who_owes_a_measure_from_one_deadline_to_the_next_is_left_behind():
    meeting = Meeting()
    requests = measured(meeting)
    meeting.measure(requests[:1])
    assert meeting.tell(Deadline()) == []
    cancel, again = meeting.tell(Deadline())
    assert cancel == Cancel(1, "it had not answered in exchange 0")
    assert shown([again]) == [("Measure", 1, 2, (0, 1, 2, 3), set())]


def test_too_few_to_measure_begin_again():
    meeting = Meeting(3, need=1)
    requests = meeting.tell(*(large(node, measures=True, least=3) for node in range(3)))
    meeting.tell(Lost(2))
    meeting.measure(requests[:1])
    (abort,) = meeting.measure(requests[1:], got=[0, 1])
    assert abort == Abort("exchange 0 has 2 contributions, and its aggregator needs 3", 3)


def test_a_delivered_part_that_is_missing_is_made_again_with_the_same_measures():
    meeting = Meeting()
    secures = meeting.measure(measured(meeting))
    (deliver,) = meeting.secure(secures)
    assert isinstance(deliver, Deliver)
    again = meeting.tell(Lost(1), Delivered(0, 0, deliver.generation, frozenset({1})))
    assert shown(again) == [("Secure", 1, 2, (0, 1, 2, 3), set())]


# --- again ----------------------------------------------------------------------------------------------------------


def test_parts_of_another_set_are_made_again_with_the_smaller_one():
    meeting = Meeting(4)
    requests = posted(meeting)
    meeting.tell(Lost(3))
    meeting.secure(requests[:1])
    # The second reducer came too late for node 3's contribution: the first part is made again without it.
    again = meeting.secure(requests[1:], got=[0, 1, 2])
    assert again == [Secure(0, 0, 0, (0, 1, 2), 2)]
    (deliver,) = meeting.secure(again)
    assert deliver == Deliver(0, (0, 1, 2), (0, 1, 2), (0, 1), 2)


def test_closed_is_the_intersection_and_may_be_smaller_than_what_any_part_got():
    meeting = Meeting(5, need=1)
    requests = meeting.tell(*(large(node, sizes=(1, 1, 1)) for node in range(5)))
    meeting.tell(Lost(4))
    meeting.secure(requests[:1], got=[0, 1, 2, 3])
    meeting.secure(requests[1:2], got=[0, 1, 2, 4])
    again = meeting.secure(requests[2:], got=[0, 1, 2])
    assert again == [Secure(0, 0, 0, (0, 1, 2), 2), Secure(0, 1, 1, (0, 1, 2), 2)]
    decisions = meeting.secure(again)
    assert decisions[:1] == [Cancel(3, "nobody could fetch what it contributed to exchange 0")]
    assert decisions[1:] == [Deliver(0, (0, 1, 2), (0, 1, 2), (0, 1, 2), 2)]


def test_answers_to_an_older_request_are_dropped():
    meeting = Meeting(4)
    requests = posted(meeting)
    meeting.tell(Lost(3))
    meeting.secure(requests[:1])
    again = meeting.secure(requests[1:], got=[0, 1, 2])
    assert meeting.secure(requests) == []
    assert meeting.secure(requests, got=[0]) == []
    assert len(meeting.secure(again)) == 1


def test_missing_part_goes_back_to_securing_and_everybody_is_delivered_to_again():
    meeting = Meeting(4)
    (deliver,) = meeting.secure(posted(meeting))
    meeting.tell(Lost(1))
    assert isinstance(deliver, Deliver)
    meeting.deliver(deliver, 0)
    again = meeting.tell(Delivered(0, 2, deliver.generation, frozenset({1})))
    assert again == [Secure(0, 1, 2, (0, 1, 2, 3), 2)]
    assert meeting.phase is Phase.SECURING
    assert meeting.deliver(deliver, 0, 2, 3) == []  # of the older generation
    (second,) = meeting.secure(again)
    assert second == Deliver(0, (0, 2, 3), (0, 1, 2, 3), (0, 2), 2)
    assert meeting.deliver(deliver, 0, 2, 3) == []
    assert meeting.deliver(second, 2, 3) == []  # what node 0 held before was another part
    assert meeting.deliver(second, 0) == [Advance(0, (0, 2, 3), (0, 1, 2, 3), inline=False)]


def test_a_gather_that_somebody_no_longer_holds_is_secured_again_by_all():
    meeting = Meeting(3, need=1)
    (deliver,) = meeting.secure(meeting.tell(*(gather(node) for node in range(3))))
    assert isinstance(deliver, Deliver)
    meeting.deliver(deliver, 0)
    again = meeting.tell(Delivered(0, 1, deliver.generation, frozenset({0})))
    assert again == [Secure(0, 0, node, (0, 1, 2), 2) for node in range(3)]
    assert meeting.secure(again[:2]) == []
    (second,) = meeting.secure(again[2:])
    assert meeting.deliver(second) == [Advance(0, (0, 1, 2), (0, 1, 2), inline=False)]


def test_a_set_that_shrinks_on_the_second_try_shrinks_for_all_parts():
    meeting = Meeting(4)
    (deliver,) = meeting.secure(posted(meeting))
    meeting.tell(Lost(1))
    assert isinstance(deliver, Deliver)
    again = meeting.tell(Delivered(0, 2, deliver.generation, frozenset({1})))
    # Node 1's machine is gone, its contribution too: part 0, which has it, must be made again without.
    third = meeting.secure(again, got=[0, 2, 3])
    assert third == [Secure(0, 0, 0, (0, 2, 3), 3)]
    (second,) = meeting.secure(third)
    assert second == Deliver(0, (0, 2, 3), (0, 2, 3), (0, 2), 3)


def test_lost_while_delivering():
    meeting = Meeting(4)
    (deliver,) = meeting.secure(posted(meeting))
    meeting.deliver(deliver, 0, 1, 2)
    assert meeting.tell(Lost(3)) == [GiveUp(3), Advance(0, (0, 1, 2), (0, 1, 2, 3), inline=False)]
    assert meeting.end() == [Commit((0, 1, 2))]


def test_who_was_delivered_to_and_died_does_not_count():
    meeting = Meeting(3, need=1)
    (deliver,) = meeting.secure(posted(meeting))
    meeting.deliver(deliver, 0)
    assert meeting.tell(Lost(0)) == [GiveUp(0)]
    assert meeting.deliver(deliver, 1, 2) == [Advance(0, (1, 2), (0, 1, 2), inline=False)]


def test_lost_fetcher_of_a_gather():
    meeting = Meeting(4)
    requests = meeting.tell(*(gather(node) for node in range(4)))
    meeting.secure(requests[:1], got=[0, 1])
    meeting.secure(requests[1:3])
    # What only the lost one could not get stays in.
    (_, deliver) = meeting.tell(Lost(0)) + meeting.secure(requests[3:])
    assert deliver == Deliver(0, (1, 2, 3), (0, 1, 2, 3), (), 1)


def test_lost_poster_of_a_closed_exchange_is_in_closed_and_not_committed():
    meeting = Meeting(3)
    meeting.tell(inline(0), inline(1), inline(2))
    assert meeting.machine.exchanges[0].closed == (0, 1, 2)
    assert meeting.tell(Lost(1)) == []
    assert meeting.end() == [Commit((0, 2))]


def test_lost_after_the_return():
    meeting = Meeting(3)
    meeting.tell(inline(0), inline(1), inline(2))
    meeting.tell(returned(0, 1, "d"), returned(1, 1, "d"))
    assert meeting.tell(Lost(1)) == []
    assert meeting.tell(returned(2, 1, "d")) == [Commit((0, 2))]
    # And when it was the last that the others waited for:
    meeting = Meeting(3)
    meeting.tell(inline(0), inline(1), inline(2), returned(0, 1, "d"), returned(1, 1, "d"))
    assert meeting.tell(Lost(2)) == [Commit((0, 1))]


def test_an_exchange_that_only_the_lost_had_begun_holds_up_nothing():
    meeting = Meeting(3)
    meeting.tell(inline(0), inline(1), inline(2), inline(2, 1), Lost(2))
    assert meeting.end() == [Commit((0, 1))]


def test_twice_lost_and_strangers():
    meeting = Meeting(4)
    requests = posted(meeting)
    assert meeting.tell(Lost(9)) == []
    meeting.tell(Lost(3))
    assert meeting.tell(Lost(3)) == [GiveUp(3)]
    assert len(meeting.secure(requests)) == 1
    assert meeting.tell(large(3, 1), waits(3, 1), waits(3, 7), returned(3, 1)) == []


def test_give_up_only_while_something_is_fetched():
    meeting = Meeting(4)
    assert meeting.tell(Lost(0)) == []
    requests = posted(meeting)
    assert meeting.tell(Lost(1))[0] == GiveUp(1)
    (deliver,) = meeting.secure([*requests[1:], *meeting.decisions[-1:]])
    assert meeting.machine.over is False
    meeting.deliver(deliver, 2, 3)
    assert meeting.phase is Phase.CLOSED
    assert [type(one) for one in meeting.tell(Lost(2))] == [Abort]


# --- too few --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.OPEN, Phase.SECURING, Phase.DELIVERING, Phase.CLOSED])
def test_fewer_than_need_aborts_in_every_phase(phase: Phase):
    meeting = Meeting(4, need=3)
    requests = posted(meeting, but=[3] if phase is Phase.OPEN else [])
    if phase in (Phase.DELIVERING, Phase.CLOSED):
        (deliver,) = meeting.secure(requests)
        if phase is Phase.CLOSED:
            meeting.deliver(deliver)
    assert meeting.phase is phase
    assert not any(isinstance(one, Abort) for one in meeting.tell(Lost(0)))
    *_, abort = meeting.tell(Lost(2))
    assert abort == Abort("2 of 4 members are left, 3 are needed")
    assert meeting.machine.over
    assert meeting.tell(large(3), Deadline(), Lost(1)) == []


def test_need_counts_for_each_exchange():
    meeting = Meeting(5, need=3)
    requests = posted(meeting)
    (abort,) = meeting.secure(requests[:1]) + meeting.secure(requests[1:], got=[0, 1])
    assert isinstance(abort, Abort)
    assert "fewer than the 3 members" in abort.reason


def test_receivers_count_for_need_while_they_live():
    meeting = Meeting(4, need=3)
    requests = meeting.tell(large(0, sizes=(400,)), nothing(1), nothing(2), large(3, sizes=(400,)))
    assert not any(isinstance(one, Abort) for one in meeting.tell(Lost(3)))
    # Node 3's contribution is lost too: closed {0} and the receivers {1, 2} are three still.
    (deliver,) = meeting.secure(requests, got=[0])
    assert isinstance(deliver, Deliver)
    assert deliver.closed == (0,)
    *_, abort = meeting.tell(Lost(2))
    assert isinstance(abort, Abort)


def test_the_dead_count_while_their_contributions_do():
    meeting = Meeting(4, need=2)
    requests = meeting.tell(nothing(0), nothing(1), large(2, sizes=(400,)), large(3, sizes=(400,)))
    meeting.tell(Lost(2))
    (request,) = [one for one in meeting.tell(Lost(3)) if isinstance(one, Secure)]
    assert request == Secure(0, 0, 0, (2, 3), 1)
    assert meeting.secure(requests) == []
    (deliver,) = meeting.secure([request])
    assert deliver == Deliver(0, (0, 1), (2, 3), (0,), 1)


def test_nothing_left_to_fetch_aborts():
    meeting = Meeting(3, need=1)
    requests = meeting.tell(nothing(0), large(1), nothing(2))
    decisions = meeting.tell(Lost(1))
    assert isinstance(decisions[0], GiveUp)
    *_, abort = meeting.secure([one for one in (*requests, *decisions) if isinstance(one, Secure)], got=[])
    assert isinstance(abort, Abort)


def test_parts_that_are_always_missing_abort_in_the_end():
    meeting = Meeting(2, need=1)
    requests = posted(meeting)
    for _ in range(50):
        (deliver,) = meeting.secure(requests)
        assert isinstance(deliver, Deliver)
        requests = meeting.tell(Delivered(0, 0, deliver.generation, frozenset({1})))
        if isinstance(requests[0], Abort):
            assert "missing each time" in requests[0].reason
            return
    pytest.fail("no end")


# --- stragglers -----------------------------------------------------------------------------------------------------


def test_deadline_leaves_behind_who_has_not_posted():
    meeting = Meeting(4)
    meeting.tell(inline(1), inline(2))
    reason = "it had not reached exchange 0 when that closed"
    assert meeting.tell(Deadline()) == [
        Cancel(0, reason),
        Cancel(3, reason),
        Advance(0, (1, 2), (1, 2), inline=True),
    ]
    assert meeting.tell(inline(0), waits(3, 0), returned(3, 1)) == []  # late words of the cancelled
    assert meeting.end() == [Commit((1, 2))]


def test_deadline_with_too_few_posts_changes_nothing_until_it_comes_again():
    meeting = Meeting(4)
    meeting.tell(inline(1))
    assert meeting.tell(Deadline()) == []
    # All are slow alike: whoever comes first after a deadline does not throw out those that come a moment later.
    assert meeting.tell(inline(2)) == []
    assert meeting.tell(inline(0)) == []
    assert [type(one) for one in meeting.tell(Deadline())] == [Cancel, Advance]


def test_deadline_cancels_nobody_while_nobody_waits():
    meeting = Meeting(4)
    meeting.tell(inline(0, waits=False), inline(1, waits=False), inline(2, waits=False))
    assert meeting.tell(Deadline()) == []
    meeting.tell(waits(1, 0))
    decisions = meeting.tell(Deadline())
    assert [type(one) for one in decisions] == [Cancel, Advance]
    assert decisions[1] == Advance(0, (1,), (0, 1, 2), inline=True)


def test_deadline_does_not_touch_what_is_on_its_way():
    meeting = Meeting(4)
    requests = posted(meeting)
    assert meeting.tell(Deadline()) == []
    (deliver,) = meeting.secure(requests)
    assert meeting.tell(Deadline()) == []
    assert len(meeting.deliver(deliver)) == 1


def test_who_owes_an_answer_from_one_deadline_to_the_next_is_left_behind():
    meeting = Meeting(4)
    requests = posted(meeting)
    assert meeting.tell(Deadline()) == []
    meeting.secure(requests[:1])
    decisions = meeting.tell(Deadline())
    assert decisions[0] == Cancel(1, "it had not answered in exchange 0")
    (again,) = [one for one in decisions if isinstance(one, Secure)]
    assert again == Secure(0, 1, 2, (0, 1, 2, 3), 1)
    (deliver,) = meeting.secure([again])
    assert meeting.tell(Deadline()) == []
    meeting.deliver(deliver, 0, 2)
    assert meeting.tell(Deadline()) == [
        Cancel(3, "it had not answered in exchange 0"),
        Advance(0, (0, 2), (0, 1, 2, 3), inline=False),
    ]


def test_who_owes_an_answer_is_waited_for_if_too_few_would_be_left():
    meeting = Meeting(4, need=4)
    requests = posted(meeting)
    meeting.secure(requests[:1])
    assert meeting.tell(Deadline(), Deadline(), Deadline()) == []
    assert meeting.machine.is_waited_for


def test_cancelled_contributions_to_other_exchanges():
    meeting = Meeting(4, need=2)
    requests = meeting.tell(*(large(node, waits=False) for node in range(4)))
    meeting.tell(large(0, 1), large(1, 1))
    decisions = meeting.tell(Deadline())
    assert [one.node for one in decisions if isinstance(one, Cancel)] == [2, 3]
    # What they contributed to exchange 0 is there, and stays.
    (deliver,) = meeting.secure(requests)
    assert isinstance(deliver, Deliver)
    assert deliver.closed == (0, 1, 2, 3)
    assert deliver.nodes == (0, 1)


def test_a_cancelled_reducer_is_replaced():
    meeting = Meeting(4, need=2)
    meeting.tell(*(large(node, waits=False) for node in range(4)))
    meeting.tell(large(2, 1), large(3, 1))
    decisions = meeting.tell(Deadline())
    again = [one for one in decisions if isinstance(one, Secure) and one.seq == 0]
    assert again == [Secure(0, 0, 2, (0, 1, 2, 3), 1), Secure(0, 1, 2, (0, 1, 2, 3), 1)]
    assert not any(isinstance(one, GiveUp) for one in decisions)


def test_deadline_at_the_end_of_the_program():
    meeting = Meeting(4)
    meeting.tell(*(inline(node) for node in range(4)))
    meeting.tell(returned(0, 1, "d"))
    assert meeting.tell(Deadline()) == []
    meeting.tell(returned(1, 1, "d"))
    reason = "it had not finished the round"
    assert meeting.tell(Deadline()) == [Cancel(2, reason), Cancel(3, reason), Commit((0, 1))]


def test_thousands_are_late():
    meeting = Meeting(3000, need=2)
    meeting.tell(inline(0), inline(1))
    decisions = meeting.tell(Deadline())
    assert len(decisions) == 2999
    assert decisions[-1] == Advance(0, (0, 1), (0, 1), inline=True)


class FirstTwo(ClosePolicy, name="test_first_two"):
    """Two that arrive within five seconds of one another suffice."""

    def enough(self, arrived, active, waited):
        assert arrived <= active
        return len(arrived) >= 2 and waited.since_first_s < 5


def test_close_policy_decides_who_is_late():
    meeting = Meeting(4, need=1)
    assert meeting.tell(inline(3, close=FirstTwo())) == []
    decisions = meeting.tell(inline(1, close=FirstTwo()), at=1.0)
    assert [one.node for one in decisions if isinstance(one, Cancel)] == [0, 2]
    assert decisions[-1] == Advance(0, (1, 3), (1, 3), inline=True)


def test_close_policy_knows_how_long_it_took_and_may_not_go_below_need():
    meeting = Meeting(4, need=1)
    assert meeting.tell(inline(3, close=FirstTwo()), at=10.0) == []
    assert meeting.tell(inline(1, close=FirstTwo()), at=16.0) == []
    meeting = Meeting(4, need=3)
    assert meeting.tell(inline(3, close=FirstTwo()), inline(1, close=FirstTwo()), at=1.0) == []
    assert len(meeting.tell(inline(0, close=FirstTwo()), at=2.0)) == 2


def test_close_policy_is_asked_again_when_somebody_comes_to_wait():
    meeting = Meeting(4, need=1)
    assert meeting.tell(inline(3, close=FirstTwo(), waits=False), inline(1, close=FirstTwo(), waits=False)) == []
    assert [type(one) for one in meeting.tell(waits(1, 0))] == [Cancel, Cancel, Advance]


# --- programs match by position -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        GATHER,
        Signature("AllReduce", "median", REDUCE.tensors),
        Signature("AllReduce", "mean", (TensorSpec("", torch.float64, (10,)),)),
        Signature("AllReduce", "mean", (TensorSpec("x", torch.float32, (10,)),)),
    ],
)
def test_another_signature(other: Signature):
    meeting = Meeting(3)
    meeting.tell(inline(2))
    (diverge,) = meeting.tell(inline(0, signature=other))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.first, diverge.second) == (2, 0)
    assert str(REDUCE) in diverge.message
    assert str(other) in diverge.message
    assert meeting.machine.over


def test_weights_and_sizes_are_no_part_of_a_signature():
    meeting = Meeting(2)
    assert len(meeting.tell(inline(0, weight=3.0), inline(1, weight=0.5))) == 1


def test_who_fixed_the_signature_may_be_lost():
    meeting = Meeting(3)
    other = Signature("AllReduce", "median", REDUCE.tensors)
    meeting.tell(inline(2, signature=other), Lost(2))
    assert len(meeting.tell(inline(0), inline(1))) == 1


def test_a_program_that_ends_early():
    meeting = Meeting(2)
    meeting.tell(inline(0), inline(1), returned(0, 1, "d"))
    (diverge,) = meeting.tell(inline(1, 1))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.seq, diverge.first, diverge.second) == (1, 0, 1)
    assert "the end of the program" in diverge.message


def test_a_program_that_goes_on():
    meeting = Meeting(2)
    meeting.tell(inline(0), inline(1), inline(1, 1))
    (diverge,) = meeting.tell(returned(0, 1, "d"))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.seq, diverge.first, diverge.second) == (1, 0, 1)


# --- the end --------------------------------------------------------------------------------------------------------


def test_commit_needs_everybody_active():
    meeting = Meeting(3, need=1)
    assert meeting.tell(returned(0, 0), returned(2, 0)) == []
    assert meeting.tell(returned(1, 0)) == [Commit((0, 1, 2))]
    assert meeting.machine.over


def test_digests_that_differ():
    meeting = Meeting(5)
    digests = {0: "a", 1: "b", 2: "b", 3: "c", 4: "b"}
    assert meeting.tell(*(returned(node, 0, digest) for node, digest in digests.items())) == [
        Diverged(((1, 2, 4), (0,), (3,)))
    ]


def test_digests_of_the_dead_do_not_count():
    meeting = Meeting(3)
    meeting.tell(returned(0, 0, "odd"), returned(1, 0, "d"), Lost(0))
    assert meeting.tell(returned(2, 0, "d")) == [Commit((1, 2))]


def test_digests_do_not_matter_where_nothing_is_replicated():
    meeting = Meeting(2, replicated=False)
    assert meeting.tell(returned(0, 0, "a"), returned(1, 0, "b")) == [Commit((0, 1))]


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contributors", [1, 2, 4])
def test_bytes_of_large_contributions(contributors: int):
    meeting = Meeting(4)
    sizes, results = (400, 400, 200), (100, 100, 50)
    requests = meeting.tell(
        *(large(node, sizes=sizes, results=results) if node < contributors else nothing(node) for node in range(4))
    )
    (deliver,) = meeting.secure(requests)
    assert meeting.nbytes == (contributors - 1) * 1000
    meeting.deliver(deliver)
    assert meeting.nbytes == (contributors - 1) * 1000 + 3 * 250


@pytest.mark.parametrize("contributors", [1, 2, 4])
def test_bytes_of_inline_contributions(contributors: int):
    meeting = Meeting(4)
    meeting.tell(*(inline(node) if node < contributors else nothing(node) for node in range(4)))
    assert meeting.nbytes == contributors * 3 * 40


def test_bytes_of_a_gather():
    meeting = Meeting(3)
    requests = meeting.tell(gather(0, nbytes=100_000), gather(1, nbytes=8), nothing(2, signature=GATHER))
    (deliver,) = meeting.secure(requests)
    meeting.deliver(deliver)
    assert meeting.nbytes == 2 * 100_008


def test_bytes_of_a_second_try_are_booked_too():
    meeting = Meeting(3, need=1)
    (deliver,) = meeting.secure(posted(meeting))
    assert isinstance(deliver, Deliver)
    meeting.deliver(deliver, 0)
    before = meeting.nbytes
    assert before == 2 * 800 + 400
    again = meeting.tell(Delivered(0, 1, deliver.generation, frozenset({0})))
    (second,) = meeting.secure(again)
    meeting.deliver(second)
    assert meeting.nbytes == before + 2 * 400 + 2 * 800


def test_bytes_to_the_dead_are_booked_while_they_live():
    meeting = Meeting(3, need=1)
    (deliver,) = meeting.secure(posted(meeting))
    meeting.deliver(deliver, 2)
    before = meeting.nbytes
    meeting.tell(Lost(2))
    meeting.deliver(deliver, 0, 1)
    assert meeting.nbytes == before + 800


# --- many at once -----------------------------------------------------------------------------------------------------


def neighbor(node: int, *wants: int) -> Reached:
    gather = Signature("NeighborAllGather", "ring", None)
    return post(node, 0, gather, part_nbytes=(8,), inline=True, wants=frozenset(wants))


RING = [neighbor(0, 1, 2), neighbor(1, 0, 2), neighbor(2, 0, 1)]


def together(posts: list[Reached]) -> Posts:
    return Posts({node: ticket for node, ticket in posts if isinstance(ticket, Posted)})


def returns(nodes: tuple[int, ...], *report: Any) -> Returns:
    tickets = dict(returned(node, *report) for node in nodes)
    return Returns({node: ticket for node, ticket in tickets.items() if isinstance(ticket, Returned)})


@pytest.mark.parametrize("before", [[], [Lost(2)], [neighbor(1, 0, 2)], [waits(0, 0)]], ids=str)
@pytest.mark.parametrize("gathers", [True, False])
def test_posts_told_at_once_are_the_same_as_one_after_the_other(before: list[Event], *, gathers: bool):
    posts = RING if gathers else [inline(node) for node in range(3)]
    before = [
        event for event in before if gathers or not isinstance(event, Reached) or isinstance(event.ticket, Waiting)
    ]
    alone, at_once = Meeting(3), Meeting(3)
    for meeting, told in ((alone, posts), (at_once, [together(posts)])):
        meeting.tell(*before, *told)
    assert at_once.decisions == alone.decisions
    assert any(isinstance(decision, Close) for decision in alone.decisions)
    assert at_once.nbytes == alone.nbytes
    assert at_once.machine.exchanges[0].posts == alone.machine.exchanges[0].posts


def test_a_node_lost_after_posts_at_once_leaves_the_exchange():
    meeting = Meeting(4)
    assert meeting.tell(together(RING)) == []
    assert meeting.tell(Lost(1)) == []
    assert meeting.tell(neighbor(3, 0, 1)) == [Advance(0, (0, 2, 3), (0, 2, 3), inline=True)]
    assert meeting.nbytes == 8 * (1 + 1 + 1)  # 0 from 2, 2 from 0, 3 from 0; nobody wants 3


def test_posts_at_once_that_differ_from_what_is_there_name_both():
    meeting = Meeting(4)
    meeting.tell(inline(3))
    (diverge,) = meeting.tell(together(RING))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.first, diverge.second) == (3, 0)


def test_returns_told_at_once_commit():
    meeting = Meeting(3)
    meeting.tell(*(inline(node) for node in range(3)))
    assert meeting.tell(returns((0, 1), 1, "d")) == []
    assert meeting.tell(returned(2, 1, "d")) == [Commit((0, 1, 2))]


def test_returns_told_at_once_are_of_active_members_only():
    meeting = Meeting(4)
    meeting.tell(Lost(1))
    assert meeting.tell(returns((0, 1, 2), 0)) == []
    assert meeting.machine.returned.keys() == {0, 2}
    assert meeting.tell(returned(3, 0)) == [Commit((0, 2, 3))]


def test_returns_told_at_once_while_another_waits_name_both():
    meeting = Meeting(3)
    meeting.tell(inline(2))
    (diverge,) = meeting.tell(returns((0, 1), 0))
    assert isinstance(diverge, ProgramsDiverge)
    assert (diverge.first, diverge.second) == (0, 2)


def test_members_are_sorted():
    assert Rendezvous((2, 0, 1), 2).view == (0, 1, 2)


def test_all_parts_that_are_missing_are_made_again():
    meeting = Meeting(3)
    (deliver,) = meeting.secure(meeting.tell(*(large(node, sizes=(400, 400, 400)) for node in range(3))))
    meeting.tell(Lost(2))
    assert isinstance(deliver, Deliver)
    again = meeting.tell(Delivered(0, 0, deliver.generation, frozenset({1, 2})))
    assert len(again) == 2
    assert meeting.secure(again[:1]) == []  # the other part is not there yet
    (second,) = meeting.secure(again[1:])
    assert isinstance(second, Deliver)


def test_a_majority_heals_the_rest_if_it_is_enough_for_the_round():
    halves = Rendezvous(range(4), 2, heal=True)
    decisions = [one for node in range(4) for one in halves.handle(returned(node, 0, "ab"[node > 1]))]
    assert decisions == [Diverged(((0, 1), (2, 3)))]
    for need, healed in ((3, True), (4, False)):
        machine = Rendezvous(range(5), need, heal=True)
        decisions = [one for node in range(5) for one in machine.handle(returned(node, 0, "ab"[node > 2]))]
        assert decisions[0] == Diverged(((0, 1, 2), (3, 4)), healed)
        assert (Commit((0, 1, 2)) in decisions) is healed


def test_what_a_member_is_to_have_includes_its_own():
    exchange = Exchange(0, closed=(0, 1, 2))
    exchange.posts = together([inline(0), neighbor(1, 0)]).tickets
    assert exchange.wanted(1) == (0, 1)
    assert exchange.wanted(0) == (0, 1, 2)
