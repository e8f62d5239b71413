"""The mailroom: which message a node receives next."""

from __future__ import annotations

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from starling.algorithms.api import Left, Timeout
from starling.orchestrator.protocol.mailboxes import Delivery, Envelope, Handover, Mailroom

_LETTERS = count(1000)


def sent(room: Mailroom, sender: int, to: int, letter: int | None = None) -> Envelope:
    envelope = room.send(sender, to, 8, next(_LETTERS) if letter is None else letter)
    assert envelope is not None
    return envelope


def test_a_message_waits_for_its_receiver():
    room = Mailroom([0, 1])
    envelope = sent(room, 0, 1)
    assert room.num_in_flight == 1
    assert room.arrived(envelope) == []
    assert room.num_in_flight == 0
    assert room.receive(1, None, now=3.0) == [Handover(1, Delivery(envelope, 0))]
    assert room.receiving == ()


def test_a_receiver_waits_for_its_message():
    room = Mailroom([0, 1])
    assert room.receive(1, None, now=0.0) == []
    assert room.receiving == (1,)
    envelope = sent(room, 0, 1)
    assert room.arrived(envelope) == [Handover(1, Delivery(envelope, 0))]


def test_messages_are_handed_over_in_the_order_of_their_arrival():
    room = Mailroom([0, 1, 2])
    first, second = sent(room, 0, 2), sent(room, 1, 2)
    room.arrived(second)
    room.arrived(first)
    order = [room.receive(2, None, 0.0)[0].outcome for _ in range(2)]
    assert order == [Delivery(second, 0), Delivery(first, 0)]


def test_staleness_counts_the_receivers_rounds_since_the_sender_heard_of_it():
    room = Mailroom([-1, 0])
    room.begin(-1, 4)
    reply = sent(room, -1, 0)
    room.arrived(reply)
    assert room.receive(0, None, 0.0) == [Handover(0, Delivery(reply, 0))]
    room.begin(-1, 7)
    update = sent(room, 0, -1)
    assert update.heard == 4
    room.arrived(update)
    assert room.receive(-1, None, 0.0) == [Handover(-1, Delivery(update, 3))]


def test_who_never_heard_of_the_receiver_counts_from_its_first_round():
    room = Mailroom([-1, 0])
    room.begin(-1, 5)
    room.arrived(sent(room, 0, -1))
    (handover,) = room.receive(-1, None, 0.0)
    assert isinstance(handover.outcome, Delivery)
    assert handover.outcome.staleness == 5


def test_names_of_messages_count_within_a_round():
    room = Mailroom([0, 1])
    keys = [sent(room, 0, 1).key, sent(room, 0, 1).key]
    room.begin(0, 1)
    assert [*keys, sent(room, 0, 1).key] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]


def test_what_a_repeated_round_sends_again_is_dropped():
    room = Mailroom([0, 1])
    sent(room, 0, 1)
    room.begin(0, 0)
    assert room.send(0, 1, 8, 1) is None
    assert room.send(0, 1, 8, 2) is not None


def test_a_timeout_comes_at_its_time_and_not_for_who_was_served():
    room = Mailroom([0, 1, 2])
    room.receive(0, 2.0, now=1.0)
    room.receive(1, 5.0, now=1.0)
    assert room.next_timeout() == 3.0
    room.arrived(sent(room, 2, 0))
    assert room.next_timeout() == 6.0
    assert room.expired(5.9) == []
    assert room.expired(6.0) == [Handover(1, Timeout())]
    assert room.next_timeout() is None


def test_everybody_is_told_once_who_left():
    room = Mailroom([0, 1, 2])
    room.receive(0, None, 0.0)
    assert room.left(2) == [Handover(0, Left(2))]
    assert room.receive(1, None, 0.0) == [Handover(1, Left(2))]
    assert room.receive(1, None, 0.0) == []
    assert room.send(0, 2, 8, 0) is None
    assert room.nodes == (0, 1)


def test_a_message_to_who_left_meanwhile_is_dropped_and_one_from_it_is_delivered():
    room = Mailroom([0, 1, 2])
    to_it, from_it = sent(room, 0, 2), sent(room, 2, 1)
    room.left(2)
    assert room.arrived(to_it) == []
    assert room.arrived(from_it) == []
    outcomes = [room.receive(1, None, 0.0)[0].outcome for _ in range(2)]
    assert outcomes == [Left(2), Delivery(from_it, 0)]


