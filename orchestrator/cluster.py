"""The Ray runtime: nodes in actors, tensors through the object store, directly between the nodes.

The controller's process holds actor handles and references; it never looks into a tensor. Every call's completion
arrives in one queue and is handled in the controller's thread, so nothing here needs a lock. What a call returns is
owned by this process: it outlives the actor that made it, and goes to its consumers as a reference.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import sys
import time
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
import ray.exceptions

from actors.messages import Expected, Inline, Letter, Ready, Reply, Round, SecureJob, Setup, Stored
from actors.node_actor import remote_class
from actors.tickets import (
    Contributed,
    Failed,
    Pinging,
    Posted,
    Receiving,
    Returned,
    Sending,
    Sleeping,
    Stale,
    Waiting,
)
from algorithms.api import SERVER
from orchestrator import ray_session
from orchestrator.errors import ClusterError, DataError, NodeFailedError, NodeGoneError, NodeLostError
from orchestrator.events import Advance, Cancel, Close, Deliver, Delivered, GiveUp, Secure, Secured, Waits
from orchestrator.mailroom import Delivery
from orchestrator.runtime import (
    Arrived,
    Died,
    FinalModel,
    Finished,
    Halted,
    Happening,
    Log,
    NodeFacts,
    Raised,
    Receives,
    Seen,
    Sent,
    Up,
)
from orchestrator.simulator import post_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ray import ObjectRef

    from actors.tickets import Ticket
    from algorithms.api import NodeId, View
    from orchestrator.config import Config
    from orchestrator.events import Decision
    from orchestrator.mailroom import Envelope, Handover

_POLL_S = 1.0
"""Longest wait for a single happening: keeps Ctrl-C and progress lively."""

_FETCH_TIMEOUT_S = 60.0
"""A contribution that cannot be fetched in this time is missing."""

_CALL_TIMEOUT_S = 600.0
"""Bound on calls whose duration is the user's model: evaluation, saving."""

_STOP_TIMEOUT_S = 10.0

