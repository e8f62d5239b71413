"""Committed state on Ray: copied from node to node, kept beyond a node's end, and exported for checkpoints."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from starling.actors.replica.state_transfer import donor_among, with_shared
from starling.actors.wire.tickets import Failed
from starling.orchestrator.errors import RunError
from starling.orchestrator.runtimes.cluster.session import reason_of
from starling.orchestrator.runtimes.events import Kept, Loaded, NotLoaded, Retired
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.data import Position
    from starling.actors.replica.catch_up import Transcript
    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.transport import Transport

_FETCH_TIMEOUT_S = 600.0
"""Bound on fetching an export: its size is the user's model."""


class StateStore:
    """Holds references to the kept states of nodes, and moves states between actors.

    Args:
        loop: reports transfers.
        pool: the actors.
        transport: throttles transfers.
        deadline_s: an actor that does not hand over its state in this time is lost.
    """

    def __init__(self, loop: EventLoop, pool: ActorPool, transport: Transport, deadline_s: float) -> None:
        self._loop = loop
        self._pool = pool
        self._transport = transport
        self._deadline_s = deadline_s
        self._kept: dict[NodeId, list[ObjectRef[Any]]] = {}
        """References to all that each node had committed; the second of two has the shared state."""
        self._loading: dict[NodeId, NodeId] = {}
        """Nodes that are being given state, and whose."""
        self._num_snapshots = 0
        self._base: tuple[int, ObjectRef[Any]] | None = None
        """The first round that is replayed, and the model before it."""

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        for actor, nodes in self._pool.by_actor(committed):
            if actor.alive:
                # Not waited for: calls of one group run in the order in which they were made.
                actor.handle.settle.remote({node: committed[node] for node in nodes})

    # --- kept --------------------------------------------------------------------------------------------------------

    def retire(self, nodes: Sequence[NodeId], empty: Collection[NodeId]) -> None:
        """Keep the state of ``nodes`` but those in ``empty``, and let them leave."""
        for node in nodes:
            self._pool.retiring.add(node)
            actor = self._pool.home[node]
            if node in empty:
                self._retire(actor, node, 0, None)
                continue
            self._export(node, lambda nbytes, ref, node=node, actor=actor: self._retire(actor, node, nbytes, ref))

    def _retire(self, actor: Actor, node: NodeId, nbytes: int, ref: ObjectRef[Any] | None) -> None:
        if self._pool.home[node] is not actor or node not in self._pool.retiring:
            return  # it died while its state was copied, and that was told
        if ref is not None:
            self._kept[node] = [ref]
        self._pool.retire(actor, node)
        self._loop.report(Retired(node, nbytes))

    def keep(self, node: NodeId, number: int) -> None:
        actor = self._pool.home[node]

        def done(nbytes: int, ref: ObjectRef[Any]) -> None:
            # Another may be there already, which has been given what was kept before.
            if self._pool.home[node] is actor:
                self._kept[node] = [ref]
                self._loop.report(Kept(node, number, nbytes))

        self._export(node, done)

    def release(self, node: NodeId) -> None:
        self._kept.pop(node, None)

    def _export(self, node: NodeId, then: Callable[[int, ObjectRef[Any]], None]) -> None:
        """Copy all that a node has committed to another machine, if there is one; call ``then`` with its bytes."""
        actor = self._pool.home[node]
        size, ref = actor.handle.export.options(num_returns=2).remote(node, True)
        other = self._pool.elsewhere(actor)

        def exported(_: Actor, nbytes: int) -> None:
            if other is None or not other.alive:
                then(nbytes, ref)
                return
            held, copy = other.handle.hold.options(num_returns=2).remote([ref])
            self._pool.call(
                other,
                held,
                lambda _, is_there: then(nbytes, copy if is_there else ref),
                on_error=lambda: then(nbytes, ref),
            )

        self._pool.call(actor, size, exported)
        self._limit(actor, size, "it did not hand over what it holds")

    def _limit(self, actor: Actor, ref: ObjectRef[Any], what: str, times: int = 1) -> None:
        advice = "cluster.round_deadline_s" if times == 1 else f"{times} × cluster.round_deadline_s"
        seconds = times * self._deadline_s
        self._pool.limit(actor, ref, seconds, f"{what} within {seconds:g} s ({advice})")

    # --- transfers ---------------------------------------------------------------------------------------------------

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        home = self._pool.home[donor]
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
        actor = self._pool.home[joiner]
        records = list(transcript.records)
        self._await_load(joiner, donor, actor.handle.replay.remote(joiner, transcript.first, records, refs, position))

    def restore(self, node: NodeId) -> bool:
        refs = self._kept.get(node)
        if refs is not None:
            self._load(node, node, refs, None)
        return refs is not None

    def _load(self, node: NodeId, source: NodeId, refs: Sequence[ObjectRef[Any]], position: Position | None) -> None:
        actor = self._pool.home[node]
        # In a list, so that Ray does not fetch them: a donor that is gone is no failure of the joiner's.
        self._await_load(node, source, actor.handle.load.remote(node, source, refs, position))

    def _await_load(self, node: NodeId, source: NodeId, call: ObjectRef[Any]) -> None:
        self._loading[node] = source
        actor, began = self._pool.home[node], self._loop.now

        def done(actor: Actor, result: int | Failed | None) -> None:
            self._loading.pop(node, None)
            if isinstance(result, Failed):
                self._pool.lost(actor, RuntimeError(result.message))
            elif result is None:
                self._loop.report(NotLoaded(node, source))
            else:
                self._loop.at(self._loaded_at(node, source, result, began), lambda: loaded(result))

        def loaded(nbytes: int) -> None:
            # Whoever has died meanwhile, and was embodied anew, has none of it.
            if actor.alive and self._pool.home[node] is actor:
                self._loop.report(Loaded(node, source, nbytes))

        self._pool.call(actor, call, done)
        # A donor has as long to hand it over as this one to take it.
        self._limit(actor, call, "it did not take over the state", times=2)

    def _loaded_at(self, node: NodeId, source: NodeId, nbytes: int, began: float) -> float | None:
        """Return when the network has brought state; a node's own, kept copy comes from another node."""
        others = (other for other, home in sorted(self._pool.home.items()) if other != node and home.alive)
        holder = source if source != node else next(others, node)
        return self._transport.arrival(began, Cast({holder: nbytes}, [node]))

    def gone(self, node: NodeId) -> None:
        """A node is gone: nothing is given to it, and nothing of its own arrives any more."""
        self._loading.pop(node, None)
        for joiner, source in self._loading.items():
            if source == node and self._pool.home[joiner].alive:
                self._pool.home[joiner].handle.give_up.remote(None, node)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        self._num_snapshots += 1
        number = self._num_snapshots
        there: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            actor = self._pool.home[node]
            if self._pool.is_there(actor, node) and node not in kept:
                there[actor.index].append(node)
        calls: dict[NodeId, list[ObjectRef[Any]]] = {node: self._kept[node] for node in nodes if node in self._kept}
        for index, those in there.items():
            handle = self._pool.actors[index].handle
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

    def close(self) -> None:
        """Drop all kept states."""
        self._kept = {}


def _exports(calls: Sequence[tuple[NodeId, list[ObjectRef[Any]]]]) -> Iterator[tuple[NodeId, StateExport]]:
    """Yield the exports that calls return, without those of nodes that died.

    Raises:
        RunError: a live node does not give its state, or Ray is gone.
    """
    for node, refs in calls:
        if not ray.is_initialized():
            raise RunError("the run's Ray is gone")  # and to ask would start another
        try:
            exports: list[StateExport] = ray.get(refs, timeout=_FETCH_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise RunError(f"node {node} does not give its state: {reason_of(error)}") from None
        except ray.exceptions.RayError:
            continue
        yield node, exports[0] if len(exports) == 1 else with_shared(*exports)