def test_stuck_means_that_nothing_can_come():
    room = Mailroom([0, 1])
    room.receive(0, None, 0.0)
    assert not room.stuck([0, 1])
    assert room.stuck([0])
    envelope = sent(room, 1, 0)
    assert not room.stuck([0])
    room.arrived(envelope)
    room.receive(0, 1.0, 0.0)
    room.receive(1, None, 0.0)
    assert not room.stuck([0, 1])
    room.expired(1.0)
    room.receive(0, None, 1.0)
    assert room.stuck([0, 1])


def test_a_cancelled_node_waits_for_nothing_and_keeps_its_mail():
    room = Mailroom([0, 1])
    room.receive(0, 1.0, 0.0)
    room.stop(0)
    assert room.next_timeout() is None
    envelope = sent(room, 1, 0)
    assert room.arrived(envelope) == []
    assert room.receive(0, None, 0.0) == [Handover(0, Delivery(envelope, 0))]


@settings(max_examples=100, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(["send", "arrive", "receive", "begin", "expire"]), st.integers(0, 3)), max_size=60
    )
)
def test_every_message_is_handed_over_exactly_once_and_only_to_who_waits(actions: list[tuple[str, int]]):
    room = Mailroom(range(4))
    flying: list[Envelope] = []
    rounds = [0] * 4
    handed: list[Handover] = []
    waiting: set[int] = set()
    everything: list[Envelope] = []
    for clock, (action, node) in enumerate(actions):
        new: list[Handover] = []
        if action == "send":
            envelope = sent(room, node, (node + 1) % 4, clock)
            flying.append(envelope)
            everything.append(envelope)
        elif action == "arrive" and flying:
            new = room.arrived(flying.pop(node % len(flying)))
        elif action == "receive" and node not in waiting:
            waiting.add(node)
            new = room.receive(node, float(node + 1), float(clock))
        elif action == "begin":
            rounds[node] += 1
            room.begin(node, rounds[node])
            waiting.discard(node)
        elif action == "expire":
            new = room.expired(float(clock))
        for handover in new:
            assert handover.node in waiting
            waiting.discard(handover.node)
        handed += new
        assert set(room.receiving) == waiting
    for _ in range(len(flying)):
        handed += room.arrived(flying.pop())
    for node in range(4):
        while got := room.receive(node, None, 0.0):
            handed += got
    delivered = [one.outcome.envelope for one in handed if isinstance(one.outcome, Delivery)]
    assert sorted(one.key for one in delivered) == sorted(one.key for one in everything)


def test_messages_of_an_attempt_that_was_given_up_do_not_arrive():
    room = Mailroom([0, 1], lockstep=True)
    for node in (0, 1):
        room.begin(node, 2)
    old = sent(room, 0, 1)
    room.forget(2)
    for node in (0, 1):
        room.begin(node, 2)
    new = sent(room, 0, 1)
    assert room.receive(1, None, 0.0) == []
    assert room.arrived(old) == []
    assert room.arrived(new) == [Handover(1, Delivery(new, 0))]
    assert room.num_in_flight == 0


def test_a_round_that_is_done_again_is_handed_its_own_messages_alone():
    room = Mailroom([-1, 0])
    first, second = sent(room, 0, -1), sent(room, 0, -1)
    room.arrived(first)
    room.receive(-1, None, 0.0)
    room.end(-1)
    room.begin(-1, 1)
    room.arrived(second)
    room.receive(-1, None, 0.0)
    room.stop(-1)
    room.rewind(-1)
    assert [handover.outcome for handover in room.receive(-1, None, 0.0)] == [Delivery(second, 1)]
    assert room.receive(-1, None, 0.0) == []


def test_a_checkpoint_has_heard_what_was_committed():
    room = Mailroom([0, 1])
    room.begin(0, 3)
    room.arrived(sent(room, 0, 1))
    room.receive(1, None, 0.0)
    assert room.to_json()["boxes"]["1"]["heard"] == {}
    room.end(1)
    assert room.to_json()["boxes"]["1"]["heard"] == {"0": 3}


