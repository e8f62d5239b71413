"""Carries out and logs the mailroom's decisions on messages between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.wire.tickets import Receiving, Sending
from starling.algorithms.api import SERVER, Left
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.events import Arrived, Unreadable, Vanished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover, Mailroom
    from starling.orchestrator.runtimes.events import Happening


class Mail:
    """The mailboxes of a run."""

    def __init__(
        self,
        state: RunState,
        room: Mailroom,
        on_handover: Callable[[Handover], None],
    ) -> None:
        """``on_handover`` is told of every node that is handed something."""
        self._run = state.run
        self._runtime = state.run.runtime
        self._ledger = state.ledger
        self._on_handover = on_handover
        self.room = room

    def take(self, happening: Happening) -> bool:
        """Handle what concerns messages; return whether ``happening`` did."""
        match happening:
            case Reached(node, Sending(to, letter, _, nbytes)):
                envelope = self.room.send(node, to, nbytes, letter)
                if envelope is None:
                    self._runtime.messages.discard(node, letter)
                else:
                    if node != to:
                        self._ledger.book("server" if SERVER in (node, to) else "peer", nbytes)
                    self._runtime.messages.dispatch(envelope)
            case Vanished(envelope):
                self.room.vanished(envelope)
            case Unreadable(node, envelope, timeout_s):
                self._run.record("unreadable", node=node, message=envelope.key)
                self._hand_over(self.room.receive(node, timeout_s, self._runtime.now))
            case Arrived(envelope):
                self._hand_over(self.room.arrived(envelope))
            case Reached(node, Receiving(timeout_s)):
                self._hand_over(self.room.receive(node, timeout_s, self._runtime.now))
            case _:
                return False
        return True

    def next_timeout(self) -> float | None:
        """Return when ``expire`` is due."""
        return self.room.next_timeout()

    def expire(self) -> bool:
        """Let nodes run on whose receive has timed out; return whether there were any."""
        expired = self.room.expired(self._runtime.now)
        self._hand_over(expired)
        return bool(expired)

    def discard(self, envelopes: Iterable[Envelope]) -> None:
        """Let the runtime forget messages that nobody will be handed again."""
        for envelope in envelopes:
            self._runtime.messages.discard(envelope.sender, envelope.letter)

    def left(self, node: NodeId) -> None:
        """Tell everybody that ``node`` is gone."""
        self._hand_over(self.room.left(node))

    def _hand_over(self, handovers: Iterable[Handover]) -> None:
        for handover in handovers:
            outcome = handover.outcome
            match outcome:
                case Delivery(envelope, _):
                    what: object = envelope.key
                case Left(node):
                    what = {"left": node}
                case _:
                    what = "timeout"
            self._run.record("received", node=handover.node, outcome=what)
            self._runtime.messages.hand_over(handover)
            self._on_handover(handover)
