"""Exchanges on Ray: what nodes contribute goes through the object store, directly between them.

The controller's process holds actor handles and references; it never looks into a tensor. What a call returns is
owned by this process: it outlives the actor that made it, and goes to its consumers as a reference.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from starling.actors.data.plans import NOTHING_NEW
from starling.actors.remote.messages import Expected, Inline, Reply, Round, SecureJob, Stored
from starling.actors.wire.tickets import (
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
    among,
)
from starling.orchestrator.protocol.events import (
    Advance,
    Cancel,
    Close,
    Deliver,
    Delivered,
    GiveUp,
    Secure,
    Secured,
    Waits,
)
from starling.orchestrator.runtimes import traffic
from starling.orchestrator.runtimes.cluster.calls import Actor, Handler
from starling.orchestrator.runtimes.cluster.processes import Processes
from starling.orchestrator.runtimes.events import Finished, Halted, Log, Raised, Receives, Seen, Sent, Sleeps
from starling.orchestrator.runtimes.network import Network
from starling.orchestrator.runtimes.tickets import post_event
from starling.orchestrator.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.data import Place
    from starling.actors.wire.tickets import Ticket
    from starling.algorithms.api import NodeId, View
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.events import Decision, Event
    from starling.orchestrator.runtimes.network import Cast

_BEGIN = -1
"""Stands for the call that begins a round, where others are named by an exchange."""

_MOST_KNOWN = 100
"""Exchanges that are known to fit."""

_BY_REFERENCE_BYTES = 100_000
"""Arguments above this are put into the store by Ray, once per call; we put them there once for all calls."""


class DataPlane(Processes):
    """Programs, and the exchanges that they await; see ``runtime.Runtime``."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._epoch = -1
        self._starts: Counter[NodeId] = Counter()
        """How often each node was begun or halted: what was to happen to it before is void."""
        self._posted: defaultdict[int, dict[NodeId, Posted]] = defaultdict(dict)
        self._contributions: dict[tuple[int, NodeId], dict[int, ObjectRef[Any]]] = {}
        self._members: tuple[NodeId, ...] = ()
        self._reduced: dict[tuple[int, int], ObjectRef[Any]] = {}
        self._expected: dict[tuple[int, int], Expected] = {}
        """By process and call: the large contributions that it led to the last time."""
        self._fetching: dict[tuple[int, int, NodeId], frozenset[NodeId]] = {}
        """Of a gather: whose contributions each node is to have, by exchange and generation."""
        self._letters: dict[tuple[NodeId, int], tuple[Sending, ObjectRef[Any] | None]] = {}
        self.transport_nbytes = 0
        self._network = Network(config.network)
        self._inline_due: dict[int, dict[NodeId, float]] = {}
        """When the network brings what travels inline, by exchange."""
        self._fits: set[tuple[object, ...]] = set()
        """Exchanges for which the stores have room: sizes, members, processes."""
        self._looked_at: set[int] = set()
        """Exchanges of this attempt."""

    # --- the throttle ------------------------------------------------------------------------------------------------

    def _arrivals(self, phase: Callable[[], Sequence[Cast]]) -> Mapping[NodeId, float]:
        """When each receiver of a phase that begins now may have it; empty where the network is not throttled."""
        return {} if self._network.is_instant else self._network.arrivals(self.now, phase())

    def _at(self, when: float | None, call: Callable[[], None]) -> None:
        """Do what is done at the end of a transfer: then, or now if the real one has taken longer."""
        if when is None or when <= self.now:
            call()
        else:
            self._after(when - self.now, call)

    def _report_at(self, when: float | None, event: Event) -> None:
        """Tell the rendezvous of the end of a transfer; of another attempt's, nothing."""
        epoch = self._epoch
        self._at(when, lambda: self._ready.append(event) if epoch == self._epoch else None)

    # --- what is late ------------------------------------------------------------------------------------------------

    def _timely(self, handler: Handler) -> Handler:
        """The handler, unless another attempt has begun meanwhile: late calls of an old one still return."""
        epoch = self._epoch
        return lambda actor, result: handler(actor, result) if epoch == self._epoch else None

    def _still(self, node: NodeId, call: Callable[[], None]) -> Callable[[], None]:
        """The call, unless ``node`` has been begun or halted meanwhile."""
        starts = self._starts[node]
        return lambda: call() if starts == self._starts[node] else None

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
        places: Mapping[NodeId, Place] = NOTHING_NEW,
        seen: Sequence[float] = (),
    ) -> None:
        self._epoch, self._members = epoch, view.members
        self._starts.update(nodes)
        self._posted.clear()
        self._contributions, self._reduced, self._fetching, self._inline_due = {}, {}, {}, {}
        self._looked_at = set()
        round_ = Round(epoch, number, view, committed, repair, tuple(joiners), dict(places), tuple(seen))
        for actor, mine in self._by_actor(nodes):
            self._drive(actor, _BEGIN, lambda call, expected, mine=mine: call.remote(round_, mine, expected))

    def _drive(self, actor: Actor, place: int, remote: Callable[[Any, Expected | None], Any]) -> None:
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
            self._call(
                actor, remote(method, None), self._timely(lambda actor, reply: self._on_reply(actor, reply, place))
            )
            return
        done, *refs = remote(method.options(num_returns=1 + expected.num_values), expected)

        def on_reply(actor: Actor, reply: Reply) -> None:
            if reply.posted is not None:
                self._remember(expected, refs)
            self._on_reply(actor, reply, place)

        self._call(actor, done, self._timely(on_reply))

    def _parts_for_others(self, actor: Actor, num_parts: int) -> tuple[int, ...]:
        """Parts that this very process is to reduce, if everybody contributes, stay in its own memory."""
        return tuple(part for part in range(num_parts) if self._home[self._members[part]] is not actor)

    def _remember(self, posted: Expected, refs: Sequence[ObjectRef[Any]]) -> None:
        """Remember where the parts of contributions are."""
        width = len(posted.parts)
        for place, node in enumerate(posted.nodes):
            mine = refs[place * width : (place + 1) * width]
            self._contributions[posted.seq, node] = dict(zip(posted.parts, mine, strict=True))

    def _on_reply(self, actor: Actor, reply: Reply, place: int | None = None) -> None:
        for node, lines in reply.logs.items():
            self._ready.append(Log(node, tuple(lines)))
        for node, values in reply.seen.items():
            self._ready.append(Seen(node, tuple(values)))
        large: defaultdict[tuple[int, int], list[NodeId]] = defaultdict(list)
        for node, ticket in reply.tickets:
            self._take(actor, node, ticket, large)
        for (seq, num_parts), nodes in large.items():
            if seq not in self._looked_at:  # one alone may be too large, and is not put there then
                self._looked_at.add(seq)
                self._check_room(seq, nodes)
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

    def _check_room(self, seq: int, givers: Sequence[NodeId]) -> None:
        """Check that the machines' stores have room for an exchange, if no such exchange has been seen.

        Args:
            seq: of the exchange.
            givers: nodes whose contributions go through the store.

        Raises:
            ClusterError: one has not; Ray would write to its disk, and nodes be late for no visible reason.
        """
        ticket = self._posted[seq][givers[0]]
        members = tuple(node for node in self._members if self._home[node].ready is not None)
        homes = tuple(self._home[node].index for node in members)
        key = ticket.part_nbytes, ticket.result_nbytes, members, tuple(givers), homes
        if key in self._fits:
            return
        most = len(members) if ticket.wants is None else len(ticket.wants)
        needed = traffic.stored(ticket.part_nbytes, ticket.result_nbytes, most, members, givers, self._place)
        self._room_in_stores(needed, f"an exchange of {bytes_text(ticket.nbytes)} from each of {len(givers)} nodes")
        self._fits = {key, *list(self._fits)[:_MOST_KNOWN]}

    def _run_on(self, actor: Actor, items: Sequence[tuple[NodeId, object]]) -> None:
        if actor.alive:
            self._call(actor, actor.handle.run_on.remote(self._epoch, items), self._timely(self._on_reply))

    def _take(
        self, actor: Actor, node: NodeId, ticket: Ticket, large: defaultdict[tuple[int, int], list[NodeId]]
    ) -> None:
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
                if inline is None and (node, nbytes) not in self._fits:
                    self._room_in_stores({self._place(node)[0]: nbytes}, f"a message of {bytes_text(nbytes)}")
                    self._fits = {(node, nbytes), *list(self._fits)[:_MOST_KNOWN]}
                self.transport_nbytes += nbytes if inline is not None else 0
                self._ready.append(Sent(node, to, nbytes, letter))
            case Receiving(timeout_s):
                self._ready.append(Receives(node, timeout_s))
            case Sleeping(seconds):
                self._ready.append(Sleeps(node, self.now + seconds))
                self._after(seconds, self._still(node, lambda: self._run_on(actor, [(node, None)])))
            case Pinging():
                self._ping(actor, node, ticket)
            case Returned():
                self._ready.append(Finished(node, ticket))
            case Failed(message, traceback):
                self._ready.append(Raised(node, message, traceback))
            case _:
                assert isinstance(ticket, Stale)

    def _ping(self, home: Actor, node: NodeId, ticket: Pinging) -> None:
        """Ask the processes of all that are pinged; whoever has answered in time is there."""
        answered: set[NodeId] = set()
        waiting = {other for other in ticket.nodes if other in self._home and self._home[other].alive}
        began, over = self.now, False

        def finish() -> None:
            nonlocal over
            if not over:
                over = True
                self._run_on(home, [(node, frozenset(answered))])

        def answer(other: NodeId) -> None:
            answered.add(other)
            if len(answered) == len(set(ticket.nodes)):
                finish()

        def on_answer(actor: Actor, _: object) -> None:
            for other in sorted(waiting.intersection(actor.nodes)):
                back = began + 2 * self._network.latency_s(node, other)
                self._at(back, self._still(node, lambda other=other: answer(other)))

        for actor, _nodes in self._by_actor(waiting):
            self._call(actor, actor.handle.ping.remote(), on_answer)
        self._after(ticket.timeout_s, self._still(node, finish))

    def _post(self, actor: Actor, posted: Expected) -> None:
        """Have large contributions put into the store; they are announced when they are there."""
        call = actor.handle.post.options(num_returns=1 + posted.num_values)
        done, *refs = call.remote(self._epoch, posted.seq, posted.nodes, posted.parts)
        self._remember(posted, refs)
        self._call(actor, done, self._timely(lambda _actor, _done: self._announce(posted.seq, posted.nodes)))

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
                case Close(seq, closed, inline):
                    if inline:
                        self._inline_due[seq] = dict(self._arrivals(lambda: traffic.inline(closed, self._posted[seq])))
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
        for seq in {one.seq for one in secures}:
            posted = self._posted[seq]
            givers = [node for node in sorted(posted) if posted[node].specs is not None and posted[node].inline is None]
            if givers:
                self._check_room(seq, [node for node in givers if self._home[node].ready is not None] or givers[:1])
        due = self._arrivals(lambda: traffic.securing(secures, self._posted.__getitem__))
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
            self._call(actor, done, self._timely(lambda actor, result: self._on_secured(actor, result, due)))

    def _contribution(self, seq: int, node: NodeId, part: int) -> ObjectRef[Any]:
        """A member's part in the store; what was not expected to be needed there is put there now."""
        refs = self._contributions.setdefault((seq, node), {})
        if part not in refs:
            inline = self._posted[seq][node].inline  # of a gather that mixes small and large payloads
            late = self._home[node].handle.post_late
            refs[part] = late.remote(self._epoch, seq, node, part) if inline is None else ray.put(inline)
        return refs[part]

    def _on_secured(self, actor: Actor, result: tuple[list[Any], int], due: Mapping[NodeId, float]) -> None:
        jobs, nbytes = result
        self.transport_nbytes += nbytes
        for one in jobs:
            if self._posted[one.seq][one.by].signature.operation == "AllReduce":
                secured = Secured(one.seq, one.part, one.by, one.members, one.generation)
                self._report_at(due.get(one.by), secured)
                continue
            for by in actor.nodes:
                wanted = self._fetching.get((one.seq, one.generation, by))
                if wanted is not None:
                    secured = Secured(one.seq, one.part, by, one.members & wanted, one.generation)
                    self._report_at(due.get(by), secured)

    def _deliver(self, decision: Deliver) -> None:
        posted = self._posted[decision.seq]
        started = not all(posted[node].waits for node in decision.nodes)
        stored = self._stored({node: posted[node] for node in decision.closed})
        due = self._arrivals(lambda: traffic.delivering(decision, posted))
        for actor, nodes in self._by_actor(decision.nodes):
            refs = {
                part: self._reduced[decision.seq, part]
                for part, maker in enumerate(decision.makers)
                if self._home[maker] is not actor
            }

            def done(_: Actor, result: tuple[frozenset[int], int], nodes: list[NodeId] = nodes) -> None:
                missing, nbytes = result
                self.transport_nbytes += nbytes
                for node in nodes:
                    # That something is missing is known at once.
                    when = None if missing else due.get(node)
                    self._report_at(when, Delivered(decision.seq, node, decision.generation, missing))

            ahead = (nodes[0], stored) if started else None
            call = actor.handle.deliver.remote(self._epoch, decision.seq, refs, decision.makers, ahead)
            self._call(actor, call, self._timely(done))

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
        due = self._inline_due.get(decision.seq, {})
        together: defaultdict[float, list[NodeId]] = defaultdict(list)
        for node in decision.nodes:
            together[due.get(node, 0.0)].append(node)
        epoch = self._epoch
        for when, nodes in together.items():
            some = replace(decision, nodes=tuple(nodes))
            self._at(when, lambda some=some: self._advance_now(some) if epoch == self._epoch else None)

    def _advance_now(self, decision: Advance) -> None:
        posted = self._posted[decision.seq]
        members = {node: posted[node] for node in decision.closed}
        shared: object = None if decision.inline else self._stored(members)
        everything = sum(one.nbytes for one in members.values()) if decision.inline else 0
        for actor, nodes in self._by_actor(decision.nodes):
            argument, nbytes = shared, everything
            wants = [posted[node].wants for node in actor.nodes if node in posted]
            if argument is None and any(one is not None for one in wants):
                mine = frozenset(actor.nodes).union(*(among(one, members) for one in wants if one is not None))
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

    def halt(self, nodes: Sequence[NodeId]) -> None:
        for actor, mine in self._by_actor(nodes):
            if not actor.alive:
                continue
            self._halting.update(mine)
            self._starts.update(mine)
            actor.handle.cancel.remote(self._epoch, mine)
            self._call(actor, actor.handle.halt.remote(mine), self._on_halted)
            self._after(
                self._config.cluster.cancel_grace_s, lambda mine=tuple(mine), actor=actor: self._end(actor, mine)
            )

    def _on_halted(self, _: Actor, nodes: Sequence[NodeId]) -> None:
        self._halting.difference_update(nodes)
        self._ready.extend(Halted(node) for node in nodes)

    def _end(self, actor: Actor, nodes: tuple[NodeId, ...]) -> None:
        """Kill a process whose nodes were told to stop and do not."""
        if actor.alive and self._halting.intersection(nodes):
            self._halting.difference_update(nodes)
            grace = self._config.cluster.cancel_grace_s
            self._lost(actor, TimeoutError(f"it did not stop within {grace:g} s (cluster.cancel_grace_s)"))


def _runs_on(ticket: Ticket) -> bool:
    """Whether its program runs on without waiting for anything."""
    return isinstance(ticket, Sending) or (isinstance(ticket, Posted) and not ticket.waits)
