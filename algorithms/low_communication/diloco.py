"""DiLoCo: many inner steps, then one outer step on the averaged difference.

Each node trains ``inner_steps`` (H) steps from the anchor θ, then all reduce the outer gradient and take one outer
step, by default Nesterov's (η = ``outer.lr``, β = ``outer.momentum``):

    Δ_m = θ - θ_m          Δ = mean_m Δ_m
    v ← β v + Δ            θ ← θ - η (Δ + β v)          θ_m ← θ

Deviations: floating-point buffers (batch-norm statistics), of which the paper's models have none, are averaged with
the outer gradient. The mean over nodes is uniform; ``aggregator`` may put another combination in its place.
Elasticity: θ and v are shared state; a joiner receives both and starts with a fresh inner optimizer. A node lost
before the reduction costs its own H steps and nothing else. The inner optimizer's state is never exchanged and lives
on from round to round.
Cost: 2·b·P·(N-1) bytes per round over all nodes, b = 4 for float32 (as a star: b·P up and b·P down per node); ``codec``
shrinks the half that goes up, ``result_codec`` the one that comes down. Up to 64 KiB a contribution travels inline,
N·(N-1)·b·P. State: 2·P values (θ, v) beside the inner optimizer's.
Reference: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
arXiv:2311.08105, Algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import PositiveInt, model_validator

from starling.algorithms.aggregators import Aggregator, Mean
from starling.algorithms.api import Algorithm, AllReduce, Layout, Node, Train, all_reduce_bytes
from starling.algorithms.codecs import Codec, Identity, exchange_codecs, refuse_lossy
from starling.algorithms.outer import Nesterov, OuterOptimizer
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.outer import OuterState


class Shared(NodeState):
    anchor: Tensor  # θ
    outer: OuterState  # v


class DiLoCo(Algorithm, name="diloco"):
    """Distributed low-communication training; see the module's docstring."""

    inner_steps: PositiveInt = 500  # H, optimizer steps between exchanges; OpenDiLoCo
    outer: OuterOptimizer = Nesterov(lr=0.7, momentum=0.9)  # η, β; OpenDiLoCo
    aggregator: Aggregator = Mean()  # combines the outer gradients
    codec: Codec = Identity()  # encodes contributions, which are decoded before they are combined
    result_codec: Codec = Identity()  # encodes the combined outer gradient

    @model_validator(mode="after")
    def _codecs_lose_nothing(self) -> Self:
        refuse_lossy(self.codec, self.result_codec, feedback=None)
        return self

    def init(self, node: Node) -> None:
        shared = Shared(node.shared)
        shared.anchor = node.parameters.clone()
        shared.outer = self.outer.init(node.parameters)

    async def round(self, node: Node) -> None:
        shared = Shared(node.shared)
        await Train(steps=self.inner_steps)
        codec, result_codec = exchange_codecs(self.codec, self.result_codec, node.round)
        outer_gradient = await AllReduce(
            shared.anchor - node.parameters if node.participates else None,
            aggregator=self.aggregator,
            codec=codec,
            result_codec=result_codec,
            buffers=node.buffers,
        )
        step, shared.outer = self.outer.update(outer_gradient.value, shared.outer)
        shared.anchor = shared.anchor + step
        node.parameters.copy_(shared.anchor)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        sent, received = layout.encoded_nbytes(self.codec), layout.encoded_nbytes(self.result_codec)
        return all_reduce_bytes(sent, num_nodes, result_nbytes=received, aggregator=self.aggregator)
