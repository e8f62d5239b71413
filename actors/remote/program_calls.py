"""The node actor's calls that run programs: begin a round, advance after an exchange, cancel, commit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starling.actors.remote.messages import DeliveredResult, Expected, Inline, Reply
from starling.actors.remote.remote_calls import remote_call
from starling.actors.wire.tickets import Posted, Stale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.actors.host.host import Host
    from starling.actors.host.round_order import RoundOrder
    from starling.actors.remote.exchange_calls import ExchangeCalls
    from starling.actors.remote.running_epoch import RunningEpoch
    from starling.actors.remote.store_calls import StoreCalls
    from starling.algorithms.api import NodeId


class ProgramCalls:
    """Runs the programs of the process's nodes to their next operations.

    Args:
        host: of the nodes.
        epoch: the running attempt; a round's begin sets it.
        store: told when an attempt begins.
        exchanges: has contributions, and results.
    """

    def __init__(self, host: Host, epoch: RunningEpoch, store: StoreCalls, exchanges: ExchangeCalls) -> None:
        self._host, self._epoch, self._store, self._exchanges = host, epoch, store, exchanges

    @remote_call("compute")
    def begin(self, order: RoundOrder, nodes: Sequence[NodeId], expected: Expected | None = None) -> Reply | list[Any]:
        """Begin a round and run the programs to their first exchange."""
        self._epoch.number = order.epoch
        self._exchanges.begin()
        self._store.begin()
        self._host.begin(order, nodes)
        return self._with_parts(self.drive([(node, None) for node in nodes]), expected)

    @remote_call("compute")
    def advance(
        self,
        epoch: int,
        seq: int,
        nodes: Sequence[NodeId],
        result: Inline | DeliveredResult,
        expected: Expected | None = None,
    ) -> Reply | list[Any]:
        """Run programs on with the result of a closed exchange."""
        if epoch != self._epoch.number:
            return self._with_parts(Reply([(node, Stale()) for node in nodes]), expected)
        self._exchanges.close(nodes[0], seq, result)
        return self._with_parts(self.drive([(node, self._host.exchanges.take(node, seq)) for node in nodes]), expected)

    @remote_call("compute")
    def run_on(self, epoch: int, items: Sequence[tuple[NodeId, object]]) -> Reply:
        """Run programs on with results that need no conversion: after a ``Start``, ``Send``, ``Sleep`` or ``Ping``."""
        if epoch != self._epoch.number:
            return Reply([(node, Stale()) for node, _ in items])
        return self.drive(items)

    def drive(self, items: Sequence[tuple[NodeId, object]]) -> Reply:
        """Run programs on with results, to their next operations."""
        return Reply(self._host.drive(items), self._host.logs.drain(), self._host.times.drain())

    def _with_parts(self, reply: Reply, expected: Expected | None) -> Reply | list[Any]:
        """The reply, with the contributions that it tells of as values of their own if they are the expected ones."""
        if expected is None:
            return reply
        posted = {node: ticket for node, ticket in reply.tickets if isinstance(ticket, Posted)}
        as_expected = all(
            node in posted
            and (posted[node].seq, len(posted[node].part_nbytes)) == (expected.seq, expected.num_parts)
            and posted[node].inline is None
            for node in expected.nodes
        )
        if not as_expected:
            return [reply, *([None] * expected.num_values)]
        values = self._exchanges.contributions(expected.seq, expected.nodes, expected.parts)
        return [replace(reply, posted=expected.seq), *values]

    @remote_call("compute")
    def settle(self, committed: Mapping[NodeId, int]) -> bool:
        """Apply the controller's commits."""
        self._host.settle(committed)
        return True

    @remote_call("control")
    def cancel(self, epoch: int, nodes: Sequence[NodeId]) -> None:
        """Raise the fences of ``nodes``: their programs stop at the next step."""
        if epoch == self._epoch.number:
            for node in nodes:
                self._host.fences[node].set()

    @remote_call("compute")
    def halt(self, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Close programs that were cancelled; they stand still when this returns."""
        self._host.cancel(nodes)
        return list(nodes)
