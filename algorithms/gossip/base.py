"""Base class of gossip methods: local steps, then mixing with the neighbours' models."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveInt

from starling.algorithms.api import Algorithm
from starling.algorithms.topologies import Ring, Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from starling.algorithms.api import Inbox, Node


class Gossip(Algorithm):
    """Local steps on a model of the node's own, and one exchange with its neighbours, in each round."""

    replicated: ClassVar[bool] = False

    topology: Topology = Ring()  # W, who mixes whose model with what weight
    steps: PositiveInt = 1  # K, optimizer steps in a round


def tensors_of(node: Node) -> dict[str, Tensor]:
    """Return what is mixed of a node: its parameters, and its floating-point buffers if it has any."""
    if node.buffers.numel():
        return {"parameters": node.parameters, "buffers": node.buffers}
    return {"parameters": node.parameters}


def mix(tensors: Mapping[str, Tensor], inbox: Inbox[dict[str, Tensor]]) -> None:
    """Replace each of a node's ``tensors`` by its mixture with the neighbours', in place."""
    for name, own in tensors.items():
        own.copy_(inbox.mix(own, name))
