"""Programs in the simulator: run for real, while the virtual clock shows how long they would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from starling.actors.wire.tickets import (
    Computing,
    Failed,
    Pinging,
    Posted,
    Returned,
    Sending,
    Sleeping,
    Stale,
    Ticket,
)
from starling.algorithms.api import Evaluate, Gradient, Loss, TrainReport
from starling.orchestrator.protocol.events import Posts, Reached, Returns
from starling.orchestrator.runtimes.events import Halted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.host.round_order import RoundOrder
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.events import Advance
    from starling.orchestrator.runtimes.network import Network
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.exchanges import SimulatedExchanges
    from starling.orchestrator.runtimes.simulator.messages import SimulatedMessages
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes
    from starling.orchestrator.runtimes.simulator.processes import SimulatedProcesses

_FORWARD_FRACTION = 1 / 3
"""Time of a forward pass as a fraction of a step's. A backward pass takes about twice as long."""

Resume: TypeAlias = "tuple[NodeId, object, int | None]"
"""A program runs on: its node, and the result, or the exchange whose result it is."""


class SimulatedPrograms:
    """Runs programs to their next operations, and takes their tickets.

    Args:
        config: how long a step takes on each node.
        clock: resumes programs, and reports what they do.
        nodes: the host that runs them.
        exchanges: takes contributions.
        messages: takes messages.
        processes: ends those that hang.
        network: latencies of pings.
    """

    def __init__(
        self,
        config: Config,
        clock: VirtualClock,
        nodes: SimulatedNodes,
        exchanges: SimulatedExchanges,
        messages: SimulatedMessages,
        processes: SimulatedProcesses,
        network: Network,
    ) -> None:
        self._clock = clock
        self._nodes = nodes
        self._exchanges = exchanges
        self._messages = messages
        self._processes = processes
        self._network = network
        self._step_ms = config.network.step_ms
        self._speeds = config.network.speeds
        self._is_synchronous = config.algorithm.synchronous

    # --- begin and end -----------------------------------------------------------------------------------------------

    def begin(self, order: RoundOrder, nodes: Sequence[NodeId]) -> None:
        self._clock.epoch = order.epoch
        self._exchanges.begin()
        there = [node for node in nodes if node in self._nodes.present and node not in self._nodes.hung]
        if there:
            self._nodes.host.begin(order, there)
        for node in there:
            self._clock.interrupt(node)
            self._clock.resume_at(self._clock.now, node)

    def advance(self, decision: Advance) -> None:
        now, arrivals = self._clock.now, self._exchanges.arrivals(decision.seq)
        for node in decision.nodes:
            when = max(now, arrivals.get(node, now)) if arrivals else now
            self._clock.resume_at(when, node, None, decision.seq)

    def halt(self, nodes: Sequence[NodeId]) -> None:
        for node in nodes:
            if node in self._nodes.hung:
                self._processes.end_hung(node)
                continue
            self._nodes.host.cancel([node])
            self._clock.interrupt(node)
            self._clock.ready.append(Halted(node))

    # --- run ---------------------------------------------------------------------------------------------------------

    def run(self, resumes: Sequence[Resume]) -> None:
        """Run programs that become runnable at one moment; what they compute goes to the handler together."""
        host = self._nodes.host
        computing: list[tuple[NodeId, Compute]] = []
        tickets: list[tuple[NodeId, Ticket]] = []
        for node, result, seq in resumes:
            if host.is_over(node):  # it has died, and what comes for it is told to nobody
                continue
            ticket = host.resume(node, result if seq is None else host.exchanges.take(node, seq))
            if isinstance(ticket, Computing):
                computing.append((node, ticket.operation))
            else:
                tickets.append((node, ticket))
        self._take_all(tickets)
        is_replay = host.times.is_replay
        for (node, operation), result in zip(computing, host.computation.run(computing), strict=True):
            if isinstance(result, TrainReport):
                seconds = result.num_steps * self._step_ms / 1000 / self._speeds.get(node, 1.0)
                self._resume_in(seconds, node, result if is_replay else result._replace(seconds=seconds))
            elif isinstance(result, Failed | Stale):
                self._take(node, result)
            else:
                self._resume_in(self._seconds(node, operation), node, result)

    def _resume_in(self, seconds: float, node: NodeId, result: object = None) -> None:
        self._clock.resume_at(self._clock.now + seconds, node, result)

    def _seconds(self, node: NodeId, operation: Compute) -> float:
        """Return how long an operation other than ``Train`` takes on the virtual clock."""
        steps = 0.0
        if isinstance(operation, Gradient):
            steps = 1.0
        elif isinstance(operation, Loss | Evaluate):
            steps = _FORWARD_FRACTION
        return steps * self._step_ms / 1000 / self._speeds.get(node, 1.0)

    # --- tickets -----------------------------------------------------------------------------------------------------

    def _take_all(self, tickets: Sequence[tuple[NodeId, Ticket]]) -> None:
        """Take tickets; runs of equal ones are reported as one event."""
        posts: tuple[Posted, Posts] | None = None
        returns: tuple[Returned, Returns] | None = None
        ready = self._clock.ready
        for node, ticket in tickets:
            if isinstance(ticket, Posted) and self._is_synchronous and ticket.close is None:
                self._exchanges.take(node, ticket)
                if posts is None or not _alike(ticket, posts[0]):
                    posts = ticket, Posts({})
                    ready.append(posts[1])
                posts[1].tickets[node] = ticket
                returns = None
            elif isinstance(ticket, Returned) and self._is_synchronous:
                if returns is None or not _alike_ends(ticket, returns[0]):
                    returns = ticket, Returns({})
                    ready.append(returns[1])
                returns[1].tickets[node] = ticket
                posts = None
            else:
                self._take(node, ticket)
                posts, returns = None, None

    def _take(self, node: NodeId, ticket: Ticket) -> None:
        """Do a runtime's part of an operation; all but pings are the controller's too."""
        match ticket:
            case Computing() | Stale():
                return
            case Pinging():
                self._ping(node, ticket)
                return
            case Posted():
                self._exchanges.take(node, ticket)
            case Sending():
                self._messages.add(ticket)
                self._resume_in(0.0, node)
            case Sleeping(seconds):
                self._resume_in(seconds, node)
            case _:
                pass
        self._clock.ready.append(Reached(node, ticket))

    def _ping(self, node: NodeId, ticket: Pinging) -> None:
        """Resume a program with the present nodes whose round trip is within the timeout."""
        there = (other for other in ticket.nodes if other in self._nodes.present)
        trips = {other: 2 * self._network.latency_s(node, other) for other in there}
        answers = {other: seconds for other, seconds in trips.items() if seconds <= ticket.timeout_s}
        complete = len(answers) == len(set(ticket.nodes))
        seconds = max(answers.values(), default=0.0) if complete else ticket.timeout_s
        self._resume_in(seconds, node, frozenset(answers))


def _alike(one: Posted, other: Posted) -> bool:
    """Return whether two posts differ, for the rendezvous, in nothing but ``wants``."""
    return (
        one.seq == other.seq
        and one.signature is other.signature
        and one.part_nbytes == other.part_nbytes
        and one.result_nbytes == other.result_nbytes
        and one.weight == other.weight
        and one.waits is other.waits
        and (one.specs is None) is (other.specs is None)
        and (one.inline is None) is (other.inline is None)
        and one.skipped == other.skipped
    )


def _alike_ends(one: Returned, other: Returned) -> bool:
    return one.num_collectives == other.num_collectives and one.digest == other.digest
