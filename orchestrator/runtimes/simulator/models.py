"""Committed models of simulated nodes, evaluated and fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import save

from starling.actors.replica.mean_model import mean_model
from starling.orchestrator.runtimes.events import FinalModel
from starling.orchestrator.runtimes.user_code import user_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes


class SimulatedModels:
    """Averages the committed models of nodes.

    Args:
        nodes: the replicas, and the held-out data.
    """

    def __init__(self, nodes: SimulatedNodes) -> None:
        self._nodes = nodes

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None, *, averaged: bool = False) -> dict[str, float]:
        replica = self._nodes.host.replicas[nodes[0]]
        with user_code(replica.id, replica.round):
            return replica.evaluate(self._nodes.data.validation, max_batches, *self._mean(nodes, averaged=averaged))

    def fetch(self, nodes: Sequence[NodeId], *, averaged: bool = False) -> FinalModel:
        replica = self._nodes.host.replicas[nodes[0]]
        mean = self._mean(nodes, averaged=averaged)
        return FinalModel(replica.model_digest(*mean), save(replica.model_tensors(*mean)))

    def _mean(
        self, nodes: Sequence[NodeId], *, averaged: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        replicas = [self._nodes.host.replicas[node] for node in nodes]
        if averaged:
            return mean_model(one.averaged_model() for one in replicas)
        return (None, None) if len(nodes) == 1 else mean_model(one.committed_model() for one in replicas)