def test_what_vanished_is_sent_again_and_nothing_else():
    room = Mailroom([0, 1])
    room.begin(0, 0)
    lost, arrived = sent(room, 0, 1), sent(room, 0, 1)
    room.vanished(lost)
    room.arrived(arrived)
    room.begin(0, 0)
    assert sent(room, 0, 1).key == lost.key
    assert room.send(0, 1, 8, 0) is None


def test_a_round_that_begins_again_has_heard_of_nothing_since_the_last_commit():
    room = Mailroom([0, 1])
    room.begin(0, 3)
    room.begin(1, 0)
    room.arrived(sent(room, 0, 1))
    room.receive(1, None, 0.0)
    room.begin(1, 0)
    assert sent(room, 1, 0).heard == 0


def test_a_successor_that_begins_the_round_anew_sends_another_message_of_that_name():
    room = Mailroom([0, 1])
    room.begin(0, 2)
    before = sent(room, 0, 1)
    room.left(0)
    room.join(0)
    room.begin(0, 2)
    after = sent(room, 0, 1)
    assert after.key == before.key
    assert room.num_in_flight == 2
    room.arrived(before)
    assert room.num_in_flight == 1
    room.arrived(after)
    restored = Mailroom([0, 1])
    assert [envelope.letter for envelope in restored.restore(room.to_json())] == [-1, -2]
    outcomes = [room.receive(1, None, 0.0)[0].outcome for _ in range(3)]
    assert outcomes == [Left(0), Delivery(before, 0), Delivery(after, 0)]


def handed(room: Mailroom, node: int) -> list[int]:
    """The letters of what a node is handed until nothing is left."""
    letters: list[int] = []
    while handovers := room.receive(node, None, 0.0):
        (handover,) = handovers
        assert isinstance(handover.outcome, Delivery)
        letters.append(handover.outcome.envelope.letter)
    room.stop(node)
    return letters


def test_what_is_handed_again_comes_in_its_order():
    room = Mailroom([-1, 0])
    for letter in (1, 2, 3):
        room.arrived(sent(room, 0, -1, letter))
    assert handed(room, -1) == [1, 2, 3]
    room.rewind(-1)
    assert handed(room, -1) == [1, 2, 3]
    room.again(-1)
    assert handed(room, -1) == [1, 2, 3]


def test_what_a_kept_round_was_handed_is_needed_no_more():
    room = Mailroom([-1, 0])
    room.arrived(sent(room, 0, -1, 1))
    assert handed(room, -1) == [1]
    room.begin(-1, 1)
    room.arrived(sent(room, 0, -1, 2))
    assert handed(room, -1) == [2]
    assert [envelope.letter for envelope in room.kept(-1, 0)] == [1]
    room.again(-1)
    assert handed(room, -1) == [2]


def test_only_the_server_is_handed_again_what_it_was_unless_all_are():
    for remembers, again in ((False, []), (True, [5])):
        room = Mailroom([-1, 0], remembers=remembers)
        room.arrived(sent(room, -1, 0, 5))
        assert handed(room, 0) == [5]
        room.rewind(0)
        assert handed(room, 0) == again


def test_messages_of_a_round_that_begins_again_were_never_sent():
    room = Mailroom([0, 1], lockstep=True)
    room.begin(0, 1)
    room.arrived(sent(room, 0, 1, 1))
    room.begin(0, 2)
    room.arrived(sent(room, 0, 1, 2))
    room.forget(2)
    room.begin(1, 2)
    assert handed(room, 1) == [1]


def test_a_checkpoint_has_what_is_in_boxes_and_what_is_on_its_way():
    room = Mailroom([0, 1])
    room.arrived(sent(room, 0, 1, 1))
    sent(room, 0, 1, 2)
    assert [envelope.letter for envelope in room.waiting()] == [1, 2]
    restored = Mailroom([0, 1])
    assert [envelope.letter for envelope in restored.restore(room.to_json())] == [-1, -2]
    assert handed(restored, 1) == [-1, -2]


def test_who_is_there_keeps_its_box():
    room = Mailroom([0, 1])
    room.arrived(sent(room, 0, 1, 4))
    room.join(1, {0: 7})
    assert handed(room, 1) == [4]
    assert room.known(1) == {0: 7}
