"""FedAvg: local epochs on a sampled cohort, then the mean weighted by samples.

In each round a fraction C = ``fraction`` of the nodes takes part. Each trains ``epochs`` (E) passes over its own data
from the shared model x, and the server step γ = ``outer.lr`` goes along the weighted mean of the differences:

    S ⊆ nodes, |S| = max(1, ⌈C·N⌉)          Δ_i = x - y_i          w_i = n_i / Σ_{j∈S} n_j   (or 1/|S|)
    x ← x - γ Σ_{i∈S} w_i Δ_i

Deviations: there is no server; all nodes reduce among themselves and hold the result, also those outside the cohort.
With ``steps`` a node takes that many steps instead of E epochs. Floating-point buffers are averaged alike.
Elasticity: x is shared state, and all there is; a joiner receives it. A node lost before the reduction drops out of
the mean, whose weights are those of the others.
Cost: with S contributors among N nodes (S-1)·b·P + (N-1)·b·P bytes per round over all nodes, b = 4 for float32 (as a
star: 2·S·b·P); up to 64 KiB a contribution travels inline, S·(N-1)·b·P. State: P values (x), more with momentum.
Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv:1602.05629, Algorithm 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from algorithms.api import Algorithm, AllReduce, Layout, Node, NodeId, Train, View, all_reduce_bytes
from algorithms.outer import SGD, OuterOptimizer

if TYPE_CHECKING:
    from algorithms.outer import OuterState


class FedAvg(Algorithm, name="fedavg"):
    """Federated averaging; see the module's docstring."""

    epochs: PositiveInt = 1  # E, passes over the node's own data in a round
    steps: PositiveInt | None = None  # optimizer steps in a round, instead of epochs
    fraction: float = Field(default=1.0, gt=0, le=1)  # C, of the nodes that take part in a round
    weighting: Literal["samples", "uniform"] = "samples"  # w_i
    outer: OuterOptimizer = SGD(lr=1.0)  # γ; plain averaging

    def init(self, node: Node) -> None:
        node.shared["model"] = node.parameters.clone()
        node.shared["outer"] = self.outer.init(node.parameters)

    def cohort_size(self, num_nodes: int) -> int:
        """|S|, the number of nodes that take part."""
        # Rounded: 0.07 · 100 is 7.000000000000001 in floating point, and must not become 8.
        return max(1, math.ceil(round(self.fraction * num_nodes, 9)))

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        permutation = torch.randperm(len(view.members), generator=rng)
        order = cast("list[int]", permutation.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        return tuple(sorted(view.members[index] for index in order[: self.cohort_size(len(view.members))]))

    async def round(self, node: Node) -> None:
        model = cast("Tensor", node.shared["model"])
        contribution = None
        weight = 1.0
        if node.participates:
            await (Train(epochs=self.epochs) if self.steps is None else Train(steps=self.steps))
            contribution = {"difference": model - node.parameters, "buffers": node.buffers}
            weight = float(node.num_samples if self.weighting == "samples" else 1)
        mean = await AllReduce(contribution, weight=weight)
        step, node.shared["outer"] = self.outer.update(
            mean.value["difference"], cast("OuterState", node.shared["outer"])
        )
        node.shared["model"] = model + step
        node.parameters.copy_(node.shared["model"])
        node.buffers.copy_(mean.value["buffers"])

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return all_reduce_bytes(layout.nbytes + layout.buffer_nbytes, num_nodes, self.cohort_size(num_nodes))

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps or self.epochs * math.ceil(num_samples / batch_size)
