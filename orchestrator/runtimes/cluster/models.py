"""Committed models on Ray: evaluated and fetched, one call at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from starling.actors.wire.tickets import Failed
from starling.orchestrator.errors import NodeFailedError, NodeGoneError
from starling.orchestrator.runtimes.cluster.session import reason_of
from starling.orchestrator.runtimes.events import FinalModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray import ObjectRef

    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.cluster.actors import ActorPool

_CALL_TIMEOUT_S = 600.0
"""Bound on calls whose duration is the user's model."""


class ClusterModels:
    """Asks actors for their nodes' committed models, and waits for the answers.

    Args:
        pool: the actors.
    """

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None, *, averaged: bool = False) -> dict[str, float]:
        first, *others = nodes
        models = self._models(others, averaged=averaged)
        call = self._pool.home[first].handle.evaluate.remote(first, models, max_batches, averaged)
        result = self._ask(first, call)
        if isinstance(result, Failed):
            raise NodeFailedError(result.message, result.traceback)
        return result

    def fetch(self, nodes: Sequence[NodeId], *, averaged: bool = False) -> FinalModel:
        first, *others = nodes
        models = self._models(others, averaged=averaged)
        digest, data = self._ask(first, self._pool.home[first].handle.model.remote(first, models, averaged))
        return FinalModel(digest, data)

    def _models(self, nodes: Sequence[NodeId], *, averaged: bool) -> list[ObjectRef[Any]]:
        """Put the committed models of ``nodes``, or their running averages, into the store."""
        handles = [self._pool.home[node].handle for node in nodes]
        answers = [
            handle.committed_model.options(num_returns=2).remote(node, averaged)
            for node, handle in zip(nodes, handles, strict=True)
        ]
        for node, (done, _) in zip(nodes, answers, strict=True):
            self._ask(node, done)
        return [model for _, model in answers]

    def _ask(self, node: NodeId, ref: ObjectRef[Any]) -> Any:  # noqa: ANN401 - what the call returns
        """Wait for one call, while nothing else goes on.

        Raises:
            NodeGoneError: the node died meanwhile, or does not answer.
        """
        try:
            return ray.get(ref, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            actor = self._pool.home[node]
            if actor.alive:
                self._pool.lost(actor, error)
            message = f"node {node} ({actor.facts.place}) was lost: {reason_of(error)}"
            raise NodeGoneError(node, message) from None
