"""Programs on Ray: begun, advanced from ticket to ticket, and cancelled."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starling.actors.remote.messages import Expected, Reply
from starling.actors.wire.tickets import Pinging, Posted, Sending, Sleeping, Stale
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.runtimes.events import Halted, Log, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starling.actors.host.round_order import RoundOrder
    from starling.actors.wire.tickets import Ticket
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.events import Advance
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.attempt import RunningAttempt
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.exchanges import ObjectExchange
    from starling.orchestrator.runtimes.cluster.messages import SentLetters
    from starling.orchestrator.runtimes.cluster.transport import Transport

_BEGIN = -1
"""Stands for the call that begins a round, where others are named by an exchange."""


class ProgramDriver:
    """Calls actors to run their programs on, and takes their replies.

    Args:
        loop: reports what programs do.
        pool: the actors.
        attempt: guards against replies of earlier attempts.
        exchanges: takes contributions, and gives results.
        letters: takes messages.
        transport: the latency of pings.
        grace_s: a process that does not stop within this time after ``halt`` is lost.
    """

    def __init__(
        self,
        loop: EventLoop,
        pool: ActorPool,
        attempt: RunningAttempt,
        exchanges: ObjectExchange,
        letters: SentLetters,
        transport: Transport,
        grace_s: float,
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._attempt = attempt
        self._exchanges = exchanges
        self._letters = letters
        self._transport = transport
        self._grace_s = grace_s
        self._expected: dict[tuple[int, int], Expected] = {}
        """Large contributions to which a call led the last time, by actor and exchange."""
        self._halting: set[NodeId] = set()

    # --- begin and advance -------------------------------------------------------------------------------------------

    def begin(self, order: RoundOrder, nodes: Sequence[NodeId]) -> None:
        self._attempt.begin(order.epoch, order.view.members, nodes)
        self._exchanges.begin()
        for actor, mine in self._pool.by_actor(nodes):
            self._drive(actor, _BEGIN, lambda call, expected, mine=mine: call.remote(order, mine, expected))

    def advance(self, decision: Advance) -> None:
        epoch = self._attempt.epoch
        for when, nodes in self._exchanges.by_arrival(decision).items():
            some = replace(decision, nodes=tuple(nodes))
            self._loop.at(when, lambda some=some: self._advance_now(some) if epoch == self._attempt.epoch else None)

    def _advance_now(self, decision: Advance) -> None:
        epoch, seq = self._attempt.epoch, decision.seq
        for actor, nodes, argument in self._exchanges.results(decision):
            self._drive(
                actor,
                seq,
                lambda call, expected, nodes=nodes, argument=argument: call.remote(
                    epoch, seq, nodes, argument, expected
                ),
            )

    def run_on(self, actor: Actor, items: Sequence[tuple[NodeId, object]]) -> None:
        """Run programs on with results that need no conversion."""
        if actor.alive:
            call = actor.handle.run_on.remote(self._attempt.epoch, items)
            self._pool.call(actor, call, self._attempt.timely(self.on_reply))

    def _drive(self, actor: Actor, place: int, remote: Callable[[Any, Expected | None], Any]) -> None:
        """Call ``begin``, or ``advance`` after exchange ``place``.

        Rounds are alike. A call that led to a large contribution the last time is asked to give its parts along with
        the reply, which saves the call that would fetch them.
        """
        method = actor.handle.begin if place == _BEGIN else actor.handle.advance
        known = self._expected.get((actor.index, place))
        if known is None or known.num_parts > len(self._attempt.members):
            expected = None
        else:
            expected = replace(known, parts=self._exchanges.parts_for_others(actor, known.num_parts))
        if expected is None or not expected.parts:
            on_reply = self._attempt.timely(lambda actor, reply: self.on_reply(actor, reply, place))
            self._pool.call(actor, remote(method, None), on_reply)
            return
        done, *refs = remote(method.options(num_returns=1 + expected.num_values), expected)

        def on_both(actor: Actor, reply: Reply) -> None:
            if reply.posted is not None:
                self._exchanges.remember(expected, refs)
            self.on_reply(actor, reply, place)

        self._pool.call(actor, done, self._attempt.timely(on_both))

    # --- replies -----------------------------------------------------------------------------------------------------

    def on_reply(self, actor: Actor, reply: Reply, place: int | None = None) -> None:
        """Take what the programs of an actor did; ``place`` is the exchange that they came from, if any.

        Raises:
            ClusterError: a machine's store is too small for what they contribute.
        """
        for node, lines in reply.logs.items():
            self._loop.report(Log(node, tuple(lines)))
        for node, values in reply.seen.items():
            self._loop.report(Seen(node, tuple(values)))
        large: defaultdict[tuple[int, int], list[NodeId]] = defaultdict(list)
        for node, ticket in reply.tickets:
            if isinstance(ticket, Posted):
                if self._exchanges.take(node, ticket):
                    large[ticket.seq, len(ticket.part_nbytes)].append(node)
            else:
                self._take(actor, node, ticket)
        for (seq, _), nodes in large.items():
            expected = self._exchanges.collect(actor, seq, nodes, came_along=reply.posted == seq)
            # Not where the program runs on: it would wait until its parts are in the store.
            if place is not None and all(self._exchanges.posted[seq][node].waits for node in nodes):
                self._expected[actor.index, place] = expected
        moving = [node for node, ticket in reply.tickets if _runs_on(ticket)]
        if moving:
            self.run_on(actor, [(node, None) for node in moving])

    def _take(self, actor: Actor, node: NodeId, ticket: Ticket) -> None:
        """Do a runtime's part of an operation; all but pings are the controller's too."""
        match ticket:
            case Stale():
                return
            case Pinging():
                self._ping(actor, node, ticket)
                return
            case Sending():
                self._letters.add(node, ticket)
            case Sleeping(seconds):
                self._loop.after(seconds, self._attempt.still(node, lambda: self.run_on(actor, [(node, None)])))
            case _:
                pass
        self._loop.report(Reached(node, ticket))

    def _ping(self, home: Actor, node: NodeId, ticket: Pinging) -> None:
        """Ping the processes of nodes; the program runs on with those that answered in time."""
        answered: set[NodeId] = set()
        there = self._pool.home
        waiting = {other for other in ticket.nodes if other in there and there[other].alive}
        began, over = self._loop.now, False

        def finish() -> None:
            nonlocal over
            if not over:
                over = True
                self.run_on(home, [(node, frozenset(answered))])

        def answer(other: NodeId) -> None:
            answered.add(other)
            if len(answered) == len(set(ticket.nodes)):
                finish()

        def on_answer(actor: Actor, _: object) -> None:
            for other in sorted(waiting.intersection(actor.nodes)):
                back = began + 2 * self._transport.latency_s(node, other)
                self._loop.at(back, self._attempt.still(node, lambda other=other: answer(other)))

        for actor, _nodes in self._pool.by_actor(waiting):
            self._pool.call(actor, actor.handle.ping.remote(), on_answer)
        self._loop.after(ticket.timeout_s, self._attempt.still(node, finish))

    # --- cancel ------------------------------------------------------------------------------------------------------

    def halt(self, nodes: Sequence[NodeId]) -> None:
        for actor, mine in self._pool.by_actor(nodes):
            if not actor.alive:
                continue
            self._halting.update(mine)
            self._attempt.interrupt(mine)
            actor.handle.cancel.remote(self._attempt.epoch, mine)
            self._pool.call(actor, actor.handle.halt.remote(mine), self._on_halted)
            self._loop.after(self._grace_s, lambda mine=tuple(mine), actor=actor: self._end(actor, mine))

    def _on_halted(self, _: Actor, nodes: Sequence[NodeId]) -> None:
        self._halting.difference_update(nodes)
        self._loop.report(*(Halted(node) for node in nodes))

    def _end(self, actor: Actor, nodes: tuple[NodeId, ...]) -> None:
        """Take an actor for lost whose nodes were cancelled and have not stopped."""
        if actor.alive and self._halting.intersection(nodes):
            self._halting.difference_update(nodes)
            self._pool.lost(actor, TimeoutError(f"it did not stop within {self._grace_s:g} s (cluster.cancel_grace_s)"))


def _runs_on(ticket: Ticket) -> bool:
    """Return whether the program runs on at once."""
    return isinstance(ticket, Sending) or (isinstance(ticket, Posted) and not ticket.waits)
