"""The mailroom: mailboxes of all nodes, as a state machine without IO. Both runtimes and the replay share it.

It decides which message a node receives next, and says so as a ``Handover``; a runtime carries payloads. It is told
the time and knows no clock of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from algorithms.api import SERVER, Left, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from algorithms.api import NodeId


@dataclass(frozen=True)
class Envelope:
    """A message on its way; (sender, round, number) name it for ever."""

    sender: NodeId
    round: int
    """The sender's."""
    number: int
    """Of the messages that the sender sent in that round, from 0."""
    to: NodeId
    nbytes: int
    letter: int
    """The runtime's name for the payload."""
    heard: int
    """The receiver's round that the sender had last heard of."""
    attempt: int = 0
    """How often a round of all had been begun again when it was sent."""

    @property
    def key(self) -> tuple[NodeId, int, int]:
        """What names the message."""
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
    """In the running round."""
    sent: tuple[int, int] = (-1, -1)
    """(round, number) of the last message: what is not after it was sent before, in an earlier attempt."""
    heard: dict[NodeId, int] = field(default_factory=dict)
    """Of each other node: its round when it sent what was received from it last."""
    queue: deque[Envelope | Left | Timeout] = field(default_factory=deque)
    log: list[tuple[int, Envelope | Left | Timeout]] = field(default_factory=list)
    """Of the server: what it was handed, in order, and in which round, since what is kept of it."""
    unsent: set[tuple[int, int]] = field(default_factory=set)
    """(round, number) of messages that were sent and never arrived."""
    receiving: bool = False


class Mailroom:
    """See the module's docstring."""

    def __init__(self, nodes: Iterable[NodeId], *, lockstep: bool = False) -> None:
        self._lockstep = lockstep
        """All do the same round, so that everybody knows of everybody's."""
        self._boxes = {node: _Box() for node in nodes}
        self._until: dict[NodeId, float] = {}
        """Of those that wait with a limit."""
        self._num_receiving = 0
        self._attempt = 0
        self.num_in_flight = 0
        """Messages that were sent and have not arrived."""

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Who is there, sorted."""
        return tuple(sorted(self._boxes))

    @property
    def receiving(self) -> tuple[NodeId, ...]:
        """Who waits for a message, sorted."""
        return tuple(sorted(node for node, box in self._boxes.items() if box.receiving))

    def begin(self, node: NodeId, number: int) -> None:
        """``node`` begins round ``number``."""
        self.stop(node)
        box = self._boxes[node]
        box.round, box.num_sent = number, 0

    def send(self, sender: NodeId, to: NodeId, nbytes: int, letter: int) -> Envelope | None:
        """Give a message its name; ``None`` if nobody is to have it: the receiver is gone, or it was sent before."""
        box = self._boxes[sender]
        number = box.num_sent
        box.num_sent += 1
        name = box.round, number
        if to not in self._boxes or (name <= box.sent and name not in box.unsent):
            return None
        box.sent = max(box.sent, name)
        box.unsent.discard(name)
        self.num_in_flight += 1
        heard = box.round if self._lockstep else box.heard.get(to, 0)
        return Envelope(sender, box.round, number, to, nbytes, letter, heard, self._attempt)

    def arrived(self, envelope: Envelope) -> list[Handover]:
        """A message has come to its receiver's box; empty if the receiver works, or is gone."""
        self.num_in_flight -= 1
        if envelope.attempt != self._attempt and self._lockstep:
            return []  # of an attempt that was given up
        return self._put(envelope.to, envelope)

    def vanished(self, envelope: Envelope) -> None:
        """A message will not arrive: its payload was lost with its sender, who may send it again."""
        self.num_in_flight -= 1
        box = self._boxes.get(envelope.sender)
        if box is not None:
            box.unsent.add((envelope.round, envelope.number))

    def receive(self, node: NodeId, timeout_s: float | None, now: float) -> list[Handover]:
        """``node`` waits for a message."""
        self._boxes[node].receiving = True
        self._num_receiving += 1
        if timeout_s is not None:
            self._until[node] = now + timeout_s
        return self._serve(node)

    def next_timeout(self) -> float | None:
        """When the first of those that wait has waited long enough."""
        return min(self._until.values()) if self._until else None

    def expired(self, now: float) -> list[Handover]:
        """Those that have waited long enough."""
        late = sorted(node for node, until in self._until.items() if until <= now)
        for node in late:
            self.stop(node)
            self._note(node, Timeout())
        return [Handover(node, Timeout()) for node in late]

    def join(self, node: NodeId) -> None:
        """``node`` is there, with an empty box; nobody is told."""
        self._boxes.setdefault(node, _Box())

    def again(self, node: NodeId) -> None:
        """``node`` goes on from what is kept of it: it is handed again what it was handed since, in the same order."""
        box = self._boxes[node]
        box.queue.extendleft(what for _, what in reversed(box.log))
        box.log = []

    def kept(self, node: NodeId, number: int) -> list[Envelope]:
        """What ``node`` committed in round ``number`` is kept: return the messages until then, needed no more."""
        box = self._boxes[node]
        done = [what for round_, what in box.log if round_ <= number and isinstance(what, Envelope)]
        box.log = [one for one in box.log if one[0] > number]
        return done

    def forget(self, number: int) -> None:
        """Round ``number`` begins again: what was sent in it was never sent."""
        for node, box in self._boxes.items():
            self.stop(node)
            box.queue = deque(one for one in box.queue if not isinstance(one, Envelope) or one.round < number)
            if box.sent >= (number, 0):
                box.sent = number, -1
        self._attempt += 1

    def left(self, node: NodeId) -> list[Handover]:
        """``node`` is gone: everybody else is told once."""
        self.stop(node)
        self._boxes.pop(node, None)
        return [handover for other in self.nodes for handover in self._put(other, Left(node))]

    def stop(self, node: NodeId) -> None:
        """``node`` waits for nothing any more."""
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
        """Hand the next message to a node that waits."""
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
        if node == SERVER:
            box = self._boxes[node]
            box.log.append((box.round, what))

    def _choose(self, node: NodeId, queue: deque[Envelope | Left | Timeout]) -> Envelope | Left | Timeout | None:
        """What the node is to receive: what came first."""
        del node
        return queue.popleft() if queue else None
