"""The mailroom: mailboxes of all nodes, as a state machine without IO. Both runtimes and the replay share it.

It decides which message a node receives next, and says so as a ``Handover``; a runtime carries payloads. It is told
the time and knows no clock of its own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from starling.algorithms.api import SERVER, Left, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starling.algorithms.api import NodeId


@dataclass(frozen=True)
class Envelope:
    """A message on its way.

    (sender, round, number) name it for ever, unless a successor of its sender begins that round anew. (sender, letter)
    name it among all messages that are there at one time.
    """

    sender: NodeId
    round: int
    """The sender's."""
    number: int
    """Number of the message among those that the sender sent in that round, from 0."""
    to: NodeId
    nbytes: int
    letter: int
    """The runtime's name for the payload, among those of the sender."""
    heard: int
    """The receiver's round that the sender had last heard of."""
    attempt: int = 0
    """Number of times that a round of all nodes had begun again when it was sent."""

    @property
    def key(self) -> tuple[NodeId, int, int]:
        """Identity of the message: sender, round and number."""
        return self.sender, self.round, self.number


@dataclass(frozen=True)
class Delivery:
    """A message as its receiver gets it."""

    envelope: Envelope
    staleness: int


Outcome: TypeAlias = Delivery | Left | Timeout


@dataclass(frozen=True)
class Handover:
    """``node`` runs on with ``outcome``."""

    node: NodeId
    outcome: Outcome


@dataclass
class _Box:
    """One node's mailbox."""

    round: int = 0
    num_sent: int = 0
    """Number of messages sent in the running round."""
    sent: tuple[int, int] = (-1, -1)
    """(round, number) of the last message: what is not after it was sent before, in an earlier attempt."""
    heard: dict[NodeId, int] = field(default_factory=dict)
    """The round of each other node when it sent its last message that was received, or the state that this node got."""
    known: dict[NodeId, int] = field(default_factory=dict)
    """``heard`` as of the last commit, to which a round that begins again goes back."""
    queue: deque[Envelope | Left | Timeout] = field(default_factory=deque)
    log: list[tuple[int, Envelope | Left | Timeout]] = field(default_factory=list)
    """Messages that were handed over since the kept state, with the round of each; the server's, or all nodes'."""
    unsent: set[tuple[int, int]] = field(default_factory=set)
    """(round, number) of messages that were sent and never arrived."""
    receiving: bool = False
    is_open: bool = False
    """The round has begun, and is not committed."""


