"""Eager DiLoCo: the outer gradients of a round travel during the next one; a node applies its own at once.

Node m trains H = ``inner_steps`` steps from its own θ_m, while the outer gradients of the round before are averaged to
Δ'. Its own progress since then replaces its share in that mean, Δ_m' being its contribution. The outer step is taken at
once (η = ``outer.lr``, β = ``outer.momentum``):

    Δ_m = θ_m(begin) - θ_m(end)          Δ̃_m = Δ' + a_m - a_m',   a_m = Δ_m / N
    v_m ← β v_m + Δ̃_m          θ_m ← θ_m(begin) - η (Δ̃_m + β v_m)

a_m is the node's lead over the others, and a_m' its lead in the round before. In a round of as many nodes as the last
one Δ̃_m = Δ' + (Δ_m - Δ_m') / N. In the first round Δ' and a_m' are zero. The step is linear in Δ̃_m, so θ_m is kept as
a sum of two parts. θ takes the step with Δ' and is equal on all nodes; c_m takes the step with the rest. Over the
rounds the rest cancels but for the last a_m, so that models do not drift apart.

A run is evaluated and saved as θ, in which the last round is missing: its exchange would be that of the next one. With
N = 1 the node follows DiLoCo, and the saved model is one outer step behind.
Deviations: the sum of two parts. The formula agrees in words with two secondary sources; the paper was not read.
Floating-point buffers are averaged when the exchange is over.
Elasticity: θ and v are shared state. A joiner begins at θ with c_m = 0, and has nothing to send in its first round. A
node that is lost takes the steps along that it had not sent. The subtracted share is exactly the added one, also when N
changes in between: subtracting Δ_m' / N of another N would shift c_m for good.
Cost: 2·b·P·(N-1) bytes per round over all nodes, b as encoded by ``codec`` in and by ``result_codec`` out; up to 64 KiB
a contribution travels inline. It takes H steps' time at least before anybody waits. State: 6·P values, two of them
shared.
Reference: Kale et al., "Eager Updates For Overlapped Communication and Computation in DiLoCo", 2025, arXiv:2502.12996.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from pydantic import PositiveInt, model_validator

from starling.algorithms.api import AllReduce, Start, Train, Wait
from starling.algorithms.low_communication.base import LowCommunication
from starling.algorithms.outer import SGD, Nesterov, OuterOptimizer
from starling.algorithms.state import NodeState, field

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node
    from starling.algorithms.outer import OuterState


class Shared(NodeState):
    anchor: Tensor  # θ
    outer: OuterState  # v, moved by Δ'


class Local(NodeState):
    pending: Tensor | None  # Δ_m of the last round, which travels during this one; None: nothing to send
    ahead: Tensor  # a_m' of the last round
    own: Tensor  # c_m
    own_outer: OuterState = field("own outer")  # v, moved by the rest


class EagerDiLoCo(LowCommunication, name="eager_diloco"):
    """DiLoCo with a whole round to communicate; see the module's docstring."""

    inner_steps: PositiveInt = 100  # H, optimizer steps between exchanges, and during each; the paper: 30 (secondary)
    outer: OuterOptimizer = Nesterov(lr=0.4, momentum=0.9)  # η, β; sgd or nesterov; the paper's (secondary)

    @model_validator(mode="after")
    def _outer_step_is_linear(self) -> Self:
        if not isinstance(self.outer, SGD | Nesterov):
            raise ValueError(  # noqa: TRY004 - pydantic's validators say so of any bad value
                f"outer: {self.outer.name} is not linear in the gradient; take sgd or nesterov"
            )
        return self

    def init(self, node: Node) -> None:
        shared = Shared(node.shared)
        shared.anchor = node.parameters.clone()
        shared.outer = self.outer.init(node.parameters)
        self._begin(node, torch.zeros_like(node.parameters))

    async def join(self, node: Node) -> None:
        node.parameters.copy_(Shared(node.shared).anchor)
        self._begin(node, None)

    def _begin(self, node: Node, pending: Tensor | None) -> None:
        local = Local(node.local)
        local.pending = pending
        local.ahead = torch.zeros_like(node.parameters)
        local.own = torch.zeros_like(node.parameters)
        local.own_outer = self.outer.init(node.parameters)

    async def round(self, node: Node) -> None:
        shared, local = Shared(node.shared), Local(node.local)
        begun = node.parameters.clone()
        codecs = self.codecs_at(node.round)
        sent = None if local.pending is None else self.compensated(node, local.pending, codecs[0])
        handle = await Start(AllReduce(sent, codec=codecs[0], result_codec=codecs[1]))
        await Train(steps=self.inner_steps)
        mean = await Wait(handle)
        step, shared.outer = self.outer.update(mean.value, shared.outer)
        anchor = shared.anchor + step
        news = begun - node.parameters
        ahead = news / len(node.view.members)
        rest = ahead - local.ahead
        step, local.own_outer = self.outer.update(rest, local.own_outer)
        own = local.own + step
        shared.anchor, local.own, local.pending, local.ahead = anchor, own, news, ahead
        node.parameters.copy_(anchor + own)

    def model(self, node: Node) -> Tensor:
        return Shared(node.shared).anchor

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.exchange_bytes(layout.num_values, layout, num_nodes)
