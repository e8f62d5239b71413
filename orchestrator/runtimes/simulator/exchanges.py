"""Exchanges in the simulator: reduced for real, and timed as the network says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import Contributed, Measured, Secured
from starling.orchestrator.protocol.events import Delivered
from starling.orchestrator.runtimes import traffic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.actors.wire.buffers import Buffer
    from starling.actors.wire.tickets import Posted
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.events import Close, Deliver, Measure, Secure
    from starling.orchestrator.runtimes.network import Network
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes


@dataclass
class _Exchange:
    """Announcements and intermediate results of one exchange."""

    posted: dict[NodeId, Posted] = field(default_factory=dict)
    reduced: dict[int, Buffer] = field(default_factory=dict)
    arrivals: dict[NodeId, float] = field(default_factory=dict)
    """Arrival times of small contributions at each member, also at members that have not come to take them."""


class SimulatedExchanges:
    """Carries out the steps of exchanges of the running attempt.

    Args:
        clock: schedules the ends of steps.
        nodes: hold the contributions.
        network: how long steps take.
    """

    def __init__(self, clock: VirtualClock, nodes: SimulatedNodes, network: Network) -> None:
        self._clock = clock
        self._nodes = nodes
        self._network = network
        self._exchanges: dict[int, _Exchange] = {}

    def begin(self) -> None:
        """Drop everything of the attempt before."""
        self._exchanges = {}

    def take(self, node: NodeId, ticket: Posted) -> None:
        """Take an announcement; a program that only started the exchange runs on."""
        exchange = self._exchanges.get(ticket.seq)
        if exchange is None:
            exchange = self._exchanges[ticket.seq] = _Exchange()
        exchange.posted[node] = ticket
        if not ticket.waits:
            self._clock.resume_at(self._clock.now, node)

    def measure(self, requests: Sequence[Measure]) -> None:
        """Measure parts; ``Measured`` comes when every member's part has come to its reducer, all in one phase."""
        now, exchanges = self._clock.now, self._nodes.host.exchanges
        arrivals = self._network.arrivals(now, traffic.securing(requests, lambda seq: self._exchanges[seq].posted))
        for one in requests:
            specs = self._exchanges[one.seq].posted[one.members[0]].specs
            assert specs is not None
            contributions = {member: exchanges.parts(member, one.seq)[one.part] for member in one.members}
            values = exchanges.measure(one.by, one.seq, one.part, specs, contributions)
            got = Measured(one.seq, one.part, one.by, frozenset(one.members), one.generation, values)
            self._clock.at(arrivals.get(one.by, now), one.by, got, self._clock.epoch)

    def secure(self, secures: Sequence[Secure]) -> None:
        """Reduce parts; ``Secured`` comes when every member's part has come to its reducer, all in one phase."""
        now, exchanges = self._clock.now, self._nodes.host.exchanges
        arrivals = self._network.arrivals(now, traffic.securing(secures, lambda seq: self._exchanges[seq].posted))
        for one in secures:
            exchange = self._exchanges[one.seq]
            first = exchange.posted[one.members[0]] if one.members else None
            if first is not None and first.signature.operation == "AllReduce":
                assert first.specs is not None
                contributions = {
                    member: (exchanges.parts(member, one.seq)[one.part], exchange.posted[member].weight)
                    for member in one.members
                }
                measures = [measured.values for measured in one.measured]
                exchange.reduced[one.part] = exchanges.reduce(
                    one.by, one.seq, one.part, first.specs, contributions, measures
                )
            got = Secured(one.seq, one.part, one.by, frozenset(one.members), one.generation)
            self._clock.at(arrivals.get(one.by, now), one.by, got, self._clock.epoch)

    def deliver(self, decision: Deliver) -> None:
        """Schedule ``Delivered`` for when each reduced part has come from its maker to everybody, in one phase."""
        now = self._clock.now
        arrivals = self._network.arrivals(now, traffic.delivering(decision, self._exchanges[decision.seq].posted))
        for node in decision.nodes:
            delivered = Delivered(decision.seq, node, decision.generation)
            self._clock.at(arrivals.get(node, now), node, delivered, self._clock.epoch)

    def close(self, decision: Close) -> None:
        """Compute the result now, before anybody runs on: contributions may share memory with parameters."""
        seq, exchanges = decision.seq, self._nodes.host.exchanges
        exchange = self._exchanges[seq]
        first = decision.closed[0]
        if decision.inline and not self._network.is_instant:
            phase = traffic.inline(decision.closed, exchange.posted)
            exchange.arrivals = self._network.arrivals(self._clock.now, phase)
        if exchange.posted[first].signature.operation != "AllReduce":
            exchanges.conclude_here(decision.closed, seq)
            exchanges.release(seq)
            return
        posted = {node: exchange.posted[node] for node in decision.closed}
        if decision.inline:
            inline = [
                Contributed(node, one.weight, one.specs, one.inline)
                for node, one in posted.items()
                if one.specs is not None and one.inline is not None
            ]
            exchanges.conclude_inline(first, seq, inline)
        else:
            weights = {node: one.weight for node, one in posted.items()}
            parts = [exchange.reduced.pop(part) for part in sorted(exchange.reduced)]
            specs = posted[first].specs
            assert specs is not None
            exchanges.conclude_reduce(first, seq, specs, weights, parts)
        exchanges.release(seq)

    def arrivals(self, seq: int) -> Mapping[NodeId, float]:
        """Return when the result of a closed exchange has come to each member; empty: to all of them, now."""
        return self._exchanges[seq].arrivals

    def give_up(self, node: NodeId) -> None:
        pass  # every fetch succeeds
