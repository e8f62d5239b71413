"""SCAFFOLD: local steps corrected for client drift by control variates.

Each node of the cohort S steps along u from the shared model x, with its own control variate c_i and the common c. Its
new variate is the mean of its gradients over its K steps (``steps``, or ``epochs``); γ = ``outer.lr``:

    u = g_i(y) - c_i + c          y ← y - η u          c_i⁺ = (1/K) Σ_k g_i(y_k)
    x ← x - γ mean_{i∈S} (x - y_i)          c ← c + (1/N) Σ_{i∈S} (c_i⁺ - c_i)          c_i ← c_i⁺ for i ∈ S

so c = mean_i c_i over all N nodes in every round. With full gradients and a constant small η x converges to the optimum
whatever the nodes' data and whoever takes part, which FedAvg does not with K > 1.

Deviations: there is no server, as in FedAvg. Option II for c_i⁺, which is c_i - c + (x - y_i)/(Kη) where the optimizer
is plain SGD; computed from the gradients themselves, it is right with any schedule and with clipping. The convergence
above needs plain SGD: momentum would carry the corrections of earlier rounds along. The mean over S is uniform.
Floating-point buffers are averaged alike. There is no choice of aggregator or codec: c would not stay the mean of what
the nodes hold.
Elasticity: x and c are shared state, which a joiner receives; c_i is the node's own, 0 in one that is new. When the
view changes c becomes mean_i c_i over the new members, by one AllReduce of b·P bytes more; also when a node comes back
that was away or late, with its old c_i. A node missing from a reduction neither moves c nor gets its c_i⁺.
Cost: with S contributors among N nodes 2·b·P·((S-1) + (N-1)) bytes per round over all nodes, b = 4 for float32 (as a
star: 4·S·b·P); up to 64 KiB a contribution travels inline, 2·S·(N-1)·b·P. State: 3·P values (x, c, c_i).
Reference: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv:1910.06378, Algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from starling.algorithms.api import AllReduce, Layout, Node, all_reduce_bytes
from starling.algorithms.federated import base
from starling.algorithms.rules.control_variate import ControlVariate
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor


class Shared(base.Shared):
    control: Tensor  # c


class Local(NodeState):
    control: Tensor | None = None  # c_i; None: 0, as the node has not taken part


class Scaffold(base.Federated, name="scaffold"):
    """Stochastic controlled averaging; see the module's docstring."""

    def init(self, node: Node) -> None:
        super().init(node)
        Shared(node.shared).control = torch.zeros_like(node.parameters)

    async def on_view_change(self, node: Node) -> None:
        mean = await AllReduce(_own_control(node))
        Shared(node.shared).control = mean.value

    async def round(self, node: Node) -> None:
        shared = Shared(node.shared)
        model, control = shared.model, shared.control
        own = renewed = _own_control(node)
        contribution = None
        if node.participates:
            rule = ControlVariate(control - own)
            await self.local_work(rule)
            renewed = rule.mean_gradient
            contribution = {"difference": model - node.parameters, "control": renewed - own}
        mean = await AllReduce(contribution, buffers=node.buffers)
        self.move(node, mean.value["difference"])
        share = len(mean.members) / len(node.view.members)
        shared.control = control + mean.value["control"] * share
        # Not by ``participates``: who skips the round, its loss being NaN, is not in the mean that moved c.
        if node.id in mean.members:
            Local(node.local).control = renewed

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return all_reduce_bytes(2 * layout.nbytes + layout.buffer_nbytes, num_nodes, self.cohort_size(num_nodes))


def _own_control(node: Node) -> Tensor:
    """Return c_i, shape (P,); zeros until the node has taken part."""
    own = Local(node.local).control
    return torch.zeros_like(node.parameters) if own is None else own
