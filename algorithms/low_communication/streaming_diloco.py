"""Streaming DiLoCo: the model is exchanged in fragments, in four bits a value, while training goes on.

The model is divided into F = ``fragments`` fragments, each exchanged once in H = ``inner_steps`` steps. A round is H/F
steps, and round k exchanges fragment p = k mod F. A node sends the fragment's change at step s, τ = ``overlap_steps``
steps before the round's end. At the end the outer step (η = ``outer.lr``, β = ``outer.momentum``) moves the anchor θ_p.
Node m then merges the anchor with α = ``merge_alpha`` into the fragment that it has trained meanwhile:

    Δ_m,p = θ_p - θ_m,p(s)          Δ_p = R(mean_m Q(Δ_m,p))
    v_p ← β v_p + Δ_p          θ_p ← θ_p - η (Δ_p + β v_p)          θ_m,p ← α θ_m,p(s + τ) + (1 - α) θ_p

Q encodes and decodes by ``codec``, four bits a value, and R by ``result_codec``, 16 bits. Both ways together that is
3.2 times less than float32, and 159 times less than bf16 gradients in each of H = 100 steps. With ``result_codec: fp4``
it is 7.9 and 394 times. A run is evaluated and saved as θ, each fragment as of its last exchange. With one fragment, τ
= 0, α = 0 and no codec this is DiLoCo. The paper has three blocks in a fragment, ``strided``; ``staggered: false``
exchanges all fragments at the end of the H steps, for comparisons.

Deviations: the mean comes back in bf16; the paper counts four bits both ways. H must be a multiple of F. Tensors
outside of blocks go one by one to the smallest fragments. The scales of the four bits are ours (codec ``fp4``).
Floating-point buffers, of which the paper's models have none, are averaged every round, uncompressed.
Elasticity: θ, v and the round are shared state: a round that is not finished is repeated with the same fragment. A
joiner begins at θ in all fragments, so that its first Δ is measured from there, with a fresh inner optimizer. A node
that is lost between s and s + τ is left out of the reduction, or in it if it was whole; nobody waits. With
``error_feedback`` a residual is its node's own: it survives others' losses, and is lost with it.
Cost: 2·b·P_p·(N-1) bytes per round over all nodes, b as encoded by ``codec`` on the way in and by ``result_codec`` on
the way out; P_p = P/F on average; up to 64 KiB a contribution travels inline. State: 2·P values (θ, v) on the CPU.
Reference: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", 2025,
arXiv:2501.18512, Algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self, TypeAlias

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from starling.algorithms.api import AllReduce, Handle, Layout, Node, Reduced, Start, Train, Wait
from starling.algorithms.codecs import Codec
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.codecs.half import BFloat16
from starling.algorithms.low_communication import anchors
from starling.algorithms.low_communication import fragments as parts
from starling.algorithms.low_communication.base import LowCommunication
from starling.algorithms.low_communication.fragments import Pattern, gather, scatter, to_device, to_host
from starling.algorithms.outer import Nesterov, OuterOptimizer

if TYPE_CHECKING:
    from torch import Tensor

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class StreamingDiLoCo(LowCommunication, name="streaming_diloco"):
    """DiLoCo in fragments, overlapped and quantized; see the module's docstring."""

    inner_steps: PositiveInt = 100  # H, steps between two exchanges of one fragment; paper, table 4
    fragments: PositiveInt = 4  # F; the paper has as many as make three blocks each
    pattern: Pattern = "auto"  # which blocks make a fragment; size: equal parts; auto: strided, of few blocks size
    overlap_steps: NonNegativeInt = 1  # τ, steps that go on while a fragment travels; paper, table 1
    merge_alpha: Share = 0.5  # α, what the local values count when the exchanged ones are merged in; paper, figure 10
    staggered: bool = True  # a fragment in each round of H/F steps; false: all of them in each round of H
    outer: OuterOptimizer = Nesterov(lr=0.4, momentum=0.9)  # η, β; the paper's, by a secondary source
    codec: Codec = FP4()  # of the outer gradients; the paper's four bits
    result_codec: Codec = BFloat16()  # of their mean; ours, fp4: four bits this way too

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.inner_steps % self.fragments:
            steps, count = self.inner_steps, self.fragments
            near = f"{steps // count * count or count} or {(steps // count + 1) * count}"
            raise ValueError(f"inner_steps: {steps} is not a multiple of the {count} fragments; take {near}")
        if self.overlap_steps >= self.steps:
            room = f"a round's {self.steps} steps" + (" (inner_steps / fragments)" if self.staggered else "")
            raise ValueError(f"overlap_steps: {self.overlap_steps} do not fit before the end of {room}; take fewer")
        return self

    @property
    def steps(self) -> int:
        """Return the optimizer steps of a round."""
        return self.inner_steps // self.fragments if self.staggered else self.inner_steps

    def due(self, number: int) -> tuple[int, ...]:
        """Return the fragments that are exchanged in round ``number``."""
        return (number % self.fragments,) if self.staggered else tuple(range(self.fragments))

    def ranges(self, layout: Layout) -> tuple[parts.Ranges, ...]:
        """Return the ranges of the fragments in the flat parameters."""
        return parts.fragments_of(layout, self.fragments, self.pattern)

    def init(self, node: Node) -> None:
        anchors.begin(node, self.ranges(node.layout), self.outer)

    async def join(self, node: Node) -> None:
        node.parameters.copy_(self.model(node))

    async def round(self, node: Node) -> None:
        ranges, due, known = self.ranges(node.layout), self.due(node.round), anchors.known(node)
        await Train(steps=self.steps - self.overlap_steps)
        handles: list[Handle[Reduced[Tensor]]] = []
        for p in due:
            gradient = known[p]["anchor"] - to_host(gather(node.parameters, ranges[p]))
            codecs = self.codecs_at(node.round, str(p))
            sent = self.compensated(node, gradient, codecs[0], str(p)) if node.participates else None
            handles.append(await Start(AllReduce(sent, codec=codecs[0], result_codec=codecs[1])))
        if self.overlap_steps:
            await Train(steps=self.overlap_steps)
        for p, handle in zip(due, handles, strict=True):
            mean = await Wait(handle)
            known[p] = anchors.stepped(known[p], to_host(mean.value), self.outer)
            local = gather(node.parameters, ranges[p])
            anchor = to_device(known[p]["anchor"], local.device)
            scatter(torch.lerp(anchor, local, self.merge_alpha), node.parameters, ranges[p])
        anchors.keep(node, known)

    def model(self, node: Node) -> Tensor:
        return anchors.in_place(node, self.ranges(node.layout))

    def round_bytes(self, layout: Layout, num_nodes: int, number: int, num_rounds: int) -> int:
        ranges = self.ranges(layout)
        return sum(self.exchange_bytes(parts.size_of(ranges[p]), layout, num_nodes) for p in self.due(number))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        period = self.fragments if self.staggered else 1
        return sum(self.round_bytes(layout, num_nodes, number, period) for number in range(period)) // period

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps
