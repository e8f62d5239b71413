"""Gradient tracking: D-SGD along an estimate of the mean gradient of all nodes.

Node i steps along y_i, which tracks the mean gradient. Mixing by W (``topology``) preserves the mean of y, and the
change of a node's own gradient is added to its own y:

    x_i(k+1) = Σ_j w_ij (x_j(k) - η y_j(k))          η = ``optimizer.lr``
    y_i(k+1) = Σ_j w_ij y_j(k) + g_i(k+1) - g_i(k)          y_i(0) = g_i(0)

so mean_i y_i(k) = mean_i g_i(k) in every round. A node keeps the correction d_i = Σ_j w_ij y_j - g_i of a round. Its
next y_i is its next g_i + d_i, and the invariant reads mean_i d_i = 0. With full gradients (``data.batch_size`` at
least the node's samples), a small constant η and strongly convex losses, x_i converges linearly to the optimum. D-SGD
stops beside the optimum. With batches x_i comes as close as their noise lets it.

Deviations: x is mixed after the step, y before the new gradient is added. With ``steps`` K > 1 a node takes K steps
along g + d_i with one d_i, and y_i is the mean of the K directions; the fixed point is the same. The step along y is
that of the node's optimizer, of which nothing is exchanged; the above holds for plain SGD. Floating-point buffers are
mixed alike.
Elasticity: when the view changes all d_i become 0, that is y = g, and tracking begins anew from the present x_i. A
leaver takes its y along, so the mean of y would be that of other members. A joiner begins with the model of a member. A
node that skips a round (``on_nan: skip``) keeps its x_i and d_i.
Cost: two models (2·b·P bytes, b = 4 for float32) for each directed edge of the round's graph; 4·N·b·P on a ring. State:
2·P values (x_i, d_i).
Reference: Nedić, Olshevsky and Shi, "Achieving Geometric Convergence for Distributed Optimization over Time-Varying
Graphs", SIAM Journal on Optimization 27(4), 2017, arXiv:1607.03218 (DIGing). For K > 1: Liu et al., "Decentralized
Gradient Tracking with Local Steps", 2023, arXiv:2301.01313 (K-GT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from pydantic import model_validator

from starling.algorithms.api import NeighborAllGather, Train
from starling.algorithms.errors import SettingsError
from starling.algorithms.gossip.base import Gossip, mix, tensors_of
from starling.algorithms.rules.control_variate import ControlVariate
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node


class Local(NodeState):
    correction: Tensor  # d_i


class GradientTracking(Gossip, name="gradient_tracking"):
    """Decentralized descent along tracked gradients; see the module's docstring."""

    @model_validator(mode="after")
    def _preserves_the_mean(self) -> Self:
        try:
            self.topology.require_doubly_stochastic(self.name)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def init(self, node: Node) -> None:
        Local(node.local).correction = torch.zeros_like(node.parameters)

    async def on_view_change(self, node: Node) -> None:
        Local(node.local).correction = torch.zeros_like(node.parameters)

    async def round(self, node: Node) -> None:
        rule = ControlVariate(Local(node.local).correction)
        report = await Train(steps=self.steps, rule=rule)
        tracked = rule.mean_gradient + rule.correction
        tensors = tensors_of(node)
        inbox = await NeighborAllGather(tensors | {"tracked": tracked}, self.topology)
        mix(tensors, inbox)
        # Who skips the round, its loss being NaN, has no gradient to correct; its neighbours have mixed without it.
        if report.num_steps:
            Local(node.local).correction = inbox.mix(tracked, "tracked").sub_(rule.mean_gradient)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.topology.num_messages(num_nodes) * (2 * layout.nbytes + layout.buffer_nbytes)
