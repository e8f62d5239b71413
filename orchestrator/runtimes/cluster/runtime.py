"""The Ray runtime: nodes in actors, tensors through the object store, directly between the nodes.

Three layers: ``processes`` starts and ends what nodes live in, ``data_plane`` drives programs and moves what they
exchange, and this one has messages, state transfer and results.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

import ray
import ray.exceptions

from starling.actors.remote.messages import Letter
from starling.actors.replica.message_export import packed, unpacked
from starling.actors.replica.state_transfer import donor_among, with_shared
from starling.actors.wire.tickets import Failed, Sending
from starling.algorithms.api import INLINE_LIMIT_BYTES, SERVER
from starling.orchestrator.errors import NodeFailedError, NodeGoneError, RunError
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.cluster.exchanges import DataPlane
from starling.orchestrator.runtimes.cluster.session import reason_of
from starling.orchestrator.runtimes.events import (
    Arrived,
    FinalModel,
    Kept,
    Loaded,
    NotLoaded,
    Retired,
    Unreadable,
    Vanished,
)
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.data import Position
    from starling.actors.remote.messages import Reply
    from starling.actors.replica.catch_up import Transcript
    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover
    from starling.orchestrator.runtimes.cluster.calls import Actor

_CALL_TIMEOUT_S = 600.0
"""Bound on calls whose duration is the user's model: evaluation, saving."""


