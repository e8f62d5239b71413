"""The node actor's calls about models: evaluated, and given away, alone or as the mean of several nodes'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from starling.actors.host.failures import failure
from starling.actors.remote.remote_calls import remote_call
from starling.actors.replica.mean_model import mean_model
from starling.actors.wire.buffers import as_buffer, as_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from ray import ObjectRef

    from starling.actors.host.host import Host
    from starling.actors.remote.store_calls import StoreCalls
    from starling.actors.tasks import Samples
    from starling.actors.wire.tickets import Failed
    from starling.algorithms.api import NodeId


class ModelCalls:
    """Evaluates and exports committed models.

    Args:
        host: of the process's nodes.
        validation: the held-out data.
        store: fetches other nodes' models.
    """

    def __init__(self, host: Host, validation: Samples, store: StoreCalls) -> None:
        self._host, self._validation, self._store = host, validation, store

    @remote_call("compute")
    def evaluate(
        self,
        node: NodeId,
        others: Sequence[ObjectRef[Any]],
        max_batches: int | None,
        averaged: bool,  # noqa: FBT001 - a remote call's arguments
    ) -> dict[str, float] | Failed:
        """Evaluate the mean of a node's model, or of its running average, and ``others`` on held-out data."""
        replica = self._host.replicas[node]
        try:
            return replica.evaluate(self._validation, max_batches, *self._mean(node, others, averaged=averaged))
        except Exception as error:  # noqa: BLE001 - a user's metrics
            return failure(node, replica.round, error)

    @remote_call("compute")
    def model(
        self,
        node: NodeId,
        others: Sequence[ObjectRef[Any]],
        averaged: bool,  # noqa: FBT001 - as above
    ) -> tuple[str, bytes]:
        """Return digest and safetensors bytes of the mean of a node's model, or running average, and ``others``."""
        replica = self._host.replicas[node]
        mean = self._mean(node, others, averaged=averaged)
        tensors = replica.model_tensors(*mean)
        return replica.model_digest(*mean), save({name: one.cpu() for name, one in tensors.items()})

    @remote_call("compute")
    def committed_model(self, node: NodeId, averaged: bool) -> list[Any]:  # noqa: FBT001 - as above
        """Return an acknowledgement, then parameters and buffers of a node's committed model or average, as bytes."""
        replica = self._host.replicas[node]
        parameters, buffers = replica.averaged_model() if averaged else replica.committed_model()
        return [True, (as_buffer(parameters.cpu()), as_buffer(buffers.cpu()))]

    def _mean(
        self, node: NodeId, others: Sequence[ObjectRef[Any]], *, averaged: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if not others and not averaged:
            return None, None
        replica = self._host.replicas[node]
        own = replica.averaged_model() if averaged else replica.committed_model()

        def models() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield own
            for ref in others:
                pair = self._store.get(ref)
                parameters, buffers = (as_tensor(one).view(mine.dtype) for one, mine in zip(pair, own, strict=True))
                yield parameters.to(own[0].device), buffers.to(own[0].device)

        return mean_model(models())
