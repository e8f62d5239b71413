"""What methods of local steps and mixing with neighbours have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveInt

from starling.algorithms.api import Algorithm
from starling.algorithms.topologies import Ring, Topology

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Node


class Gossip(Algorithm):
    """Local steps on a model of the node's own, and one exchange with its neighbours, in each round."""

    replicated: ClassVar[bool] = False

    topology: Topology = Ring()  # W, who mixes whose model with what weight
    steps: PositiveInt = 1  # K, optimizer steps in a round

    def tensors(self, node: Node) -> dict[str, Tensor]:
        """What is mixed of a node: its parameters, and its floating-point buffers if there are any; to write to."""
        return tensors_of(node)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        del num_samples, batch_size
        return self.steps


def tensors_of(node: Node) -> dict[str, Tensor]:
    """A node's parameters, and its floating-point buffers if there are any; to write to."""
    if node.buffers.numel():
        return {"parameters": node.parameters, "buffers": node.buffers}
    return {"parameters": node.parameters}
