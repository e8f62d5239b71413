"""The node actor's calls about messages between ``Send`` and ``Receive``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.remote.messages import Letter, Reply
from starling.actors.remote.remote_calls import remote_call
from starling.actors.wire.tickets import Stale
from starling.algorithms.api import Message

if TYPE_CHECKING:
    from starling.actors.host.host import Host
    from starling.actors.remote.program_calls import ProgramCalls
    from starling.actors.remote.running_epoch import RunningEpoch
    from starling.actors.remote.store_calls import StoreCalls
    from starling.algorithms.api import NodeId


class MessageCalls:
    """Hands out the large messages that the process's nodes sent, and takes those that they receive.

    Args:
        host: of the nodes.
        epoch: the running attempt.
        store: fetches payloads.
        programs: run on with messages.
    """

    def __init__(self, host: Host, epoch: RunningEpoch, store: StoreCalls, programs: ProgramCalls) -> None:
        self._host, self._epoch, self._store, self._programs = host, epoch, store, programs

    @remote_call("exchange")
    def outbox(self, letter: int) -> list[Any]:
        """Put a large message into the store: an acknowledgement, then the payload as a value of its own."""
        return [True, self._host.outbox.take(letter)]

    @remote_call("control")
    def discard(self, letter: int) -> None:
        """Drop a large message that nobody will fetch."""
        self._host.outbox.discard(letter)

    @remote_call("compute")
    def receive(self, epoch: int, node: NodeId, letter: Letter) -> Reply | None:
        """Run a program on with a message; ``None`` if its payload is nowhere to be had."""
        if epoch != self._epoch.number:
            return Reply([(node, Stale())])
        data = letter.inline
        if data is None:
            fetched = self._store.fetch(dict(enumerate(letter.ref)))
            if not fetched:
                return None
            data = fetched[0]
        payload = self._host.unpack(node, letter.specs, data)
        message = Message(letter.sender, payload, letter.staleness, letter.round)
        return self._programs.drive([(node, message)])
