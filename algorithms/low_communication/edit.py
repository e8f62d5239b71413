"""EDiT: local steps, then a layer-wise mean that weighs nodes by the norms of their outer gradients.

Up to step ``warmup_steps`` all nodes take each step together, with the mean gradient. After that each node m takes τ =
``inner_steps`` steps alone, and every module is synchronized. With the module's anchor φ, the weights' temperature T =
``temperature``, the greatest norm φ_c = ``max_norm``, and η, β of ``outer``,

    Δ_m = φ - θ_m          G_m = ‖Δ_m‖₂          w_m = exp(-G_m / T) / Σ_k exp(-G_k / T)
    Δ = Σ_m w_m Δ_m          Δ ← Δ min(1, φ_c / (‖Δ‖₂ + 1e-6))
    v ← β v + Δ          φ ← φ - η (Δ + β v)          θ_m ← φ

A node whose G_m is an outlier in its own history (``detector``) tells an infinite one, and has no weight; those of the
others sum to 1. A module in which all nodes do keeps φ and v: it is rolled back, and if that happens again and again
the node's log says so. With ``penalty: false`` weights are 1/N, which without ``max_norm`` is DiLoCo.

Deviations: modules are exchanged at the round's end, not in the next forward pass, to equal values. Floating-point
buffers are averaged, uncompressed.
Elasticity: φ and v are shared state; a joiner receives both, and its detector begins anew, during which nothing of it
is an outlier. A node that is lost between norms and means is left out; the others' weights stay. The warm-up is ddp's.
Cost: 4·L·N·(N-1) bytes for the norms of L modules, and 2·b·P·(N-1) for the means, b as encoded by ``codec`` in and by
``result_codec`` out; up to 64 KiB a contribution travels inline. In the warm-up that of ``ddp``. State: 2·P values
(φ, v) on the CPU, and the detectors'.
Reference: Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language Models",
2024, arXiv:2412.07210; rules and the detector's defaults from its code in atorch. There penalty, detector, limit and
outer optimizer are off by default; limit, η and β are those of the example in its README-EDiT (warm-up 10 steps).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from starling.algorithms.api import AllGather, AllReduce, Handle, Reduced, Start, Train, Wait
from starling.algorithms.low_communication import anchors, fragments
from starling.algorithms.low_communication.anomalies import AGAIN, Detector, norm_of, rolled_back, weights_of
from starling.algorithms.low_communication.ddp import SynchronousSGD
from starling.algorithms.low_communication.fragments import gather, modules_of, to_host
from starling.algorithms.outer import Nesterov, OuterOptimizer
from starling.algorithms.state import NodeState, field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from starling.algorithms.api import Layout, Node, NodeId
    from starling.algorithms.low_communication.anomalies import History


class Local(NodeState):
    norms: History  # of the modules' G_m
    rolled_back: list[int] | None = field("rolled back", default=None)  # rounds in a row, by module


class EDiT(SynchronousSGD, name="edit"):
    """Layer-wise synchronization with a penalty for who goes astray; see the module's docstring."""

    inner_steps: PositiveInt = 128  # τ, steps between two synchronizations; source not found
    warmup_steps: NonNegativeInt = 0  # t_warm, steps that are taken together first; a multiple of inner_steps
    penalty: bool = True  # weigh by norms and leave outliers out; false: all count the same
    temperature: PositiveFloat = 1.0  # T; atorch
    max_norm: PositiveFloat | None = 10.0  # φ_c, of a module's mean; null: no limit; README-EDiT
    detector: Detector = Detector()  # which norms are outliers
    outer: OuterOptimizer = Nesterov(lr=0.7, momentum=0.8)  # η, β; README-EDiT

    @model_validator(mode="after")
    def _warms_up_in_whole_rounds(self) -> Self:
        if self.warmup_steps % self.inner_steps:
            steps = f"warmup_steps: {self.warmup_steps} is not a multiple of inner_steps, {self.inner_steps}"
            raise ValueError(f"{steps}; take {self.warmup_steps // self.inner_steps * self.inner_steps}")
        return self

    def init(self, node: Node) -> None:
        super().init(node)
        anchors.begin(node, modules_of(node.layout), self.outer)
        Local(node.local).norms = self.detector.fresh(len(modules_of(node.layout)))

    async def join(self, node: Node) -> None:
        Local(node.local).norms = self.detector.fresh(len(modules_of(node.layout)))

    async def round(self, node: Node) -> None:
        if self.warms_up(node.round):
            await self.steps_together(node, self.inner_steps)
            anchors.begin(node, modules_of(node.layout), self.outer)
        else:
            await self.synchronize(node, await self.steps_alone(node))

    def warms_up(self, number: int) -> bool:
        """Say whether round ``number`` belongs to the warm-up, in which nodes take every step together."""
        return number * self.inner_steps < self.warmup_steps

    async def steps_alone(self, node: Node) -> Mapping[NodeId, float]:
        """Train; return the shares of all weights that the nodes have for their steps: none."""
        del node
        await Train(steps=self.inner_steps)
        return {}

    async def synchronize(self, node: Node, shares: Mapping[NodeId, float]) -> None:
        """Take the outer step of every module, and set the parameters to the new anchors."""
        modules, known = modules_of(node.layout), anchors.known(node)
        deltas = [
            one["anchor"] - to_host(gather(node.parameters, ranges)) for one, ranges in zip(known, modules, strict=True)
        ]
        weights = await self._weigh(node, deltas, shares)
        handles: dict[int, Handle[Reduced[Tensor]]] = {}
        for place, delta in enumerate(deltas):
            # Of a module in which all went astray there is no mean.
            if any(one[place] for one in weights.values()):
                own = weights[node.id][place] if node.id in weights else 0.0
                codecs = self.codecs_at(node.round, str(place))
                sent = self.compensated(node, delta, codecs[0], str(place)) if own else None
                reduce = AllReduce(sent, weight=own or 1.0, codec=codecs[0], result_codec=codecs[1])
                handles[place] = await Start(reduce)
        for place, handle in handles.items():
            mean = to_host((await Wait(handle)).value)
            if self.max_norm is not None:
                mean = mean * min(1.0, self.max_norm / (norm_of(mean) + 1e-6))
            known[place] = anchors.stepped(known[place], mean, self.outer)
        anchors.keep(node, known)
        node.parameters.copy_(anchors.in_place(node, modules))

    async def _weigh(
        self, node: Node, deltas: list[Tensor], shares: Mapping[NodeId, float]
    ) -> Mapping[NodeId, list[float]]:
        """Return each node's weights of all modules; those of a module sum to 1, or are all 0."""
        if not self.penalty:
            return dict.fromkeys(node.view.members, [1.0] * len(deltas))
        norms = torch.tensor([norm_of(delta) for delta in deltas], dtype=torch.float64)
        local = Local(node.local)
        outliers = self.detector.outliers(local.norms, norms)
        local.norms = self.detector.updated(local.norms, norms)
        told = await AllGather(norms.masked_fill(outliers, torch.inf).float())
        weights = weights_of(told, self.temperature, shares)
        counts = rolled_back(local.rolled_back or [0] * len(deltas), weights)
        for place in (place for place, count in enumerate(counts) if count and count % AGAIN == 0):
            words = f"module {place} was rolled back in the last {counts[place]} rounds"
            print(f"round {node.round}: {words}")  # noqa: T201 - to the node's log
        local.rolled_back = counts
        return weights

    def round_bytes(self, layout: Layout, num_nodes: int, number: int, num_rounds: int) -> int:
        if self.warms_up(number):
            return self.inner_steps * self.step_bytes(layout, num_nodes)
        return self.expected_bytes(layout, num_nodes)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        sizes = [fragments.size_of(ranges) for ranges in modules_of(layout)]
        told = 4 * len(sizes) * num_nodes * (num_nodes - 1) if self.penalty else 0
        return told + sum(self.exchange_bytes(size, layout, num_nodes) for size in sizes)
