"""The Ray runtime: nodes in actors, tensors through the object store, directly between the nodes.

The controller's process holds actor handles and references; it never looks into a tensor. Every call's completion
arrives in one queue and is handled in the controller's thread, so nothing here needs a lock. What a call returns is
owned by this process: it outlives the actor that made it, and goes to its consumers as a reference.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import ray
import ray.exceptions

from actors.host import Contributed, Failed, Posted, Returned, Stale
from actors.node_actor import Inline, Ready, Reply, SecureJob, Setup, Stored, remote_class
from orchestrator import ray_session
from orchestrator.errors import ClusterError, DataError, NodeFailedError, NodeLostError
from orchestrator.events import Advance, Cancel, Deliver, Delivered, GiveUp, Return, Secure, Secured
from orchestrator.runtime import Died, FinalModel, Finished, Happening, Log, NodeFacts, Raised
from orchestrator.simulator import post_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ray import ObjectRef

    from actors.host import Ticket
    from algorithms.api import NodeId, View
    from orchestrator.config import Config
    from orchestrator.events import Decision

_POLL_S = 1.0
"""Longest wait for a single happening: keeps Ctrl-C and progress lively."""

_FETCH_TIMEOUT_S = 60.0
"""A contribution that cannot be fetched in this time is missing."""

_CALL_TIMEOUT_S = 600.0
"""Bound on calls whose duration is the user's model: evaluation, saving."""

_STOP_TIMEOUT_S = 10.0

_FIRST_WAVE = 8
"""Processes that are started before any others."""

_BY_REFERENCE_BYTES = 100_000
"""Arguments above this are put into the store by Ray, once per call; we put them there once for all calls."""


@dataclass
class _Actor:
    """One process and the nodes in it."""

    index: int
    nodes: tuple[NodeId, ...]
    handle: Any
    ready: Ready | None = None
    alive: bool = True


_Handler: TypeAlias = "Callable[[_Actor, Any], None]"


