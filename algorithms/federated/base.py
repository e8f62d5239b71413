"""Base class of federated algorithms: a sampled cohort, an amount of local work, and a server's step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field, PositiveInt

from starling.algorithms.api import Algorithm, Node, NodeId, Train, View
from starling.algorithms.outer import SGD, OuterOptimizer
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.outer import OuterState
    from starling.algorithms.rules import Rule


class Shared(NodeState):
    model: Tensor  # x
    outer: OuterState


class Federated(Algorithm):
    """A shared model x: some nodes train from it, and all take one step along what these bring back."""

    epochs: PositiveInt = 1  # E, passes over the node's own data in a round
    steps: PositiveInt | None = None  # optimizer steps in a round, instead of epochs
    fraction: float = Field(default=1.0, gt=0, le=1)  # C, of the nodes that take part in a round
    outer: OuterOptimizer = SGD(lr=1.0)  # γ; plain averaging

    def init(self, node: Node) -> None:
        shared = Shared(node.shared)
        shared.model = node.parameters.clone()
        shared.outer = self.outer.init(node.parameters)

    def cohort_size(self, num_nodes: int) -> int:
        """Return |S|, the number of nodes that take part."""
        # Rounded: 0.07 · 100 is 7.000000000000001 in floating point, and must not become 8.
        return max(1, math.ceil(round(self.fraction * num_nodes, 9)))

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        permutation = torch.randperm(len(view.members), generator=rng)
        order = cast("list[int]", permutation.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        return tuple(sorted(view.members[index] for index in order[: self.cohort_size(len(view.members))]))

    def local_work(self, rule: Rule | None = None) -> Train:
        """Return the training that a node of the cohort does in a round."""
        return Train(epochs=self.epochs, rule=rule) if self.steps is None else Train(steps=self.steps, rule=rule)

    def move(self, node: Node, difference: Tensor) -> None:
        """Take the server's step from x along ``difference``, the mean of x − y_i, shape (P,); on all nodes alike."""
        shared = Shared(node.shared)
        step, shared.outer = self.outer.update(difference, shared.outer)
        shared.model = shared.model + step
        node.parameters.copy_(shared.model)
