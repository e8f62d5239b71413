"""DIMAT: neighbours' models are averaged after their hidden units are put in the order of one's own.

Node i runs a batch of its own data through its model and each neighbour's, correlates the activations of the hidden
layers, finds the permutation π_j that matches the units best, and mixes

    x_i ← w_ii x_i + Σ_j w_ij π_j(x_j)

For models of fully connected layers that return their outputs and, as a tuple, the activations of their hidden layers.
The mean of all nodes' models is no model here, as each has an order of its own: each evaluates its own.
Reference: Saadati et al., "DIMAT: Decentralized Iterative Merging-And-Training for Deep Learning Models", CVPR 2024,
arXiv:2404.08079.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from starling.algorithms.api import Algorithm, Batch, Evaluate, Inbox, Layout, NeighborAllGather, Node, Train
from starling.algorithms.topologies import Ring, Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LEAST_SPREAD = 1e-7  # of a unit that says nothing: it fits everywhere alike


class DIMAT(Algorithm):
    replicated: ClassVar[bool] = False

    topology: Topology = Ring()
    steps: NonNegativeInt = 100  # between merges
    calibration: PositiveInt = 256  # samples on which activations are compared
    matched: bool = True  # false: plain averaging
    own_start: bool = False  # each node begins with weights of its own

    def init(self, node: Node) -> None:
        if self.own_start:
            rng = node.rng("start")
            for entry in node.layout.entries:
                values = torch.rand(entry.shape, generator=rng).mul_(2).sub_(1) / entry.shape[-1] ** 0.5
                node.parameters[entry.start : entry.stop] = values.flatten()

    async def round(self, node: Node) -> None:
        if self.steps:
            await Train(steps=self.steps)
        batch = await Batch(size=self.calibration)
        inbox = await NeighborAllGather(node.parameters, self.topology)
        models = inbox.payloads
        if self.matched:
            own = hidden(node.module(), batch.tensors[0])
            models = {
                neighbor: permuted(model, node.layout, match(own, hidden(node.module(at=model), batch.tensors[0])))
                for neighbor, model in inbox.payloads.items()
            }
        node.parameters.copy_(Inbox(models, inbox.weights).mix(node.parameters))
        node.local["metrics"] = {**await Evaluate()}

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.topology.num_messages(num_nodes) * layout.nbytes

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps


@torch.no_grad()
def hidden(module: Callable[..., Any], inputs: Tensor) -> tuple[Tensor, ...]:
    """Activations of each hidden layer, shape (b, h)."""
    return module(inputs)[1]


def match(own: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
    """For each hidden layer, which of their units takes the place of which of ours, shape (h,)."""
    found: list[Tensor] = []
    for mine, other in zip(own, theirs, strict=True):
        correlation = _standardized(mine).T @ _standardized(other)
        found.append(torch.from_numpy(linear_sum_assignment(correlation.numpy(), maximize=True)[1]))
    return found


def _standardized(activations: Tensor) -> Tensor:
    centered = activations.double() - activations.double().mean(0)
    return centered / centered.norm(dim=0).clamp(min=_LEAST_SPREAD)


def permuted(model: Tensor, layout: Layout, orders: Sequence[Tensor]) -> Tensor:
    """The same function with hidden units in another order; weight and bias of each layer follow one another."""
    weights = [entry for entry in layout.entries if len(entry.shape) == 2]
    biases = [entry for entry in layout.entries if len(entry.shape) == 1]
    result = model.clone()
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = orders[layer] if layer < len(orders) else torch.arange(weight.shape[0])
        columns = orders[layer - 1] if layer else torch.arange(weight.shape[1])
        matrix = model[weight.start : weight.stop].view(weight.shape)
        result[weight.start : weight.stop] = matrix[rows][:, columns].flatten()
        result[bias.start : bias.stop] = model[bias.start : bias.stop][rows]
    return result
