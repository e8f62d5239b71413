"""Messages between nodes on Ray: small payloads travel with the calls, large ones through the object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from starling.actors.remote.messages import Letter
from starling.actors.replica.message_export import packed, unpacked
from starling.actors.wire.tickets import Sending
from starling.algorithms.api import INLINE_LIMIT_BYTES, SERVER
from starling.orchestrator.errors import RunError
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.cluster.session import reason_of
from starling.orchestrator.runtimes.events import Arrived, Unreadable, Vanished
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray import ObjectRef

    from starling.actors.remote.messages import Reply
    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.attempt import RunningAttempt
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.programs import ProgramDriver
    from starling.orchestrator.runtimes.cluster.store import StoreRoom
    from starling.orchestrator.runtimes.cluster.transport import Transport

_FETCH_TIMEOUT_S = 600.0


class SentLetters:
    """Payloads that were sent and not delivered, by sender and number.

    Args:
        transport: counts small payloads.
        room: checks that a large payload fits into its sender's object store.
    """

    def __init__(self, transport: Transport, room: StoreRoom) -> None:
        self._transport = transport
        self._room = room
        self.payloads: dict[tuple[NodeId, int], tuple[Sending, ObjectRef[Any] | None]] = {}
        """Messages by node and number, each with its reference once a large payload is in the store."""

    def add(self, node: NodeId, sending: Sending) -> None:
        """Take a message.

        Raises:
            ClusterError: it does not fit into the store.
        """
        self.payloads[node, sending.letter] = sending, None
        if sending.inline is None:
            self._room.check_message(node, sending.nbytes)
        else:
            self._transport.count(sending.nbytes)


class ClusterMessages:
    """Carries payloads from senders to receivers.

    Args:
        loop: reports arrivals.
        pool: the actors.
        attempt: the running epoch.
        letters: the payloads.
        programs: takes the replies of receivers.
        transport: counts and throttles payloads.
        keeps: hold delivered payloads until they are discarded, as they may have to be delivered again; the server's
            are held in any case.
    """

    def __init__(
        self,
        loop: EventLoop,
        pool: ActorPool,
        attempt: RunningAttempt,
        letters: SentLetters,
        programs: ProgramDriver,
        transport: Transport,
        *,
        keeps: bool,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._attempt = attempt
        self._letters = letters.payloads
        self._programs = programs
        self._transport = transport
        self._keeps = keeps

    def dispatch(self, envelope: Envelope) -> None:
        key = envelope.sender, envelope.letter
        sending, _ = self._letters[key]
        due = self._transport.arrival(self._loop.now, Cast({envelope.sender: envelope.nbytes}, [envelope.to]))

        def arrive() -> None:
            self._loop.at(due, lambda: self._loop.report(Arrived(envelope)))

        if sending.inline is not None:
            arrive()
            return
        home = self._pool.home[envelope.sender]
        done, data = home.handle.outbox.options(num_returns=2).remote(envelope.letter)
        self._letters[key] = sending, data
        self._pool.call(
            home,
            done,
            lambda _actor, _done: arrive(),
            on_error=lambda: self._loop.report(Vanished(envelope)),
        )

    def discard(self, node: NodeId, letter: int) -> None:
        sending, data = self._letters.pop((node, letter))
        if sending.inline is None and data is None:
            self._pool.home[node].handle.discard.remote(letter)

    def hand_over(self, handover: Handover) -> None:
        node, outcome = handover.node, handover.outcome
        actor = self._pool.home[node]
        if not isinstance(outcome, Delivery):
            self._programs.run_on(actor, [(node, outcome)])
            return
        envelope = outcome.envelope
        key = envelope.sender, envelope.letter
        keeps = node == SERVER or self._keeps
        sending, data = self._letters[key] if keeps else self._letters.pop(key)
        self._transport.count(envelope.nbytes)
        letter = Letter(
            sender=envelope.sender,
            staleness=outcome.staleness,
            round=envelope.round,
            specs=sending.specs,
            inline=sending.inline,
            ref=() if data is None else (data,),
        )

        def done(actor: Actor, reply: Reply | None) -> None:
            if reply is not None:
                self._programs.on_reply(actor, reply)
                return
            self._loop.report(Unreadable(node, envelope))

        self._pool.call(actor, actor.handle.receive.remote(self._attempt.epoch, node, letter), done)

    def export(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        return _gathered([self._letters[one.sender, one.letter] for one in envelopes])

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        payloads = list(unpacked(letters))
        for one in envelopes:
            specs, data = payloads[-1 - one.letter]
            is_inline = one.nbytes <= INLINE_LIMIT_BYTES
            sending = Sending(one.to, one.letter, specs, one.nbytes, data if is_inline else None)
            self._letters[one.sender, one.letter] = sending, None if is_inline else ray.put(data)


def _gathered(kept: Sequence[tuple[Sending, ObjectRef[Any] | None]]) -> Iterator[StateExport]:
    """Yield waiting messages as one export; a generator, so that nothing is fetched before it is consumed.

    Raises:
        RunError: a payload is lost, with its sender.
    """
    try:
        data: list[Any] = [one.inline if ref is None else ray.get(ref, timeout=_FETCH_TIMEOUT_S) for one, ref in kept]
    except ray.exceptions.RayError as error:
        raise RunError(f"a message that waits for its receiver is lost: {reason_of(error)}") from None
    yield packed([one.specs for one, _ in kept], data)
