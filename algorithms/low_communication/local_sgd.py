"""Local SGD: local steps, then the mean of all models.

Each node m takes H = ``inner_steps`` optimizer steps from the common model x:

    x_m ← H steps from x          x ← mean_m x_m          x_m ← x

With one step of plain gradient descent this is data-parallel training; it is DiLoCo with an outer step of plain
averaging.
Deviations: any inner optimizer, whose state stays with its node. Floating-point buffers are averaged as well.
Elasticity: x is shared state, and a joiner receives it. A node that is lost before the reduction costs its own H steps
and nothing else.
Cost: 2·b·P·(N-1) bytes per round over all nodes, b = 4 for float32, before ``codec`` and ``result_codec``; up to
64 KiB a contribution travels inline, N·(N-1)·b·P. State: P values (x).
Reference: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, arXiv:1805.09767.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt

from starling.algorithms.api import AllReduce, Train
from starling.algorithms.low_communication.base import LowCommunication
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node


class Shared(NodeState):
    model: Tensor  # x


class LocalSGD(LowCommunication, name="local_sgd"):
    """Local steps and averaging; see the module's docstring."""

    inner_steps: PositiveInt = 10  # H, optimizer steps between two averages

    def init(self, node: Node) -> None:
        Shared(node.shared).model = node.parameters.clone()

    async def round(self, node: Node) -> None:
        shared = Shared(node.shared)
        await Train(steps=self.inner_steps)
        # The differences travel: of those a codec loses less than of the models.
        codecs = self.codecs_at(node.round)
        sent = self.compensated(node, shared.model - node.parameters, codecs[0]) if node.participates else None
        mean = await AllReduce(sent, codec=codecs[0], result_codec=codecs[1])
        shared.model = shared.model - mean.value
        node.parameters.copy_(shared.model)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.exchange_bytes(layout.num_values, layout, num_nodes)
