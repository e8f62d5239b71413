"""Messages between nodes, as the controller handles them: the mailroom decides, the runtime carries, the log tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.wire.tickets import Receiving, Sending
from starling.algorithms.api import SERVER, Left
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.protocol.mailboxes import Delivery, Mailroom
from starling.orchestrator.runtimes.events import Arrived, Unreadable, Vanished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.run_state import Progress
    from starling.orchestrator.protocol.mailboxes import Handover
    from starling.orchestrator.runtimes.events import Happening


class Mail:
    """The mailboxes of a run."""

    def __init__(
        self,
        progress: Progress,
        room: Mailroom | None = None,
        on_handover: Callable[[Handover], None] = lambda _: None,
    ) -> None:
        """``on_handover`` is told of every node that is handed something."""
        self._progress = progress
        self._on_handover = on_handover
        self._runtime = progress.runtime
        self.room = room or Mailroom(progress.facts)

    def take(self, happening: Happening) -> bool:
        """Handle what concerns messages; say whether it was that."""
        match happening:
            case Reached(node, Sending(to, letter, _, nbytes)):
                envelope = self.room.send(node, to, nbytes, letter)
                if envelope is None:
                    self._runtime.messages.discard(node, letter)
                else:
                    if node != to:
                        self._progress.ledger.book("server" if SERVER in (node, to) else "peer", nbytes)
                    self._runtime.messages.dispatch(envelope)
            case Vanished(envelope):
                self.room.vanished(envelope)
            case Unreadable(node, envelope, timeout_s):
                self._progress.record("unreadable", node=node, message=envelope.key)
                self._hand_over(self.room.receive(node, timeout_s, self._runtime.now))
            case Arrived(envelope):
                self._hand_over(self.room.arrived(envelope))
            case Reached(node, Receiving(timeout_s)):
                self._hand_over(self.room.receive(node, timeout_s, self._runtime.now))
            case _:
                return False
        return True

    def next_timeout(self) -> float | None:
        """When ``expire`` is due."""
        return self.room.next_timeout()

    def expire(self) -> None:
        """Let those run on that have waited long enough."""
        self._hand_over(self.room.expired(self._runtime.now))

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
            self._progress.record("received", node=handover.node, outcome=what)
            self._runtime.messages.hand_over(handover)
            self._on_handover(handover)