class Mailroom:
    """See the module's docstring."""

    def __init__(self, nodes: Iterable[NodeId], *, lockstep: bool = False, remembers: bool = False) -> None:
        self._lockstep = lockstep
        """Whether all nodes do one common round, so that each node knows the round of every other."""
        self._remembers = remembers
        """Whether what anybody is handed is remembered until its round is committed; else only the server's."""
        self._boxes = {node: _Box() for node in nodes}
        self._until: dict[NodeId, float] = {}
        """Deadlines of pending receives, of nodes that wait with a limit."""
        self._num_receiving = 0
        self._attempt = 0
        self._in_flight: dict[tuple[NodeId, int], Envelope] = {}
        """Messages that were sent and have not arrived, by sender and letter: a successor may repeat a key."""

    @property
    def num_in_flight(self) -> int:
        """Messages that were sent and have not arrived."""
        return len(self._in_flight)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Nodes that have a mailbox, sorted."""
        return tuple(sorted(self._boxes))

    @property
    def receiving(self) -> tuple[NodeId, ...]:
        """Nodes that wait for a message, sorted."""
        return tuple(sorted(node for node, box in self._boxes.items() if box.receiving))

    def begin(self, node: NodeId, number: int) -> None:
        """Open round ``number`` of ``node``."""
        self.stop(node)
        box = self._boxes[node]
        box.round, box.num_sent, box.is_open, box.heard = number, 0, True, dict(box.known)

    def end(self, node: NodeId) -> list[Envelope]:
        """Close the round of ``node``, which is committed; return messages that nobody will be handed again."""
        box = self._boxes[node]
        box.is_open, box.known = False, dict(box.heard)
        return [] if node == SERVER else self.kept(node, box.round)

    def send(self, sender: NodeId, to: NodeId, nbytes: int, letter: int) -> Envelope | None:
        """Name a message; return None if nobody is to have it: the receiver is gone, or it was sent before."""
        box = self._boxes[sender]
        number = box.num_sent
        box.num_sent += 1
        name = box.round, number
        if to not in self._boxes or (name <= box.sent and name not in box.unsent):
            return None
        box.sent = max(box.sent, name)
        box.unsent.discard(name)
        heard = box.round if self._lockstep else box.heard.get(to, 0)
        envelope = Envelope(sender, box.round, number, to, nbytes, letter, heard, self._attempt)
        self._in_flight[sender, letter] = envelope
        return envelope

    def arrived(self, envelope: Envelope) -> list[Handover]:
        """Put a message into its receiver's box; return nothing if the receiver computes, or is gone."""
        self._in_flight.pop((envelope.sender, envelope.letter), None)
        if envelope.attempt != self._attempt and self._lockstep:
            return []  # of an attempt that was given up
        return self._put(envelope.to, envelope)

    def vanished(self, envelope: Envelope) -> None:
        """Book that a message will not arrive: its payload was lost with its sender, which may send it again."""
        self._in_flight.pop((envelope.sender, envelope.letter), None)
        box = self._boxes.get(envelope.sender)
        if box is not None:
            box.unsent.add((envelope.round, envelope.number))

    def receive(self, node: NodeId, timeout_s: float | None, now: float) -> list[Handover]:
        """Hand ``node`` its next message, or let it wait for one."""
        self._boxes[node].receiving = True
        self._num_receiving += 1
        if timeout_s is not None:
            self._until[node] = now + timeout_s
        return self._serve(node)

    def next_timeout(self) -> float | None:
        """Return the earliest deadline of all pending receives, or None."""
        return min(self._until.values()) if self._until else None

    def expired(self, now: float) -> list[Handover]:
        """Hand a timeout to all nodes whose deadline has passed."""
        late = sorted(node for node, until in self._until.items() if until <= now)
        for node in late:
            self.stop(node)
            self._note(node, Timeout())
        return [Handover(node, Timeout()) for node in late]

    def join(self, node: NodeId, known: Mapping[NodeId, int] | None = None) -> None:
        """Give ``node`` an empty box; it has heard of others' rounds as ``known`` says. Nobody is told."""
        box = self._boxes.setdefault(node, _Box())
        if known is not None:
            box.known = dict(known)

    def known(self, node: NodeId) -> dict[NodeId, int]:
        """Return the last round of each other node that the last commit of ``node`` has heard of."""
        return dict(self._boxes[node].known) if node in self._boxes else {}

    def leave_out(self, node: NodeId) -> None:
        """Remove the box of ``node``, which is not up yet; nobody is told."""
        self._boxes.pop(node, None)

    def again(self, node: NodeId) -> None:
        """Queue again all messages that ``node`` was handed since its kept state, from which it goes on."""
        box = self._boxes[node]
        box.queue.extendleft(what for _, what in reversed(box.log))
        box.log = []

    def rewind(self, node: NodeId) -> None:
        """Queue again all messages of the open round of ``node``, which does that round again."""
        box = self._boxes[node]
        box.queue.extendleft(what for number, what in reversed(box.log) if number == box.round)
        box.log = [one for one in box.log if one[0] != box.round]

    def kept(self, node: NodeId, number: int) -> list[Envelope]:
        """Forget messages that ``node`` was handed up to round ``number``, whose state is kept; return them."""
        box = self._boxes[node]
        done = [what for round_, what in box.log if round_ <= number and isinstance(what, Envelope)]
        box.log = [one for one in box.log if one[0] > number]
        return done

    def clear(self, node: NodeId) -> list[Envelope]:
        """Empty the box of ``node``, which is gone; return all messages that it would have been handed."""
        box = self._boxes[node]
        found = [what for what in (*(what for _, what in box.log), *box.queue) if isinstance(what, Envelope)]
        box.log = []
        box.queue.clear()
        return found

    def forget(self, number: int) -> None:
        """Forget all messages of round ``number``, which begins again."""
        for node, box in self._boxes.items():
            self.stop(node)
            box.queue = deque(one for one in box.queue if not isinstance(one, Envelope) or one.round < number)
            if box.sent >= (number, 0):
                box.sent = number, -1
        self._attempt += 1

    def left(self, node: NodeId) -> list[Handover]:
        """Remove ``node``, which is gone, and put ``Left`` into every other box."""
        self.stop(node)
        self._boxes.pop(node, None)
        return [handover for other in self.nodes for handover in self._put(other, Left(node))]

    def stop(self, node: NodeId) -> None:
        """Let ``node`` wait for nothing any more."""
        self._until.pop(node, None)
        box = self._boxes.get(node)
        if box is not None and box.receiving:
            box.receiving = False
            self._num_receiving -= 1

    def stuck(self, nodes: Iterable[NodeId]) -> bool:
        """Whether all of ``nodes`` wait for a message, without end, and none is on its way."""
        if not self._num_receiving or self.num_in_flight or self._until:
            return False
        return all(self._boxes[node].receiving for node in nodes)

    def _put(self, node: NodeId, what: Envelope | Left) -> list[Handover]:
        box = self._boxes.get(node)
        if box is None:
            return []
        box.queue.append(what)
        return self._serve(node) if box.receiving else []

    def _serve(self, node: NodeId) -> list[Handover]:
        """Hand the next message to a node that waits, if there is one."""
        box = self._boxes[node]
        what = self._choose(node, box.queue)
        if what is None:
            return []
        self.stop(node)
        self._note(node, what)
        if not isinstance(what, Envelope):
            return [Handover(node, what)]
        box.heard[what.sender] = what.round
        return [Handover(node, Delivery(what, box.round - what.heard))]

    def _note(self, node: NodeId, what: Envelope | Left | Timeout) -> None:
        if self._remembers or node == SERVER:
            box = self._boxes[node]
            box.log.append((box.round, what))

    def _choose(self, node: NodeId, queue: deque[Envelope | Left | Timeout]) -> Envelope | Left | Timeout | None:
        """Return the next message for a node: the one that came first."""
        del node
        return queue.popleft() if queue else None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def waiting(self) -> list[Envelope]:
        """Return messages in boxes and on their way, those too that are handed over again."""
        boxed = [what for box in self._boxes.values() for what in self._open(box) if isinstance(what, Envelope)]
        return boxed + [envelope for envelope in self._in_flight.values() if self._counts(envelope)]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``restore``; each open round is one that has not begun.

        Letters have other names in it: -1, -2, … in the order of ``waiting``.
        """
        letters = {(one.sender, one.letter): -1 - place for place, one in enumerate(self.waiting())}
        arriving: defaultdict[NodeId, list[Envelope]] = defaultdict(list)
        for envelope in self._in_flight.values():
            if self._counts(envelope):
                arriving[envelope.to].append(envelope)
        return {
            "attempt": self._attempt,
            "arriving": {str(node): [_written(one, letters) for one in those] for node, those in arriving.items()},
            "boxes": {
                str(node): {
                    "round": box.round,
                    "sent": box.sent,
                    "heard": {str(other): number for other, number in box.known.items()},
                    "unsent": sorted(box.unsent),
                    "queue": [_written(what, letters) for what in self._open(box)],
                }
                for node, box in self._boxes.items()
            },
        }

    def restore(self, state: Mapping[str, Any], *, exactly: bool = False) -> list[Envelope]:
        """Go on from what ``to_json`` gave, for the nodes that are up; return the messages that wait.

        Messages in flight count as arrived, unless the state is to be ``exactly`` as it was; then every node that had a
        mailbox has one.
        """
        self._attempt = state["attempt"]
        if exactly:
            self._boxes = {int(node): self._boxes.get(int(node), _Box()) for node in state["boxes"]}
        for node, box in self._boxes.items():
            saved = state["boxes"].get(str(node))
            if saved is not None:
                box.round = saved["round"]
                box.sent = cast("tuple[int, int]", tuple(saved["sent"]))
                box.known = {int(other): number for other, number in saved["heard"].items()}
                box.heard = dict(box.known)
                box.unsent = {(number, place) for number, place in saved["unsent"]}
                box.queue = deque(_read(what) for what in saved["queue"])
        for node, those in state.get("arriving", {}).items():
            arriving = [cast("Envelope", _read(what)) for what in those]
            if exactly:
                self._in_flight |= {(one.sender, one.letter): one for one in arriving}
            elif int(node) in self._boxes:
                self._boxes[int(node)].queue.extend(arriving)
        return self.waiting()

    @property
    def in_flight(self) -> list[Envelope]:
        """Messages that were sent and have not arrived."""
        return list(self._in_flight.values())

    def _open(self, box: _Box) -> list[Envelope | Left | Timeout]:
        again = [what for number, what in box.log if number == box.round and box.is_open and not self._lockstep]
        return [*again, *box.queue]

    def _counts(self, envelope: Envelope) -> bool:
        """Whether the message belongs to the current attempt and its receiver has a mailbox."""
        return envelope.to in self._boxes and not (self._lockstep and envelope.attempt != self._attempt)


def _written(what: Envelope | Left | Timeout, letters: Mapping[tuple[NodeId, int], int]) -> Any:  # noqa: ANN401 - JSON
    match what:
        case Envelope():
            return asdict(what) | {"letter": letters[what.sender, what.letter]}
        case Left(node):
            return {"left": node}
        case _:
            return "timeout"


def _read(what: Any) -> Envelope | Left | Timeout:  # noqa: ANN401 - JSON
    if what == "timeout":
        return Timeout()
    return Left(what["left"]) if "left" in what else Envelope(**what)
