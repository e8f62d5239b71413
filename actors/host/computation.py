"""Compute operations of programs, carried out in the host's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from starling.actors.host import batched
from starling.actors.host.failures import failure
from starling.actors.replica.spec import Interrupted
from starling.actors.wire.tickets import Stale
from starling.algorithms.api import Batch, Evaluate, Gradient, Loss, Step, Train, TrainReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.actors.host.node_log import NodeLogs
    from starling.actors.host.recorded_clock import Times
    from starling.actors.replica.replica import Replica
    from starling.actors.replica.spec import Fence
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import NodeId


class Computation:
    """Carries out the compute operations of the process's nodes, equal ``Train``s of several nodes in one batch.

    Args:
        replicas: of the nodes.
        fences: stop a node at its next step.
        times: through which programs see how long they trained.
        logs: told whose code runs.
    """

    def __init__(
        self, replicas: Mapping[NodeId, Replica], fences: Mapping[NodeId, Fence], times: Times, logs: NodeLogs
    ) -> None:
        self._replicas, self._fences = replicas, fences
        self._times, self._logs = times, logs

    def run(self, requests: Sequence[tuple[NodeId, Compute]]) -> list[Any]:
        """Carry out compute operations of several nodes.

        Returns:
            For each request the operation's result, ``Failed``, or ``Stale`` if the node's fence was raised.
        """
        results: list[Any] = [None] * len(requests)
        trains = [place for place, (_, operation) in enumerate(requests) if isinstance(operation, Train)]
        if trains:
            batch = [(node, cast("Train", operation)) for node, operation in map(requests.__getitem__, trains)]
            fenced = [(self._replicas[node], operation, self._fences[node]) for node, operation in batch]
            for place, outcome in zip(trains, batched.train_together(fenced, self._logs.turn_to), strict=True):
                node = requests[place][0]
                is_done = isinstance(outcome, TrainReport)
                results[place] = self._times.timed(node, outcome) if is_done else self._outcome(node, outcome)
        for place, (node, operation) in enumerate(requests):
            if not isinstance(operation, Train):
                self._logs.turn_to(node)
                try:
                    results[place] = self._carry_out(node, operation)
                except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
                    results[place] = self._outcome(node, error)
        return results

    def _carry_out(self, node: NodeId, operation: Compute) -> object:
        replica = self._replicas[node]
        if self._fences[node].is_set():
            return Stale()
        match operation:
            case Batch():
                return replica.data.batch(operation)
            case Gradient():
                return replica.trainer.gradient(operation)
            case Step():
                return replica.trainer.step(operation)
            case Loss():
                return replica.trainer.loss(operation)
            case Evaluate():
                return replica.evaluate_at(operation)
            case Train():
                raise AssertionError

    def _outcome(self, node: NodeId, outcome: object) -> object:
        if isinstance(outcome, Interrupted):
            return Stale()
        if isinstance(outcome, Exception):
            return failure(node, self._replicas[node].round, outcome)
        return outcome