_BEGIN = -1
"""Stands for the call that begins a round, where others are named by an exchange."""

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
    incarnation: int = 0
    """Of its nodes: how often they had been embodied before."""
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
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer = itertools.count()
        self._letters: dict[tuple[NodeId, int], tuple[Sending, ObjectRef[Any] | None]] = {}
        self._halting: set[NodeId] = set()
        self._epoch = -1
        self._posted: defaultdict[int, dict[NodeId, Posted]] = defaultdict(dict)
        self._contributions: dict[tuple[int, NodeId], dict[int, ObjectRef[Any]]] = {}
        self._members: tuple[NodeId, ...] = ()
        self._reduced: dict[tuple[int, int], ObjectRef[Any]] = {}
        self._expected: dict[tuple[int, int], Expected] = {}
        """By process and call: the large contributions that it led to the last time."""
        self._fetching: dict[tuple[int, int, NodeId], frozenset[NodeId]] = {}
        """Of a gather: whose contributions each node is to have, by exchange and generation."""
        self.transport_nbytes = 0

    @property
    def now(self) -> float:
        return time.monotonic()

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> list[NodeFacts]:
        cluster = self._config.cluster
        self._session = ray_session.connect(
            cluster.address,
            num_cpus=cluster.num_cpus * (self._config.num_nodes + self._config.algorithm.has_server),
            runtime_env=cluster.runtime_env or None,
        )
        self._check_resources()
        per_actor = cluster.nodes_per_actor
        nodes = [*range(self._config.num_nodes)]
        places = [tuple(nodes[first : first + per_actor]) for first in range(0, len(nodes), per_actor)]
        # What is wrong with the data or the task shows on the first few; a hundred processes need not start for it.
        for wave in (places[:_FIRST_WAVE], places[_FIRST_WAVE:]):
            for members in wave:
                self._launch(members)
            self._wait_until_ready()
        if self._config.algorithm.has_server:
            self._launch((SERVER,))
            self._wait_until_ready()
            nodes.append(SERVER)
        first = self._facts_of(self._actors[0])
        self.layout, self.baselines = first.layout, first.baselines
        return [self._node_facts(node) for node in nodes]

    def launch(self, nodes: Sequence[NodeId]) -> None:
        lost = {self._home[node].index: self._home[node] for node in nodes}
        for actor in lost.values():
            self._launch(actor.nodes, actor.incarnation + 1)

    def _launch(self, nodes: tuple[NodeId, ...], incarnation: int = 0) -> None:
        cluster = self._config.cluster
        # A coordinator adds up what others send: it needs no GPU.
        num_gpus = 0 if SERVER in nodes else cluster.num_gpus * len(nodes)
        options = {
            "num_gpus": num_gpus,
            "num_cpus": cluster.num_cpus * len(nodes),
            "max_restarts": 0,  # Ray would start it again without its state
            "scheduling_strategy": "SPREAD",
        }
        handle = remote_class().options(**options).remote()
        actor = _Actor(len(self._actors), nodes, handle, incarnation)
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
            incarnation=actor.incarnation,
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
            if actor.incarnation:
                self._ready.extend(Up(self._node_facts(node)) for node in actor.nodes)
            for node in actor.nodes:
                where = f"{result.place}, {result.devices[node]}, {result.num_samples[node]} samples"
                who = "server" if node == SERVER else f"node {node}"
                self._ready.append(Log(node, (f"{who}: {where}", *result.warnings)))

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
        while True:
            while self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            if self._ready:
                return self._ready.popleft()
            wait = min(until - self.now, _POLL_S)
            if self._timers:
                wait = min(wait, self._timers[0][0] - self.now)
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

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        """Do something later, in the controller's thread."""
        heapq.heappush(self._timers, (self.now + seconds, next(self._timer), call))

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

    def begin(
        self,
        epoch: int,
        number: int,
        view: View,
        committed: int,
        nodes: Sequence[NodeId],
        *,
        repair: bool,
        joiners: Sequence[NodeId] = (),
    ) -> None:
        self._epoch, self._members = epoch, view.members
        self._posted.clear()
        self._contributions, self._reduced, self._fetching = {}, {}, {}
        round_ = Round(epoch, number, view, committed, repair, tuple(joiners))
        for actor, mine in self._by_actor(nodes):
            self._drive(actor, _BEGIN, lambda call, expected, mine=mine: call.remote(round_, mine, expected))

    def _drive(self, actor: _Actor, place: int, remote: Callable[[Any, Expected | None], Any]) -> None:
        """Call ``begin``, or ``advance`` after exchange ``place``.

        Rounds are alike: if the call led to a large contribution the last time, it is asked to give its parts along
        with the reply, which saves the call that would fetch them.
        """
        method = actor.handle.begin if place == _BEGIN else actor.handle.advance
        known = self._expected.get((actor.index, place))
        if known is None or known.num_parts > len(self._members):
            expected = None
        else:
            expected = replace(known, parts=self._parts_for_others(actor, known.num_parts))
        if expected is None or not expected.parts:
            self._call(actor, remote(method, None), lambda actor, reply: self._on_reply(actor, reply, place))
            return
        done, *refs = remote(method.options(num_returns=1 + expected.num_values), expected)

        def on_reply(actor: _Actor, reply: Reply) -> None:
            if reply.posted is not None:
                self._keep(expected, refs)
            self._on_reply(actor, reply, place)

        self._call(actor, done, on_reply)

    def _parts_for_others(self, actor: _Actor, num_parts: int) -> tuple[int, ...]:
        """Parts that this very process is to reduce, if everybody contributes, stay in its own memory."""
        return tuple(part for part in range(num_parts) if self._home[self._members[part]] is not actor)

    def _keep(self, posted: Expected, refs: Sequence[ObjectRef[Any]]) -> None:
        """Remember where the parts of contributions are."""
        width = len(posted.parts)
        for place, node in enumerate(posted.nodes):
            mine = refs[place * width : (place + 1) * width]
            self._contributions[posted.seq, node] = dict(zip(posted.parts, mine, strict=True))

    def _by_actor(self, nodes: Iterable[NodeId]) -> list[tuple[_Actor, list[NodeId]]]:
        """Messages to one process travel as one call with a list of its nodes."""
        grouped: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            grouped[self._home[node].index].append(node)
        return [(self._actors[index], members) for index, members in grouped.items()]

    def _on_reply(self, actor: _Actor, reply: Reply, place: int | None = None) -> None:
        for node, lines in reply.logs.items():
            self._ready.append(Log(node, tuple(lines)))
        for node, values in reply.seen.items():
            self._ready.append(Seen(node, tuple(values)))
        large: defaultdict[tuple[int, int], list[NodeId]] = defaultdict(list)
        for node, ticket in reply.tickets:
            self._take(node, ticket, large)
        for (seq, num_parts), nodes in large.items():
            posted = Expected(seq, tuple(nodes), num_parts, self._parts_for_others(actor, num_parts))
            # Not where the program runs on: it would wait until its parts are in the store.
            if place is not None and all(self._posted[seq][node].waits for node in nodes):
                self._expected[actor.index, place] = posted
            if reply.posted == seq or not posted.parts:
                self._announce(seq, nodes)
            else:
                self._post(actor, posted)
        moving = [node for node, ticket in reply.tickets if _runs_on(ticket)]
        if moving:
            self._run_on(actor, [(node, None) for node in moving])

    def _run_on(self, actor: _Actor, items: Sequence[tuple[NodeId, object]]) -> None:
        if actor.alive:
            self._call(actor, actor.handle.run_on.remote(self._epoch, items), self._on_reply)

    def _take(self, node: NodeId, ticket: Ticket, large: defaultdict[tuple[int, int], list[NodeId]]) -> None:
        match ticket:
            case Posted():
                self._posted[ticket.seq][node] = ticket
                if ticket.specs is not None and ticket.inline is None:
                    large[ticket.seq, len(ticket.part_nbytes)].append(node)
                    return
                self.transport_nbytes += ticket.nbytes
                self._ready.append(post_event(node, ticket))
            case Waiting(seq):
                self._ready.append(Waits(node, seq))
            case Sending(to, letter, _, nbytes, inline):
                self._letters[node, letter] = ticket, None
                self.transport_nbytes += nbytes if inline is not None else 0
                self._ready.append(Sent(node, to, nbytes, letter))
            case Receiving(timeout_s):
                self._ready.append(Receives(node, timeout_s))
            case Sleeping(seconds):
                self._after(seconds, lambda: self._run_on(self._home[node], [(node, None)]))
            case Pinging():
                self._ping(node, ticket)
            case Returned():
                self._ready.append(Finished(node, ticket))
            case Failed(message, traceback):
                self._ready.append(Raised(node, message, traceback))
            case _:
                assert isinstance(ticket, Stale)

    def _post(self, actor: _Actor, posted: Expected) -> None:
        """Have large contributions put into the store; they are announced when they are there."""
        call = actor.handle.post.options(num_returns=1 + posted.num_values)
        done, *refs = call.remote(self._epoch, posted.seq, posted.nodes, posted.parts)
        self._keep(posted, refs)
        self._call(actor, done, lambda _actor, _done: self._announce(posted.seq, posted.nodes))

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
                case Close(seq):
                    # Every member holds the result: contributions and parts may leave the store.
                    self._contributions = {key: refs for key, refs in self._contributions.items() if key[0] != seq}
                    self._reduced = {key: ref for key, ref in self._reduced.items() if key[0] != seq}
                case Advance():
                    self._advance(decision)
                case Cancel(node):
                    self.halt([node])
                case GiveUp(node):
                    for actor in self._actors:
                        if actor.alive:
                            actor.handle.give_up.remote(self._epoch, node)
                case _:
                    pass  # secures are on their way; commits, aborts and errors are the controller's own

    def _secure(self, secures: Sequence[Secure]) -> None:
        jobs: defaultdict[int, dict[tuple[int, int, NodeId], SecureJob]] = defaultdict(dict)
        for one in secures:
            home = self._home[one.by]
            posted = self._posted[one.seq]
            is_gather = posted[one.by].signature.operation != "AllReduce"
            # A process fetches for a gather once, what any of its nodes is to have.
            by = home.nodes[0] if is_gather else one.by
            known = jobs[home.index].get((one.seq, one.part, by))
            weights = {member: posted[member].weight for member in one.members}
            refs = {
                member: self._contribution(one.seq, member, one.part)
                for member in one.members
                if self._home[member] is not home
            }
            if is_gather:
                self._fetching[one.seq, one.generation, one.by] = frozenset(one.members)
            jobs[home.index][one.seq, one.part, by] = SecureJob(
                seq=one.seq,
                part=one.part,
                by=by,
                generation=one.generation,
                specs=None if is_gather else posted[one.members[0]].specs,
                weights=weights if known is None else known.weights | weights,
                refs=refs if known is None else known.refs | refs,
            )
        for index, mine in jobs.items():
            actor, all_jobs = self._actors[index], list(mine.values())
            done, *parts = actor.handle.secure.options(num_returns=1 + len(mine)).remote(self._epoch, all_jobs)
            for job, part in zip(all_jobs, parts, strict=True):
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
        jobs, nbytes = result
        self.transport_nbytes += nbytes
        for one in jobs:
            if self._posted[one.seq][one.by].signature.operation == "AllReduce":
                self._ready.append(Secured(one.seq, one.part, one.by, one.members, one.generation))
                continue
            for by in actor.nodes:
                wanted = self._fetching.get((one.seq, one.generation, by))
                if wanted is not None:
                    self._ready.append(Secured(one.seq, one.part, by, one.members & wanted, one.generation))

    def _deliver(self, decision: Deliver) -> None:
        posted = self._posted[decision.seq]
        started = not all(posted[node].waits for node in decision.nodes)
        stored = self._stored({node: posted[node] for node in decision.closed})
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

            ahead = (nodes[0], stored) if started else None
            call = actor.handle.deliver.remote(self._epoch, decision.seq, refs, decision.makers, ahead)
            self._call(actor, call, done)

    def _stored(self, members: Mapping[NodeId, Posted]) -> Stored:
        """What is to be known of a result that went through the store."""
        is_gather = next(iter(members.values())).signature.operation != "AllReduce"
        specs = {node: one.specs for node, one in members.items() if one.specs is not None}
        return Stored(
            specs=None if is_gather else next(iter(specs.values())),
            weights={node: one.weight for node, one in members.items()},
            gathered=specs if is_gather else {},
        )

    def _advance(self, decision: Advance) -> None:
        posted = self._posted[decision.seq]
        members = {node: posted[node] for node in decision.closed}
        shared: object = None if decision.inline else self._stored(members)
        everything = sum(one.nbytes for one in members.values()) if decision.inline else 0
        for actor, nodes in self._by_actor(decision.nodes):
            argument, nbytes = shared, everything
            wants = [posted[node].wants for node in actor.nodes if node in posted]
            if argument is None and any(one is not None for one in wants):
                mine = frozenset(actor.nodes).union(*(one or () for one in wants))
                argument = self._inline({node: one for node, one in members.items() if node in mine}, decision.closed)
                nbytes = argument.data.nbytes
            elif argument is None:
                argument = self._inline(members, decision.closed)
                shared = argument = ray.put(argument) if nbytes > _BY_REFERENCE_BYTES else argument
            self.transport_nbytes += nbytes
            self._drive(
                actor,
                decision.seq,
                lambda call, expected, nodes=nodes, argument=argument: call.remote(
                    self._epoch, decision.seq, nodes, argument, expected
                ),
            )

    @staticmethod
    def _inline(members: Mapping[NodeId, Posted], closed: tuple[NodeId, ...]) -> Inline:
        contributions = [
            Contributed(node, one.weight, one.specs, one.inline)
            for node, one in members.items()
            if one.specs is not None and one.inline is not None
        ]
        return Inline.of(contributions, closed)

    def kill(self, node: NodeId) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self._home[node].handle, no_restart=True)

    def hang(self, node: NodeId) -> None:
        self._home[node].handle.hang.remote()

    def halt(self, nodes: Sequence[NodeId]) -> None:
        for actor, mine in self._by_actor(nodes):
            if not actor.alive:
                continue
            self._halting.update(mine)
            actor.handle.cancel.remote(self._epoch, mine)
            self._call(actor, actor.handle.halt.remote(mine), self._on_halted)
            self._after(
                self._config.cluster.cancel_grace_s, lambda mine=tuple(mine), actor=actor: self._end(actor, mine)
            )

    def _on_halted(self, _: _Actor, nodes: Sequence[NodeId]) -> None:
        self._halting.difference_update(nodes)
        self._ready.extend(Halted(node) for node in nodes)

    def _end(self, actor: _Actor, nodes: tuple[NodeId, ...]) -> None:
        """Kill a process whose nodes were told to stop and do not."""
        if actor.alive and self._halting.intersection(nodes):
            self._halting.difference_update(nodes)
            grace = self._config.cluster.cancel_grace_s
            self._lost(actor, TimeoutError(f"it did not stop within {grace:g} s (cluster.cancel_grace_s)"))

    # --- messages ----------------------------------------------------------------------------------------------------

    def dispatch(self, envelope: Envelope) -> None:
        key = envelope.sender, envelope.letter
        sending, _ = self._letters[key]
        if sending.inline is not None:
            self._ready.append(Arrived(envelope))
            return
        home = self._home[envelope.sender]
        done, data = home.handle.outbox.options(num_returns=2).remote(envelope.letter)
        self._letters[key] = sending, data
        self._call(home, done, lambda _actor, _done: self._ready.append(Arrived(envelope)))

    def discard(self, node: NodeId, letter: int) -> None:
        sending, _ = self._letters.pop((node, letter))
        if sending.inline is None:
            self._home[node].handle.discard.remote(letter)

    def hand_over(self, handover: Handover) -> None:
        node, outcome = handover.node, handover.outcome
        actor = self._home[node]
        if not isinstance(outcome, Delivery):
            self._run_on(actor, [(node, outcome)])
            return
        envelope = outcome.envelope
        sending, data = self._letters.pop((envelope.sender, envelope.letter))
        self.transport_nbytes += envelope.nbytes
        letter = Letter(
            sender=envelope.sender,
            staleness=outcome.staleness,
            specs=sending.specs,
            inline=sending.inline,
            ref=() if data is None else (data,),
        )

        def done(actor: _Actor, reply: Reply | None) -> None:
            if reply is not None:
                self._on_reply(actor, reply)
                return
            message = (
                f"node {node}: a message of node {envelope.sender} cannot be fetched: the machine that held it is gone"
            )
            self._ready.append(Raised(node, message, None))

        self._call(actor, actor.handle.receive.remote(self._epoch, node, letter), done)

    def _ping(self, node: NodeId, ticket: Pinging) -> None:
        """Ask the processes of all that are pinged; whoever has answered in time is there."""
        answered: set[NodeId] = set()
        waiting = {other for other in ticket.nodes if other in self._home and self._home[other].alive}
        over = False

        def finish() -> None:
            nonlocal over
            if not over:
                over = True
                self._run_on(self._home[node], [(node, frozenset(answered))])

        def answer(actor: _Actor, _: object) -> None:
            answered.update(waiting.intersection(actor.nodes))
            if len(answered) == len(set(ticket.nodes)):
                finish()

        for actor, _nodes in self._by_actor(waiting):
            self._call(actor, actor.handle.ping.remote(), answer)
        self._after(ticket.timeout_s, finish)

    # --- results -----------------------------------------------------------------------------------------------------

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        for actor, nodes in self._by_actor(committed):
            if actor.alive:
                # Not waited for: calls of one group run in the order in which they were made.
                actor.handle.settle.remote({node: committed[node] for node in nodes})

    def transfer(self, joiner: NodeId, donor: NodeId) -> int:
        size, export = self._home[donor].handle.export.options(num_returns=2).remote(donor)
        nbytes = self._ask(donor, size)
        self._ask(joiner, self._home[joiner].handle.load.remote(joiner, export))
        return nbytes

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

    def finish(self, nodes: Sequence[NodeId]) -> FinalModel:
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
            message = f"node {node} ({self._facts_of(actor).place}) was lost: {_reason(error)}"
            raise NodeGoneError(node, message) from None


def _runs_on(ticket: Ticket) -> bool:
    """Whether its program runs on without waiting for anything."""
    return isinstance(ticket, Sending) or (isinstance(ticket, Posted) and not ticket.waits)


def _reason(error: BaseException) -> str:
    """Why a call failed, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if not isinstance(error, ray.exceptions.ActorDiedError):
        return f"{type(error).__name__}: {lines[-1]}"
    if "creation task" in lines[0]:
        advice = "is this version of Starling installed there, and what cluster.runtime_env names?"
        return f"its process could not begin ({lines[-1]}); {advice}"
    return "its process died (killed, out of memory or crashed)"
