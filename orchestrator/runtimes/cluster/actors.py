"""The actors of a run, and the nodes that they host."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
import ray.exceptions

from starling.orchestrator.runtimes.cluster.event_loop import POLL_S
from starling.orchestrator.runtimes.cluster.session import reason_of
from starling.orchestrator.runtimes.events import Died, Log, NodeFacts, NotUp, SpareLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray import ObjectRef

    from starling.actors.remote.messages import Ready
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop

_STOP_TIMEOUT_S = 10.0


@dataclass
class Actor:
    """One process and the nodes in it."""

    index: int
    nodes: tuple[NodeId, ...]
    """Empty while it stands by."""
    handle: Any
    launched: float
    incarnation: int = 0
    """Number of earlier processes of its nodes."""
    machine: str = ""
    """Ray's name of its machine; empty until Ray has found room for it."""
    ready: Ready | None = None
    alive: bool = True
    leaving: bool = False
    """Whether the process has had notice of its end."""
    is_asked: bool = False
    """Whether the last request for system metrics is unanswered."""

    @property
    def is_spare(self) -> bool:
        """Whether it stands by, or is being started to."""
        return self.alive and not self.nodes

    @property
    def facts(self) -> Ready:
        """Facts that the process reported when it came up."""
        assert self.ready is not None
        return self.ready

    def facts_of(self, node: NodeId) -> NodeFacts:
        """Facts of one of its nodes."""
        ready = self.facts
        return NodeFacts(node, ready.place, ready.devices[node], ready.num_samples[node], ready.gpus, ready.warnings)


Handler: TypeAlias = "Callable[[Actor, Any], None]"


