"""Data-parallel training: the mean gradient of all nodes in every step; the baseline.

Each node m has the gradient g_m of its own batch at the common model x. All take one step of one optimizer
(``optimizer`` in the configuration, its moments included):

    g = mean_m g_m          x ← step(x, g)

With plain gradient descent this is gradient descent on the batches of all nodes together.
Deviations: the mean over nodes is uniform, as in torch's. Floating-point buffers, which torch takes from one node, are
averaged at the end of a round.
Elasticity: x is shared state, and a joiner receives it. The moments of its optimizer it does not have: whenever the
members change, or somebody's gradient is missing, all begin theirs anew, so that replicas stay the same.
Cost: ``inner_steps`` exchanges per round, each 2·b·P·(N-1) bytes over all nodes, b = 4 for float32, before ``codec``
and ``result_codec``; up to 64 KiB a contribution travels inline, N·(N-1)·b·P. With a ``compressor`` what that says.
State: P values (x), beside the optimizer's.
Reference: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020,
arXiv:2006.15704.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import PositiveInt, model_validator

from starling.algorithms.api import AllReduce, Gradient, Step
from starling.algorithms.compressors import Compressor
from starling.algorithms.low_communication.base import LowCommunication
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node


class SynchronousSGD(LowCommunication):
    """Steps that all nodes take together."""

    compressor: Compressor | None = None  # averages the gradients in its own way: powersgd; null: whole

    @model_validator(mode="after")
    def _one_way_to_compress(self) -> Self:
        if self.compressor is not None and {self.codec.name, self.result_codec.name} != {"identity"}:
            raise ValueError(f"compressor: {self.compressor.name} sends in its own form; leave the codecs at identity")
        return self

    def init(self, node: Node) -> None:
        if self.compressor is not None:
            self.compressor.init(node)

    async def steps_together(self, node: Node, steps: int) -> None:
        """Take ``steps`` steps with the mean gradient of all."""
        fresh = node.view.changed
        for step in range(steps):
            # Of the run's step, not of the round: rounds are only a grouping, also of what a codec draws.
            codecs = self.codecs_at(node.round * steps + step)
            report = await Gradient()
            if self.compressor is not None:
                mean = await self.compressor.all_reduce(node, report.gradient)
            else:
                sent = self.compensated(node, report.gradient, codecs[0])
                mean = await AllReduce(sent, codec=codecs[0], result_codec=codecs[1])
            # Whose gradient is missing has another optimizer from now on: it is new, or its loss was NaN.
            fresh = fresh or len(mean.members) < len(node.view.members)
            await Step(mean.value, report, fresh=fresh)
            fresh = False

    def unsent(self, node: Node) -> float:
        return super().unsent(node) if self.compressor is None else self.compressor.unsent(node)

    def step_bytes(self, layout: Layout, num_nodes: int) -> int:
        """Return the payload bytes of one step over all nodes."""
        if self.compressor is not None:
            return self.compressor.expected_bytes(layout, num_nodes)
        return self.exchange_bytes(layout.num_values, layout, num_nodes)


class Shared(NodeState):
    model: Tensor  # x


class DDP(SynchronousSGD, name="ddp"):
    """Data-parallel training; see the module's docstring."""

    inner_steps: PositiveInt = 1  # steps in a round, each with an exchange

    def init(self, node: Node) -> None:
        super().init(node)
        Shared(node.shared).model = node.parameters.clone()

    async def round(self, node: Node) -> None:
        await self.steps_together(node, self.inner_steps)
        Shared(node.shared).model = node.parameters.clone()

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.inner_steps * self.step_bytes(layout, num_nodes)
