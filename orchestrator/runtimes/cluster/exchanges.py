"""Exchanges on Ray: contributions travel through the object store, directly between nodes.

The controller's process holds actor handles and references; it never looks into a tensor. What a call returns is
owned by this process: it outlives the actor that made it, and goes to its consumers as a reference.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from starling.actors.remote.messages import DeliveredResult, Expected, Inline, SecureJob
from starling.actors.wire.buffers import added
from starling.actors.wire.tickets import Contributed, among
from starling.orchestrator.protocol.events import Delivered, Measure, Reached, Secure
from starling.orchestrator.runtimes import traffic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.wire.buffers import Buffer
    from starling.actors.wire.tickets import Measured, Posted, Secured
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.events import Advance, Close, Deliver
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.attempt import RunningAttempt
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.store import StoreRoom
    from starling.orchestrator.runtimes.cluster.transport import Transport

_BY_REFERENCE_BYTES = 100_000
"""Arguments above this are put into the store by Ray, once per call; we put them there once for all calls."""


class ObjectExchange:
    """Posts, secures and delivers the contributions of the running attempt.

    Args:
        loop: reports announcements.
        pool: the actors.
        attempt: its members and epoch.
        transport: counts and throttles transfers.
        room: checks that object stores are large enough.
    """

    def __init__(
        self, loop: EventLoop, pool: ActorPool, attempt: RunningAttempt, transport: Transport, room: StoreRoom
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._attempt = attempt
        self._transport = transport
        self._room = room
        self.posted: defaultdict[int, dict[NodeId, Posted]] = defaultdict(dict)
        """Announcements by exchange and node."""
        self._contributions: dict[tuple[int, NodeId], dict[int, ObjectRef[Any]]] = {}
        self._reduced: dict[tuple[int, int], ObjectRef[Any]] = {}
        self._fetching: dict[tuple[int, int, NodeId], frozenset[NodeId]] = {}
        """Members whose contributions to a gather a node is to have, by exchange, generation and node."""
        self._inline_due: dict[int, dict[NodeId, float]] = {}
        """Arrival times of small contributions, by exchange and receiver."""
        self._looked_at: set[int] = set()
        """Exchanges that the stores have room for."""

    def begin(self) -> None:
        """Drop everything of the attempt before."""
        self.posted.clear()
        self.release()
        self._fetching, self._inline_due, self._looked_at = {}, {}, set()

    def release(self) -> None:
        """Drop the references of all contributions and results, so that they leave the store."""
        self._contributions, self._reduced = {}, {}

    # --- posts -------------------------------------------------------------------------------------------------------

    def take(self, node: NodeId, ticket: Posted) -> bool:
        """Take an announcement; return whether its contribution is large, and to be announced by ``collect``."""
        self.posted[ticket.seq][node] = ticket
        if ticket.specs is not None and ticket.inline is None:
            return True
        self._transport.count(ticket.nbytes)
        self._loop.report(Reached(node, ticket))
        return False

    def collect(self, actor: Actor, seq: int, nodes: Sequence[NodeId], *, came_along: bool) -> Expected:
        """Have an actor put large contributions into the store, and announce them; return the parts that are put.

        Args:
            actor: hosts ``nodes``.
            seq: of the exchange.
            nodes: contributors.
            came_along: the parts came with the actor's reply, and are in the store already.

        Raises:
            ClusterError: a machine's store is too small.
        """
        if seq not in self._looked_at:  # one alone may be too large, and is not put there then
            self._looked_at.add(seq)
            self._room.check_exchange(self.posted[seq], nodes)
        num_parts = len(self.posted[seq][nodes[0]].part_nbytes)
        expected = Expected(seq, tuple(nodes), num_parts, self.parts_for_others(actor, num_parts))
        if came_along or not expected.parts:
            self._announce(seq, nodes)
        else:
            self._post(actor, expected)
        return expected

    def _post(self, actor: Actor, expected: Expected) -> None:
        call = actor.handle.post.options(num_returns=1 + expected.num_values)
        done, *refs = call.remote(self._attempt.epoch, expected.seq, expected.nodes, expected.parts)
        self.remember(expected, refs)
        announce = self._attempt.timely(lambda _actor, _done: self._announce(expected.seq, expected.nodes))
        self._pool.call(actor, done, announce)

    def _announce(self, seq: int, nodes: Iterable[NodeId]) -> None:
        self._loop.report(*(Reached(node, self.posted[seq][node]) for node in nodes))

    def parts_for_others(self, actor: Actor, num_parts: int) -> tuple[int, ...]:
        """Return the parts that other processes reduce if everybody contributes; the actor's own stay in its memory."""
        members = self._attempt.members
        return tuple(part for part in range(num_parts) if self._pool.home[members[part]] is not actor)

    def remember(self, expected: Expected, refs: Sequence[ObjectRef[Any]]) -> None:
        """Keep the references of contributions, which are in the order of ``expected``."""
        width = len(expected.parts)
        for place, node in enumerate(expected.nodes):
            mine = refs[place * width : (place + 1) * width]
            self._contributions[expected.seq, node] = dict(zip(expected.parts, mine, strict=True))

    # --- measuring and securing --------------------------------------------------------------------------------------

    def measure(self, requests: Sequence[Measure]) -> None:
        """Have members fetch contributions and measure their parts; ``Measured`` is reported for each.

        Raises:
            ClusterError: a machine's store is too small.
        """
        self._check_room(requests)
        due = self._transport.arrivals(lambda: traffic.securing(requests, self.posted.__getitem__))
        for actor, jobs in self._jobs(requests):
            done = actor.handle.measure.remote(self._attempt.epoch, jobs)
            measured = self._attempt.timely(lambda _actor, result: self._on_measured(result, due))
            self._pool.call(actor, done, measured)

    def _on_measured(self, result: tuple[list[Measured], int], due: Mapping[NodeId, float]) -> None:
        measured, nbytes = result
        self._transport.count(nbytes)
        for one in measured:
            self._attempt.report_at(due.get(one.by), one)

    def secure(self, secures: Sequence[Secure]) -> None:
        """Have members fetch contributions and reduce their parts; ``Secured`` is reported for each.

        Raises:
            ClusterError: a machine's store is too small.
        """
        self._check_room(secures)
        due = self._transport.arrivals(lambda: traffic.securing(secures, self.posted.__getitem__))
        for actor, jobs in self._jobs(secures):
            call = actor.handle.secure.options(num_returns=1 + len(jobs))
            done, *parts = call.remote(self._attempt.epoch, jobs)
            for job, part in zip(jobs, parts, strict=True):
                if job.specs is not None:
                    self._reduced[job.seq, job.part] = part
            secured = self._attempt.timely(lambda actor, result: self._on_secured(actor, result, due))
            self._pool.call(actor, done, secured)

    def _jobs(self, requests: Sequence[Measure | Secure]) -> Iterator[tuple[Actor, list[SecureJob]]]:
        """Yield each actor with what it is to measure or to reduce."""
        jobs: defaultdict[int, dict[tuple[int, int, NodeId], SecureJob]] = defaultdict(dict)
        measured: dict[int, Buffer] = {}
        for one in requests:
            if isinstance(one, Secure) and one.measured and one.seq not in measured:
                measured[one.seq] = added([measure.values for measure in one.measured])
            home = self._pool.home[one.by]
            posted = self.posted[one.seq]
            is_gather = posted[one.by].signature.operation != "AllReduce"
            # A process fetches for a gather once, what any of its nodes is to have.
            by = home.nodes[0] if is_gather else one.by
            known = jobs[home.index].get((one.seq, one.part, by))
            weights = {member: posted[member].weight for member in one.members}
            refs = {
                member: self._contribution(one.seq, member, one.part)
                for member in one.members
                if self._pool.home[member] is not home
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
                measured=measured.get(one.seq),
            )
        for index, mine in jobs.items():
            yield self._pool.actors[index], list(mine.values())

    def _check_room(self, requests: Sequence[Measure | Secure]) -> None:
        """Check the stores again, now that all contributors to an exchange are known."""
        for seq in {one.seq for one in requests}:
            posted = self.posted[seq]
            givers = [node for node in sorted(posted) if posted[node].specs is not None and posted[node].inline is None]
            if givers:
                there = [node for node in givers if self._pool.home[node].ready is not None]
                self._room.check_exchange(posted, there or givers[:1])

    def _contribution(self, seq: int, node: NodeId, part: int) -> ObjectRef[Any]:
        """Return the reference of one part; a part that was expected to stay in its process is put into the store."""
        refs = self._contributions.setdefault((seq, node), {})
        if part not in refs:
            inline = self.posted[seq][node].inline  # of a gather that mixes small and large payloads
            late = self._pool.home[node].handle.post_late
            refs[part] = late.remote(self._attempt.epoch, seq, node, part) if inline is None else ray.put(inline)
        return refs[part]

    def _on_secured(self, actor: Actor, result: tuple[list[Secured], int], due: Mapping[NodeId, float]) -> None:
        jobs, nbytes = result
        self._transport.count(nbytes)
        for one in jobs:
            if self.posted[one.seq][one.by].signature.operation == "AllReduce":
                self._attempt.report_at(due.get(one.by), one)
                continue
            for by in actor.nodes:
                wanted = self._fetching.get((one.seq, one.generation, by))
                if wanted is not None:
                    self._attempt.report_at(due.get(by), replace(one, by=by, got=one.got & wanted))

    # --- delivering --------------------------------------------------------------------------------------------------

    def deliver(self, decision: Deliver) -> None:
        """Have members fetch the reduced parts; ``Delivered`` is reported for each."""
        posted = self.posted[decision.seq]
        started = not all(posted[node].waits for node in decision.nodes)
        stored = _stored({node: posted[node] for node in decision.closed})
        due = self._transport.arrivals(lambda: traffic.delivering(decision, posted))
        for actor, nodes in self._pool.by_actor(decision.nodes):
            refs = {
                part: self._reduced[decision.seq, part]
                for part, maker in enumerate(decision.makers)
                if self._pool.home[maker] is not actor
            }

            def done(_: Actor, result: tuple[frozenset[int], int], nodes: list[NodeId] = nodes) -> None:
                missing, nbytes = result
                self._transport.count(nbytes)
                for node in nodes:
                    # That something is missing is known at once.
                    when = None if missing else due.get(node)
                    self._attempt.report_at(when, Delivered(decision.seq, node, decision.generation, missing))

            ahead = (nodes[0], stored) if started else None
            call = actor.handle.deliver.remote(self._attempt.epoch, decision.seq, refs, decision.makers, ahead)
            self._pool.call(actor, call, self._attempt.timely(done))

    def close(self, decision: Close) -> None:
        """Drop the references of a closed exchange, of which every member holds the result."""
        seq = decision.seq
        if decision.inline:
            posted = self.posted[seq]
            self._inline_due[seq] = dict(self._transport.arrivals(lambda: traffic.inline(decision.closed, posted)))
        self._contributions = {key: refs for key, refs in self._contributions.items() if key[0] != seq}
        self._reduced = {key: ref for key, ref in self._reduced.items() if key[0] != seq}

    def give_up(self, node: NodeId) -> None:
        self._pool.give_up(self._attempt.epoch, node)

    def by_arrival(self, decision: Advance) -> Mapping[float, list[NodeId]]:
        """Group the nodes that advance by when the network brings them the result; 0: at once."""
        due = self._inline_due.get(decision.seq, {})
        together: defaultdict[float, list[NodeId]] = defaultdict(list)
        for node in decision.nodes:
            together[due.get(node, 0.0)].append(node)
        return together

    def results(self, decision: Advance) -> Iterator[tuple[Actor, list[NodeId], object]]:
        """Yield each actor with its nodes that advance, and the argument that tells it the result."""
        posted = self.posted[decision.seq]
        members = {node: posted[node] for node in decision.closed}
        shared: object = None if decision.inline else _stored(members)
        everything = sum(one.nbytes for one in members.values()) if decision.inline else 0
        for actor, nodes in self._pool.by_actor(decision.nodes):
            argument, nbytes = shared, everything
            wants = [posted[node].wants for node in actor.nodes if node in posted]
            if argument is None and any(one is not None for one in wants):
                mine = frozenset(actor.nodes).union(*(among(one, members) for one in wants if one is not None))
                argument = _inline({node: one for node, one in members.items() if node in mine}, decision.closed)
                nbytes = argument.data.nbytes
            elif argument is None:
                argument = _inline(members, decision.closed)
                shared = argument = ray.put(argument) if nbytes > _BY_REFERENCE_BYTES else argument
            self._transport.count(nbytes)
            yield actor, nodes, argument


def _stored(members: Mapping[NodeId, Posted]) -> DeliveredResult:
    """Describe a result that went through the store."""
    is_gather = next(iter(members.values())).signature.operation != "AllReduce"
    specs = {node: one.specs for node, one in members.items() if one.specs is not None}
    return DeliveredResult(
        specs=None if is_gather else next(iter(specs.values())),
        weights={node: one.weight for node, one in members.items()},
        gathered=specs if is_gather else {},
    )


def _inline(members: Mapping[NodeId, Posted], closed: tuple[NodeId, ...]) -> Inline:
    """Pack small contributions into one argument."""
    contributions = [
        Contributed(node, one.weight, one.specs, one.inline)
        for node, one in members.items()
        if one.specs is not None and one.inline is not None
    ]
    return Inline.of(contributions, closed)
