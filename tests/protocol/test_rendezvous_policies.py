"""The rendezvous: close policies that take their time, and gathers of neighbours."""

from __future__ import annotations

from starling.actors.wire.buffers import Signature
from starling.actors.wire.tickets import Secured
from starling.algorithms.closing.base import Everyone, FirstK, Grace
from starling.algorithms.closing.coded import OneOfEach
from starling.orchestrator.protocol.events import (
    Abort,
    Advance,
    AskAgain,
    Cancel,
    Deadline,
    Deliver,
    Delivered,
    Elapsed,
    Reached,
    Secure,
)
from tests.protocol.test_rendezvous import Meeting, inline, large, nothing
from tests.tickets import post

NEIGHBORS = Signature("NeighborAllGather", "ring", None)


def neighbor(node: int, wants: set[int], *, nbytes: int = 100, small: bool = True) -> Reached:
    return post(node, 0, NEIGHBORS, part_nbytes=(nbytes,), inline=small, wants=frozenset(wants))


def ring(node: int, size: int = 4, **keys: bool) -> Reached:
    return neighbor(node, {(node - 1) % size, (node + 1) % size}, **keys)


def test_a_policy_may_ask_to_be_asked_again():
    meeting = Meeting(4, need=1)
    policy = Grace(after=2, seconds=5)
    meeting.tell(inline(0, close=policy), at=10.0)
    (again,) = meeting.tell(inline(1, close=policy), at=12.0)
    assert again == AskAgain(0, 3.0)
    assert [type(one) for one in meeting.tell(Elapsed(0), at=15.0)] == [Cancel, Cancel, Advance]


def test_what_the_fastest_took_counts_from_the_beginning_or_the_last_close():
    meeting = Meeting(3, need=1, began=100.0)
    policy = Grace(factor=0.5)
    assert meeting.tell(inline(1, close=policy), at=104.0) == [AskAgain(0, 2.0)]
    meeting.tell(inline(0, close=policy), at=105.0)
    assert meeting.tell(inline(2, close=policy), at=105.5) == [Advance(0, (0, 1, 2), (0, 1, 2), inline=True)]
    assert meeting.tell(inline(0, seq=1, close=policy), at=115.5) == [AskAgain(1, 5.0)]
    assert meeting.tell(inline(1, seq=1, close=policy), at=118.5) == [AskAgain(1, 2.0)]
    assert [type(one) for one in meeting.tell(Elapsed(1), at=120.5)] == [Cancel, Advance]


def test_time_counts_from_the_first_that_contributes():
    """Who only receives comes at once, having trained nothing: no measure of what the fastest took."""
    meeting = Meeting(4, need=1)
    policy = Grace(factor=1.0)
    assert meeting.tell(nothing(0, close=policy), at=0.5) == []
    assert meeting.tell(inline(1, close=policy), at=4.0) == [AskAgain(0, 4.0)]
    assert [type(one) for one in meeting.tell(Elapsed(0), at=8.0)] == [Cancel, Cancel, Advance]


def test_an_exchange_that_is_begun_before_another_closes():
    """The time of its own fastest, from the last close before that, is what counts."""
    meeting = Meeting(2, need=1)
    policy = Grace(factor=1.0)
    meeting.tell(inline(0, waits=False), at=1.0)
    assert meeting.tell(inline(0, seq=1, close=policy), at=3.0) == [AskAgain(1, 3.0)]
    meeting.tell(inline(1), at=4.0)
    assert [type(one) for one in meeting.tell(Elapsed(1), at=6.0)] == [Cancel, Advance]


def test_large_exchanges_close_when_they_are_delivered():
    meeting = Meeting(2, need=1)
    (deliver,) = meeting.secure(meeting.tell(large(0), large(1), at=2.0))
    meeting.machine.handle(Delivered(0, 0, 1), 5.0)
    meeting.machine.handle(Delivered(0, 1, 1), 6.0)
    assert isinstance(deliver, Deliver)
    assert meeting.tell(inline(0, seq=1, close=Grace(factor=0.5)), at=8.0) == [AskAgain(1, 1.0)]


