"""Messages between simulated nodes: payloads stay in memory, and arrive when the network says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.replica.message_export import packed, unpacked
from starling.actors.replica.state_transfer import copied
from starling.actors.wire.tickets import Sending
from starling.algorithms.api import INLINE_LIMIT_BYTES, SERVER, Message
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.events import Arrived
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starling.actors.replica.state_transfer import StateExport
    from starling.actors.wire.buffers import Buffer
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover
    from starling.orchestrator.runtimes.network import Network
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes


class SimulatedMessages:
    """Holds payloads between ``Send`` and ``Receive``.

    Args:
        clock: schedules arrivals.
        nodes: the host has large payloads.
        network: how long messages take.
        keeps: hold delivered payloads until they are discarded, as they may have to be delivered again; the server's
            are held in any case.
    """

    def __init__(self, clock: VirtualClock, nodes: SimulatedNodes, network: Network, *, keeps: bool) -> None:
        self._clock = clock
        self._nodes = nodes
        self._network = network
        self._letters: dict[int, Sending] = {}
        self._keeps = keeps

    def add(self, sending: Sending) -> None:
        """Take a message."""
        self._letters[sending.letter] = sending

    def dispatch(self, envelope: Envelope) -> None:
        now, phase = self._clock.now, [Cast({envelope.sender: envelope.nbytes}, [envelope.to])]
        self._clock.at(self._network.arrivals(now, phase).get(envelope.to, now), envelope.to, Arrived(envelope))

    def discard(self, node: NodeId, letter: int) -> None:
        del node
        sending = self._letters.pop(letter)
        if sending.inline is None:
            self._nodes.host.outbox.discard(letter)

    def hand_over(self, handover: Handover) -> None:
        outcome = handover.outcome
        result: object = outcome
        if isinstance(outcome, Delivery):
            envelope = outcome.envelope
            sending = self._letters[envelope.letter]
            data = self._data(sending)
            if handover.node != SERVER and not self._keeps:
                self.discard(envelope.sender, envelope.letter)
            payload = self._nodes.host.unpack(handover.node, sending.specs, data)
            result = Message(envelope.sender, payload, outcome.staleness, envelope.round)
        self._clock.resume_at(self._clock.now, handover.node, result)

    def _data(self, sending: Sending) -> Buffer:
        return self._nodes.host.outbox.read(sending.letter) if sending.inline is None else sending.inline

    def export(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        sendings = [self._letters[one.letter] for one in envelopes]
        return iter([copied(packed([one.specs for one in sendings], [self._data(one) for one in sendings]))])

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        payloads = list(unpacked(letters))
        for one in envelopes:
            specs, data = payloads[-1 - one.letter]
            is_inline = one.nbytes <= INLINE_LIMIT_BYTES
            self._letters[one.letter] = Sending(one.to, one.letter, specs, one.nbytes, data if is_inline else None)
            if not is_inline:
                self._nodes.host.outbox.put(one.letter, data)