class Cluster(DataPlane):
    """The runtime on Ray; see ``runtime.Runtime`` for its contract."""

    virtual = False
    standing = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._kept: dict[NodeId, list[ObjectRef[Any]]] = {}
        """All that was committed by nodes that have left, and by the server; the last has the shared state."""
        self._loading: dict[NodeId, NodeId] = {}
        """Who is being given state, and whose."""
        self._num_snapshots = 0
        self.keeps_delivered = False
        self._base: tuple[int, ObjectRef[Any]] | None = None
        """The first round that is replayed, and where the model before it is in the store."""

    @property
    def processes(self) -> Self:
        """Itself, as each of its parts."""
        return self

    programs = messages = states = models = processes

    def close(self) -> None:
        self._contributions, self._reduced, self._kept, self._letters = {}, {}, {}, {}
        super().close()

    # --- messages ----------------------------------------------------------------------------------------------------

    def dispatch(self, envelope: Envelope) -> None:
        key = envelope.sender, envelope.letter
        sending, _ = self._letters[key]
        due = self._arrivals(lambda: [Cast({envelope.sender: envelope.nbytes}, [envelope.to])]).get(envelope.to)

        def arrive() -> None:
            self._at(due, lambda: self._ready.append(Arrived(envelope)))

        if sending.inline is not None:
            arrive()
            return
        home = self._home[envelope.sender]
        done, data = home.handle.outbox.options(num_returns=2).remote(envelope.letter)
        self._letters[key] = sending, data
        self._call(
            home,
            done,
            lambda _actor, _done: arrive(),
            on_error=lambda: self._ready.append(Vanished(envelope)),
        )

    def discard(self, node: NodeId, letter: int) -> None:
        sending, data = self._letters.pop((node, letter))
        if sending.inline is None and data is None:
            self._home[node].handle.discard.remote(letter)

    def hand_over(self, handover: Handover) -> None:
        node, outcome = handover.node, handover.outcome
        actor = self._home[node]
        if not isinstance(outcome, Delivery):
            self._run_on(actor, [(node, outcome)])
            return
        envelope = outcome.envelope
        key = envelope.sender, envelope.letter
        # It may have to be handed over again.
        keeps = node == SERVER or self.keeps_delivered
        sending, data = self._letters[key] if keeps else self._letters.pop(key)
        self.transport_nbytes += envelope.nbytes
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
                self._on_reply(actor, reply)
                return
            self._ready.append(Unreadable(node, envelope))

        self._call(actor, actor.handle.receive.remote(self._epoch, node, letter), done)

    def export(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        kept = [self._letters[one.sender, one.letter] for one in envelopes]
        return _gathered(kept)

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        payloads = list(unpacked(letters))
        for one in envelopes:
            specs, data = payloads[-1 - one.letter]
            is_inline = one.nbytes <= INLINE_LIMIT_BYTES
            sending = Sending(one.to, one.letter, specs, one.nbytes, data if is_inline else None)
            self._letters[one.sender, one.letter] = sending, None if is_inline else ray.put(data)

    # --- state of nodes that come and go -----------------------------------------------------------------------------

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        for actor, nodes in self._by_actor(committed):
            if actor.alive:
                # Not waited for: calls of one group run in the order in which they were made.
                actor.handle.settle.remote({node: committed[node] for node in nodes})

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        for node in nodes:
            self._retiring.add(node)
            actor = self._home[node]
            if node in empty:
                self._retire(actor, node, 0, None)
                continue
            self._export(node, lambda nbytes, ref, node=node, actor=actor: self._retire(actor, node, nbytes, ref))

    def _retire(self, actor: Actor, node: NodeId, nbytes: int, ref: ObjectRef[Any] | None) -> None:
        if self._home[node] is not actor or node not in self._retiring:
            return  # it died while its state was copied, and that was told
        if ref is not None:
            self._kept[node] = [ref]
        self._retiring.discard(node)
        self._retired.add((actor.index, node))
        if all((actor.index, other) in self._retired for other in actor.nodes):
            actor.alive = False
            ray.kill(actor.handle, no_restart=True)
        self._on_gone(node)
        self._succeed(node)
        self._ready.append(Retired(node, nbytes))

    def keep(self, node: NodeId, number: int) -> None:
        actor = self._home[node]

        def done(nbytes: int, ref: ObjectRef[Any]) -> None:
            # Another may be there already, which has been given what was kept before.
            if self._home[node] is actor:
                self._kept[node] = [ref]
                self._ready.append(Kept(node, number, nbytes))

        self._export(node, done)

    def release(self, node: NodeId) -> None:
        self._kept.pop(node, None)

    def _export(self, node: NodeId, then: Callable[[int, ObjectRef[Any]], None]) -> None:
        """Put all that a node has committed where it outlives the node's machine, if there is another."""
        actor = self._home[node]
        size, ref = actor.handle.export.options(num_returns=2).remote(node, True)
        other = next((one for one in self._actors if self._is_elsewhere(one, actor)), None)

        def exported(_: Actor, nbytes: int) -> None:
            if other is None or not other.alive:
                then(nbytes, ref)
                return
            held, copy = other.handle.hold.options(num_returns=2).remote([ref])
            self._call(
                other,
                held,
                lambda _, is_there: then(nbytes, copy if is_there else ref),
                on_error=lambda: then(nbytes, ref),
            )

        self._call(actor, size, exported)
        self._limit(actor, size, "it did not hand over what it holds")

    @staticmethod
    def _is_elsewhere(one: Actor, actor: Actor) -> bool:
        if not one.alive or one.leaving or one.ready is None or actor.ready is None:
            return False
        return one.ready.machine != actor.ready.machine

    def _limit(self, actor: Actor, ref: ObjectRef[Any], what: str, times: int = 1) -> None:
        """A process that does not answer in time is taken for lost."""
        seconds = times * self._config.cluster.round_deadline_s

        advice = "cluster.round_deadline_s" if times == 1 else f"{times} × cluster.round_deadline_s"

        def check() -> None:
            if actor.alive and not ray.wait([ref], timeout=0)[0]:
                self._lost(actor, TimeoutError(f"{what} within {seconds:g} s ({advice})"))

        self._after(seconds, check)

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        home = self._home[donor]
        size, ref = home.handle.export.options(num_returns=2).remote(donor, False)
        self._limit(home, size, "it did not hand over its state")
        self._load(joiner, donor, [ref], position)

    def replay(
        self,
        joiner: NodeId,
        donor: NodeId,
        transcript: Transcript,
        base: bytes | None,
        position: Position | None = None,
    ) -> None:
        if base is not None and (self._base is None or self._base[0] != transcript.first):
            self._base = transcript.first, ray.put(base)
        refs = [] if base is None or self._base is None else [self._base[1]]
        actor = self._home[joiner]
        records = list(transcript.records)
        self._await_load(joiner, donor, actor.handle.replay.remote(joiner, transcript.first, records, refs, position))

    def restore(self, node: NodeId) -> bool:
        refs = self._kept.get(node)
        if refs is not None:
            self._load(node, node, refs, None)
        return refs is not None

    def _load(self, node: NodeId, source: NodeId, refs: Sequence[ObjectRef[Any]], position: Position | None) -> None:
        actor = self._home[node]
        # In a list, so that Ray does not fetch them: a donor that is gone is no failure of the joiner's.
        self._await_load(node, source, actor.handle.load.remote(node, source, refs, position))

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        self._num_snapshots += 1
        number = self._num_snapshots
        there: dict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            actor = self._home[node]
            if actor.alive and (actor.index, node) not in self._retired and node not in kept:
                there[actor.index].append(node)
        calls: dict[NodeId, list[ObjectRef[Any]]] = {node: self._kept[node] for node in nodes if node in self._kept}
        for index, those in there.items():
            handle = self._actors[index].handle
            handle.keep.remote(those, shared, number)
            # At once: what a node hands over is there also when it leaves after that.
            calls |= {node: [handle.kept.remote(node, number)] for node in those}
        return _exports([(node, calls[node]) for node in nodes if node in calls])

    def adopt(self, saved: Mapping[NodeId, StateExport]) -> None:
        donor = donor_among(saved)
        shared = ray.put(donor)
        for node, export in saved.items():
            self._kept[node] = (
                [shared] if export is donor else [ray.put(export)] + [shared] * (export.meta["shared"] is None)
            )

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        del seconds
        self.transport_nbytes = transport_nbytes or 0

    def _await_load(self, node: NodeId, source: NodeId, call: ObjectRef[Any]) -> None:
        self._loading[node] = source
        actor, began = self._home[node], self.now

        def done(actor: Actor, result: int | Failed | None) -> None:
            self._loading.pop(node, None)
            if isinstance(result, Failed):
                self._lost(actor, RuntimeError(result.message))
            elif result is None:
                self._ready.append(NotLoaded(node, source))
            else:
                self._at(self._loaded_at(node, source, result, began), lambda: loaded(result))

        def loaded(nbytes: int) -> None:
            # Whoever has died meanwhile, and was embodied anew, has none of it.
            if actor.alive and self._home[node] is actor:
                self._ready.append(Loaded(node, source, nbytes))

        self._call(actor, call, done)
        # A donor has as long to hand it over as this one to take it.
        self._limit(actor, call, "it did not take over the state", times=2)

    def _loaded_at(self, node: NodeId, source: NodeId, nbytes: int, began: float) -> float | None:
        """When the network has brought ``nbytes`` of state; what was kept of a node lies with another."""
        if self._network.is_instant:
            return None
        others = (other for other, home in sorted(self._home.items()) if other != node and home.alive)
        holder = source if source != node else next(others, node)
        return self._network.arrivals(began, [Cast({holder: nbytes}, [node])]).get(node)

    def _on_gone(self, node: NodeId) -> None:
        self._loading.pop(node, None)
        for joiner, source in self._loading.items():
            if source == node and self._home[joiner].alive:
                self._home[joiner].handle.give_up.remote(None, node)

    # --- results -----------------------------------------------------------------------------------------------------

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None) -> dict[str, float]:
        first, *others = nodes
        models = self._models(others)
        result = self._ask(first, self._home[first].handle.evaluate.remote(first, models, max_batches))
        if isinstance(result, Failed):
            raise NodeFailedError(result.message, result.traceback)
        return result

    def _models(self, nodes: Sequence[NodeId]) -> list[ObjectRef[Any]]:
        """The committed models of ``nodes``, in the store."""
        answers = [self._home[node].handle.committed_model.options(num_returns=2).remote(node) for node in nodes]
        for node, (done, _) in zip(nodes, answers, strict=True):
            self._ask(node, done)
        return [model for _, model in answers]

    def fetch(self, nodes: Sequence[NodeId]) -> FinalModel:
        first, *others = nodes
        digest, data = self._ask(first, self._home[first].handle.model.remote(first, self._models(others)))
        return FinalModel(digest, data)

    def _ask(self, node: NodeId, ref: ObjectRef[Any]) -> Any:  # noqa: ANN401 - what the call returns
        """Wait for one call, bounded, while nothing else goes on; a node that dies meanwhile is named."""
        try:
            return ray.get(ref, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            actor = self._home[node]
            if actor.alive:
                self._lost(actor, error)
            message = f"node {node} ({self._facts_of(actor).place}) was lost: {reason_of(error)}"
            raise NodeGoneError(node, message) from None


def _exports(calls: Sequence[tuple[NodeId, list[ObjectRef[Any]]]]) -> Iterator[tuple[NodeId, StateExport]]:
    """What calls return, one after the other; who died is left out.

    Raises:
        RunError: one that lives does not give its state, or Ray is gone.
    """
    for node, refs in calls:
        if not ray.is_initialized():
            raise RunError("the run's Ray is gone")  # and to ask would start another
        try:
            exports: list[StateExport] = ray.get(refs, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise RunError(f"node {node} does not give its state: {reason_of(error)}") from None
        except ray.exceptions.RayError:
            continue
        yield node, exports[0] if len(exports) == 1 else with_shared(*exports)


def _gathered(kept: Sequence[tuple[Sending, ObjectRef[Any] | None]]) -> Iterator[StateExport]:
    """Messages that wait, as one export; those whose sender took the payload along are lost, and with them the rest.

    Raises:
        RunError: one is nowhere to be had.
    """
    try:
        data: list[Any] = [one.inline if ref is None else ray.get(ref, timeout=_CALL_TIMEOUT_S) for one, ref in kept]
    except ray.exceptions.RayError as error:
        raise RunError(f"a message that waits for its receiver is lost: {reason_of(error)}") from None
    yield packed([one.specs for one, _ in kept], data)