def test_grace_ends_when_it_is_to_end_on_a_clock_that_rounds():
    for first in (2.0**31 + 0.7, 1e9 / 3, 0.1):
        meeting = Meeting(3, need=1)
        (again,) = meeting.tell(inline(0, close=Grace(seconds=0.1)), at=first)
        assert isinstance(again, AskAgain)
        assert [type(one) for one in meeting.tell(Elapsed(0), at=first + again.after_s)] == [Cancel, Cancel, Advance]


def test_time_that_has_passed_in_vain_does_no_harm():
    meeting = Meeting(2, need=1)
    policy = Grace(after=1, seconds=5)
    meeting.tell(inline(0, close=policy), at=0.0)
    meeting.tell(inline(1, close=policy), at=1.0)
    assert meeting.tell(Elapsed(0), at=5.0) == []


def test_a_policy_that_needs_all_ends_the_attempt_at_the_deadline():
    meeting = Meeting(4, need=1)
    meeting.tell(*(inline(node, close=Everyone()) for node in (0, 3)))
    (abort,) = meeting.tell(Deadline())
    assert abort == Abort("exchange 0 cannot close without nodes 1, 2, says its policy 'all'")


def test_a_decodable_set_closes_and_one_that_is_not_does_not():
    meeting = Meeting(4, need=1)
    policy = OneOfEach(groups=((0, 2), (1, 3)))
    assert meeting.tell(inline(0, close=policy), inline(2, close=policy)) == []
    decisions = meeting.tell(inline(3, close=policy))
    assert decisions == [Cancel(1, decisions[0].reason), Advance(0, (0, 2, 3), (0, 2, 3), inline=True)]  # type: ignore[union-attr]


def test_who_only_receives_is_neither_counted_nor_waited_for():
    meeting = Meeting(4, need=1)
    policy = FirstK(k=2)
    assert meeting.tell(nothing(0, close=policy), inline(1, close=policy)) == []
    decisions = meeting.tell(inline(2, close=policy))
    assert [one.node for one in decisions if isinstance(one, Cancel)] == [3]


def test_a_policy_closes_nothing_that_nobody_waits_for():
    meeting = Meeting(3, need=1)
    policy = FirstK(k=1)
    assert meeting.tell(inline(0, close=policy, waits=False), inline(1, close=policy, waits=False)) == []


def test_neighbours_are_booked_by_edges():
    meeting = Meeting(4)
    meeting.tell(*map(ring, range(3)))
    (advance,) = meeting.tell(ring(3))
    assert advance == Advance(0, (0, 1, 2, 3), (0, 1, 2, 3), inline=True)
    assert meeting.nbytes == 4 * 2 * 100


def test_each_fetches_what_it_is_to_receive_and_its_own():
    meeting = Meeting(4)
    requests = meeting.tell(*(ring(node, small=False) for node in range(4)))
    assert requests == [
        Secure(0, 0, node, tuple(sorted({(node - 1) % 4, node, (node + 1) % 4})), 1) for node in range(4)
    ]
    (deliver,) = meeting.secure(requests)
    assert deliver.makers == ()
    assert meeting.nbytes == 4 * 2 * 100
    assert len(meeting.deliver(deliver)) == 1


def test_what_one_neighbour_cannot_fetch_is_out_for_all():
    meeting = Meeting(5, need=2)
    requests = meeting.tell(*(ring(node, 5, small=False) for node in range(5)))
    for one in requests:
        assert isinstance(one, Secure)
        got = frozenset(one.members) - ({2} if one.by == 1 else set())
        last = meeting.tell(Secured(0, 0, one.by, got, 1))
    cancel, deliver = last
    assert cancel == Cancel(2, "nobody could fetch what it contributed to exchange 0")
    assert deliver.closed == (0, 1, 3, 4)


def test_directed_graphs_book_what_is_received():
    meeting = Meeting(3)
    meeting.tell(neighbor(0, {2}), neighbor(1, {0}))
    meeting.tell(neighbor(2, set(), nbytes=7))
    assert meeting.nbytes == 7 + 100