class Cluster:
    """The runtime on Ray; see ``runtime.Runtime`` for its contract."""

    virtual = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._session: ray_session.Session | None = None
        self._actors: list[_Actor] = []
        self._home: dict[NodeId, _Actor] = {}
        self._completed: queue.SimpleQueue[tuple[_Handler, _Actor, Future[Any]]] = queue.SimpleQueue()
        self._ready: deque[Happening] = deque()
        self._epoch = -1
        self._posted: defaultdict[int, dict[NodeId, Posted]] = defaultdict(dict)
        self._contributions: dict[tuple[int, NodeId], dict[int, ObjectRef[Any]]] = {}
        self._members: tuple[NodeId, ...] = ()
        self._reduced: dict[tuple[int, int], ObjectRef[Any]] = {}
        self.transport_nbytes = 0

    @property
    def now(self) -> float:
        return time.monotonic()

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> list[NodeFacts]:
        cluster = self._config.cluster
        self._session = ray_session.connect(
            cluster.address,
            num_cpus=cluster.num_cpus * self._config.num_nodes,
            runtime_env=cluster.runtime_env or None,
        )
        self._check_resources()
        per_actor = cluster.nodes_per_actor
        nodes = range(self._config.num_nodes)
        actor_class = remote_class()
        places = [tuple(nodes[first : first + per_actor]) for first in range(0, len(nodes), per_actor)]
        # What is wrong with the data or the task shows on the first few; a hundred processes need not start for it.
        for wave in (places[:_FIRST_WAVE], places[_FIRST_WAVE:]):
            for members in wave:
                options = {
                    "num_gpus": cluster.num_gpus * len(members),
                    "num_cpus": cluster.num_cpus * len(members),
                    "max_restarts": 0,  # Ray would start it again without its state
                    "scheduling_strategy": "SPREAD",
                }
                self._launch(members, actor_class.options(**options).remote())
            self._wait_until_ready()
        first = self._facts_of(self._actors[0])
        self.layout, self.baselines = first.layout, first.baselines
        return [self._node_facts(node) for node in nodes]

    def _launch(self, nodes: tuple[NodeId, ...], handle: Any) -> None:  # noqa: ANN401 - Ray's handles have no type
        actor = _Actor(len(self._actors), nodes, handle)
        self._actors.append(actor)
        self._home |= dict.fromkeys(nodes, actor)
        # Parked at once: a process that dies while it starts is noticed like any other.
        self._call(actor, handle.watch.remote(), self._on_watch)
        self._call(actor, handle.setup.remote(self._setup(actor)), self._on_setup)

    def _setup(self, actor: _Actor) -> Setup:
        config = self._config.dump()
        return Setup(
            nodes=actor.nodes,
            num_nodes=self._config.num_nodes,
            algorithm=config["algorithm"],
            task=config["task"],
            data=config["data"],
            optimizer=config["optimizer"],
            seed=self._config.seed,
            rounds=self._config.rounds,
            skip_nan=self._config.on_nan == "skip",
            fetch_timeout_s=_FETCH_TIMEOUT_S,
            sys_path=tuple(folder for folder in sys.path if folder) if self._session and self._session.is_local else (),
        )

    def _check_resources(self) -> None:
        """Say at once what would otherwise be an endless wait for a place."""
        cluster = self._config.cluster
        available = ray.cluster_resources()
        for resource, each, advice in (
            ("GPU", cluster.num_gpus, "lower cluster.nodes.target or cluster.num_gpus, or add machines"),
            ("CPU", cluster.num_cpus, "lower cluster.nodes.target or cluster.num_cpus, or add machines"),
        ):
            there = available.get(resource, 0.0)
            if each * self._config.num_nodes > there + 1e-6:
                message = (
                    f"cluster: {self._config.num_nodes} nodes ask for {each:g} {resource} each, "
                    f"the cluster has {there:g} (ray status); {advice}"
                )
                raise ClusterError(message)

    def _wait_until_ready(self) -> None:
        deadline = self.now + self._config.cluster.start_timeout_s
        logs: list[Log] = []
        while waiting := [actor for actor in self._actors if actor.ready is None]:
            happening = self.next(deadline)
            match happening:
                case Log():
                    logs.append(happening)
                case Raised(_, message, traceback):
                    raise NodeFailedError(message, traceback)
                case Died(node, reason):
                    message = f"node {node} was lost while it started: {reason}"
                    raise NodeLostError(message)
                case _ if self.now >= deadline:
                    names = ", ".join(str(node) for actor in waiting for node in actor.nodes)
                    message = (
                        f"cluster: nodes {names} did not come up within {self._config.cluster.start_timeout_s:g} s; "
                        "is there room for them (ray status)? raise cluster.start_timeout_s if they are only slow"
                    )
                    raise ClusterError(message)
                case _:
                    pass
        self._ready.extendleft(reversed(logs))  # for the run's log, once there is somebody to take it

    def _on_watch(self, actor: _Actor, _: object) -> None:
        """Never called with a result: the parked call only fails."""

    def _on_setup(self, actor: _Actor, result: Ready | Failed) -> None:
        if isinstance(result, Failed):
            if result.traceback is None:
                raise DataError(result.message)
            self._ready.append(Raised(actor.nodes[0], result.message, result.traceback))
        else:
            actor.ready = result
            for node in actor.nodes:
                where = f"{result.place}, {result.devices[node]}, {result.num_samples[node]} samples"
                self._ready.append(Log(node, (f"node {node}: {where}", *result.warnings)))

    @staticmethod
    def _facts_of(actor: _Actor) -> Ready:
        assert actor.ready is not None
        return actor.ready

    def _node_facts(self, node: NodeId) -> NodeFacts:
        ready = self._facts_of(self._home[node])
        return NodeFacts(node, ready.place, ready.devices[node], ready.num_samples[node], ready.gpus, ready.warnings)

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor.handle, no_restart=True)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        # The parked calls tell when the processes are really gone; on a Ray of our own, its end takes them along.
        shared = self._session is not None and not self._session.is_local
        while shared and any(actor.alive for actor in self._actors) and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # a late answer may be an error, which matters no more
                self.next(min(deadline, time.monotonic() + _POLL_S))
        self._actors = []
        self._contributions, self._reduced = {}, {}
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, actor: _Actor, ref: ObjectRef[Any], handler: _Handler) -> None:
        """Handle a call's (small) result in the controller's thread, when it is there."""
        future: Future[Any] = ref.future()
        future.add_done_callback(lambda done: self._completed.put((handler, actor, done)))

    def next(self, until: float) -> Happening | None:
        while not self._ready:
            wait = min(until - self.now, _POLL_S)
            try:
                handler, actor, future = self._completed.get(timeout=max(wait, 0.0))
            except queue.Empty:
                if self.now >= until:
                    return None
                continue
            error = future.exception()
            if error is None:
                handler(actor, future.result())
            elif actor.alive:
                self._lost(actor, error)
        return self._ready.popleft()

    def _lost(self, actor: _Actor, error: BaseException) -> None:
        """A call failed: the process is dead, or suspect because our own methods never raise. Then it is killed."""
        actor.alive = False
        reason = _reason(error)
        if not isinstance(error, ray.exceptions.ActorDiedError):
            with contextlib.suppress(Exception):
                ray.kill(actor.handle, no_restart=True)
        output = self._session.worker_output(actor.ready.pid) if self._session and actor.ready else []
        for node in actor.nodes:
            if output:
                self._ready.append(Log(node, tuple(output)))
            self._ready.append(Died(node, reason))

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, epoch: int, number: int, view: View, committed: int) -> None:
        self._epoch, self._members = epoch, view.members
        self._posted.clear()
        self._contributions, self._reduced = {}, {}
        for actor, nodes in self._by_actor(view.members):
            self._call(actor, actor.handle.begin.remote(epoch, number, view, committed, nodes), self._on_reply)

    def _by_actor(self, nodes: Iterable[NodeId]) -> list[tuple[_Actor, list[NodeId]]]:
        """Messages to one process travel as one call with a list of its nodes."""
        grouped: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            grouped[self._home[node].index].append(node)
        return [(self._actors[index], members) for index, members in grouped.items()]

    def _on_reply(self, actor: _Actor, reply: Reply) -> None:
        for node, lines in reply.logs.items():
            self._ready.append(Log(node, tuple(lines)))
        large: defaultdict[tuple[int, int], list[NodeId]] = defaultdict(list)
        for node, ticket in reply.tickets:
            self._take(node, ticket, large)
        for (seq, num_parts), nodes in large.items():
            self._post(actor, seq, nodes, num_parts)

    def _take(self, node: NodeId, ticket: Ticket, large: defaultdict[tuple[int, int], list[NodeId]]) -> None:
        match ticket:
            case Posted():
                self._posted[ticket.seq][node] = ticket
                if ticket.specs is not None and ticket.inline is None:
                    large[ticket.seq, len(ticket.part_nbytes)].append(node)
                    return
                self.transport_nbytes += ticket.nbytes
                self._ready.append(post_event(node, ticket))
            case Returned():
                self._ready.append(Finished(node, ticket))
                self._ready.append(Return(node, ticket.num_collectives, ticket.digest))
            case Failed(message, traceback):
                self._ready.append(Raised(node, message, traceback))
            case _:
                assert isinstance(ticket, Stale)

    def _post(self, actor: _Actor, seq: int, nodes: list[NodeId], num_parts: int) -> None:
        """Have large contributions put into the store; they are announced when they are there.

        Parts that this very process is to reduce, if everybody contributes, stay in its own memory.
        """
        parts = [part for part in range(num_parts) if self._home[self._members[part]] is not actor]
        if not parts:
            self._announce(seq, nodes)
            return
        call = actor.handle.post.options(num_returns=1 + len(parts) * len(nodes))
        done, *refs = call.remote(self._epoch, seq, nodes, parts)
        for place, node in enumerate(nodes):
            mine = refs[place * len(parts) : (place + 1) * len(parts)]
            self._contributions[seq, node] = dict(zip(parts, mine, strict=True))
        self._call(actor, done, lambda _actor, _done: self._announce(seq, nodes))

    def _announce(self, seq: int, nodes: Iterable[NodeId]) -> None:
        self._ready.extend(post_event(node, self._posted[seq][node]) for node in nodes)

    # --- what the controller decides ---------------------------------------------------------------------------------

    def perform(self, decisions: Sequence[Decision]) -> None:
        secures = [one for one in decisions if isinstance(one, Secure)]
        if secures:
            self._secure(secures)
        for decision in decisions:
            match decision:
                case Deliver():
                    self._deliver(decision)
                case Advance():
                    self._advance(decision)
                case Cancel(node):
                    self._home[node].handle.cancel.remote(self._epoch)
                case GiveUp(node):
                    for actor in self._actors:
                        if actor.alive:
                            actor.handle.give_up.remote(self._epoch, node)
                case _:
                    pass  # secures are on their way; commits, aborts and errors are the controller's own

    def _secure(self, secures: Sequence[Secure]) -> None:
        jobs: defaultdict[int, list[SecureJob]] = defaultdict(list)
        for one in secures:
            home = self._home[one.by]
            posted = self._posted[one.seq]
            is_gather = posted[one.by].signature.operation == "AllGather"
            if is_gather and any(job.seq == one.seq for job in jobs[home.index]):
                continue  # a process fetches for all its nodes at once
            jobs[home.index].append(
                SecureJob(
                    seq=one.seq,
                    part=one.part,
                    by=one.by,
                    generation=one.generation,
                    specs=None if is_gather else posted[one.members[0]].specs,
                    weights={member: posted[member].weight for member in one.members},
                    refs={
                        member: self._contribution(one.seq, member, one.part)
                        for member in one.members
                        if self._home[member] is not home
                    },
                )
            )
        for index, mine in jobs.items():
            actor = self._actors[index]
            done, *parts = actor.handle.secure.options(num_returns=1 + len(mine)).remote(self._epoch, mine)
            for job, part in zip(mine, parts, strict=True):
                if job.specs is not None:
                    self._reduced[job.seq, job.part] = part
            self._call(actor, done, self._on_secured)

    def _contribution(self, seq: int, node: NodeId, part: int) -> ObjectRef[Any]:
        """A member's part in the store; what was not expected to be needed there is put there now."""
        refs = self._contributions.setdefault((seq, node), {})
        if part not in refs:
            inline = self._posted[seq][node].inline  # of a gather that mixes small and large payloads
            late = self._home[node].handle.post_late
            refs[part] = late.remote(self._epoch, seq, node, part) if inline is None else ray.put(inline)
        return refs[part]

    def _on_secured(self, actor: _Actor, result: tuple[list[Any], int]) -> None:
        secured, nbytes = result
        self.transport_nbytes += nbytes
        for one in secured:
            gather = self._posted[one.seq][one.by].signature.operation == "AllGather"
            for by in actor.nodes if gather else (one.by,):
                self._ready.append(Secured(one.seq, one.part, by, one.got, one.generation))

    def _deliver(self, decision: Deliver) -> None:
        for actor, nodes in self._by_actor(decision.nodes):
            refs = {
                part: self._reduced[decision.seq, part]
                for part, maker in enumerate(decision.makers)
                if self._home[maker] is not actor
            }

            def done(_: _Actor, result: tuple[frozenset[int], int], nodes: list[NodeId] = nodes) -> None:
                missing, nbytes = result
                self.transport_nbytes += nbytes
                self._ready.extend(Delivered(decision.seq, node, decision.generation, missing) for node in nodes)

            self._call(actor, actor.handle.deliver.remote(self._epoch, decision.seq, refs, decision.makers), done)

    def _advance(self, decision: Advance) -> None:
        posted = self._posted[decision.seq]
        members = {node: posted[node] for node in decision.closed}
        if decision.inline:
            result: Inline | Stored = Inline(
                tuple(
                    Contributed(node, one.weight, one.specs, one.inline)
                    for node, one in members.items()
                    if one.specs is not None and one.inline is not None
                )
            )
            nbytes = sum(one.nbytes for one in members.values())
        else:
            gather = next(iter(members.values())).signature.operation == "AllGather"
            specs = {node: one.specs for node, one in members.items() if one.specs is not None}
            result = Stored(
                specs=None if gather else next(iter(specs.values())),
                weights={node: one.weight for node, one in members.items()},
                gathered=specs if gather else {},
            )
            nbytes = 0
        # Every member is advanced by now or holds the result: the contributions may leave the store.
        self._contributions = {key: refs for key, refs in self._contributions.items() if key[0] != decision.seq}
        self._reduced = {key: ref for key, ref in self._reduced.items() if key[0] != decision.seq}
        argument = ray.put(result) if nbytes > _BY_REFERENCE_BYTES else result
        for actor, nodes in self._by_actor(decision.nodes):
            self.transport_nbytes += nbytes
            call = actor.handle.advance.remote(self._epoch, decision.seq, nodes, argument)
            self._call(actor, call, self._on_reply)

    # --- results -----------------------------------------------------------------------------------------------------

    def evaluate(self, node: NodeId, committed: int, max_batches: int | None) -> dict[str, float]:
        result = self._ask(node, self._home[node].handle.evaluate.remote(node, committed, max_batches))
        if isinstance(result, Failed):
            raise NodeFailedError(result.message, result.traceback)
        return result

    def finish(self, committed: int, node: NodeId) -> FinalModel:
        for actor in self._actors:
            self._ask(actor.nodes[0], actor.handle.settle.remote(committed))
        digest, data = self._ask(node, self._home[node].handle.model.remote(node))
        return FinalModel(digest, data)

    def _ask(self, node: NodeId, ref: ObjectRef[Any]) -> Any:  # noqa: ANN401 - what the call returns
        """Wait for one call, bounded, while nothing else goes on; a node that dies meanwhile is named."""
        try:
            return ray.get(ref, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self._fail(node, error)

    def _fail(self, node: NodeId, error: Exception) -> NoReturn:
        place = self._facts_of(self._home[node]).place
        reason = _reason(error)
        message = f"node {node} ({place}) was lost: {reason}"
        raise NodeLostError(message) from None


def _reason(error: BaseException) -> str:
    """Why a call failed, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if not isinstance(error, ray.exceptions.ActorDiedError):
        return f"{type(error).__name__}: {lines[-1]}"
    if "creation task" in lines[0]:
        advice = "is this version of Starling installed there, and what cluster.runtime_env names?"
        return f"its process could not begin ({lines[-1]}); {advice}"
    return "its process died (killed, out of memory or crashed)"