class ActorPool:
    """Finds the actor of a node, calls it, and takes an actor whose call fails for lost.

    Args:
        loop: handles results, and reports losses.
        on_gone: called with a node that is no longer there, before its loss or retirement is reported.
        output_of: returns the last lines that a worker process wrote, by its process id.
    """

    def __init__(
        self, loop: EventLoop, on_gone: Callable[[NodeId], None], output_of: Callable[[int], list[str]]
    ) -> None:
        self._loop = loop
        self._on_gone = on_gone
        self._output_of = output_of
        self.actors: list[Actor] = []
        self.home: dict[NodeId, Actor] = {}
        """The actor that hosts each node, or hosted it last."""
        self._successors: dict[NodeId, Actor] = {}
        """Actors that are ready to host nodes which have not left yet."""
        self.retiring: set[NodeId] = set()
        self._retired: set[tuple[int, NodeId]] = set()
        """(actor, node) of nodes that have left: an actor is ended when all its nodes have."""

    def add(self, nodes: tuple[NodeId, ...], handle: Any, incarnation: int) -> Actor:  # noqa: ANN401 - Ray's handle
        """Add an actor that is being started."""
        actor = Actor(len(self.actors), nodes, handle, self._loop.now, incarnation)
        self.actors.append(actor)
        self.host(actor, nodes)
        return actor

    def host(self, actor: Actor, nodes: Iterable[NodeId]) -> None:
        """Make an actor the host of those of ``nodes`` that have none."""
        for node in nodes:
            self.home.setdefault(node, actor)

    def came_up(self, actor: Actor, node: NodeId) -> None:
        """Make an actor the host of ``node``: at once, or as soon as the present one has left."""
        if self.home[node].alive and self.home[node] is not actor:
            self._successors[node] = actor
        else:
            self.home[node] = actor

    def is_there(self, actor: Actor, node: NodeId) -> bool:
        """Return whether a live actor still hosts ``node``."""
        return actor.alive and self.home[node] is actor and (actor.index, node) not in self._retired

    def by_actor(self, nodes: Iterable[NodeId]) -> list[tuple[Actor, list[NodeId]]]:
        """Group nodes by actor: one call carries what is meant for all nodes of a process."""
        grouped: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            grouped[self.home[node].index].append(node)
        return [(self.actors[index], members) for index, members in grouped.items()]

    def place_of(self, node: NodeId) -> tuple[str, int]:
        """Ray's name for the machine of a node that is up, and the index of its actor."""
        home = self.home[node]
        return home.facts.machine, home.index

    def elsewhere(self, actor: Actor) -> Actor | None:
        """Return an actor on another machine that stays, or None."""
        there = (one for one in self.actors if one.alive and not one.leaving and one.ready is not None)
        if actor.ready is None:
            return None
        return next((one for one in there if one.facts.machine != actor.facts.machine), None)

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(
        self, actor: Actor, ref: ObjectRef[Any], handler: Handler, on_error: Callable[[], None] | None = None
    ) -> None:
        """Handle a call's result when it is there; if the call fails, its actor is lost."""

        def failed(error: BaseException) -> None:
            if actor.alive:
                self.lost(actor, error)
            if on_error is not None:
                on_error()

        self._loop.when_done(ref, lambda result: handler(actor, result), failed)

    def limit(self, actor: Actor, ref: ObjectRef[Any], seconds: float, what: str) -> None:
        """Take an actor for lost if a call has not ended in ``seconds``; ``what`` begins the reason."""

        def check() -> None:
            if actor.alive and not ray.wait([ref], timeout=0)[0]:
                self.lost(actor, TimeoutError(what))

        self._loop.after(seconds, check)

    def give_up(self, epoch: int, node: NodeId) -> None:
        """Have all actors stop fetching contributions of ``node``, which would fail at their time limit."""
        for actor in self.actors:
            if actor.alive:
                actor.handle.give_up.remote(epoch, node)

    # --- ends --------------------------------------------------------------------------------------------------------

    @staticmethod
    def kill(actor: Actor) -> None:
        """End an actor's process. Never raises."""
        # Without a connection, as after a Ray that is gone, ray.kill starts a Ray of its own first.
        with contextlib.suppress(Exception):
            if ray.is_initialized():
                ray.kill(actor.handle, no_restart=True)

    def lost(self, actor: Actor, error: BaseException) -> None:
        """Report an actor's nodes as lost, and end a process that may still run.

        A failed call means a dead process, or a broken one: our own methods never raise.
        """
        spare, was_up = actor.is_spare, actor.ready is not None
        actor.alive = False
        reason = reason_of(error)
        if not isinstance(error, ray.exceptions.ActorDiedError):
            self.kill(actor)
        if spare:
            self._loop.report(SpareLost(reason))
            return
        output = self._output_of(actor.ready.pid) if actor.ready else []
        for node in actor.nodes:
            if (actor.index, node) in self._retired:
                continue  # it had left before, and another process has its place
            if output:
                self._loop.report(Log(node, tuple(output)))
            if self.home[node] is actor and was_up:
                self.retiring.discard(node)
                self._on_gone(node)
                self._loop.report(Died(node, reason))
            else:
                self._successors.pop(node, None)
                self._loop.report(NotUp(node, reason))
            self._succeed(node)

    def retire(self, actor: Actor, node: NodeId) -> None:
        """Remove ``node`` from its actor, which is ended with its last node."""
        self.retiring.discard(node)
        self._retired.add((actor.index, node))
        if all((actor.index, other) in self._retired for other in actor.nodes):
            actor.alive = False
            self.kill(actor)
        self._on_gone(node)
        self._succeed(node)

    def _succeed(self, node: NodeId) -> None:
        successor = self._successors.pop(node, None)
        if successor is not None:
            self.home[node] = successor

    def close(self, *, wait: bool) -> None:
        """End all actors, and ``wait``, in bounded time, until their processes are gone. Never raises."""
        for actor in self.actors:
            self.kill(actor)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        # The parked calls tell when the processes are really gone.
        while wait and any(actor.alive for actor in self.actors) and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # a late answer may be an error, which matters no more
                self._loop.next(self._loop.now + min(deadline - time.monotonic(), POLL_S))
        self.actors = []
