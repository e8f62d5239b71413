"""FedAvg: local epochs on a sampled cohort, then the mean weighted by samples.

In each round a fraction C = ``fraction`` of the nodes takes part. Each trains ``epochs`` (E) passes over its own data
from the shared model x, and the server step γ = ``outer.lr`` goes along the weighted mean of the differences:

    S ⊆ nodes, |S| = max(1, ⌈C·N⌉)          Δ_i = x - y_i          w_i = n_i / Σ_{j∈S} n_j   (or 1/|S|)
    x ← x - γ Σ_{i∈S} w_i Δ_i

Deviations: there is no server; all nodes reduce among themselves and hold the result, also those outside the cohort.
With ``steps`` a node takes that many steps instead of E epochs. n_i counts the samples of a node's epoch: its own, and
those of nodes that are away. With ``steps`` it counts the samples that the node owns, or was handed if it owns none.
Floating-point buffers are averaged alike. Another ``aggregator`` may take the weighted mean's place, and codecs may
shrink what travels.
Elasticity: x is shared state, and all there is; a joiner receives it. A node lost before the reduction drops out of
the mean, whose weights are those of the others.
Cost: with S contributors among N nodes (S-1)·b·P + (N-1)·b·P bytes per round over all nodes, b = 4 for float32 (as a
star: 2·S·b·P); ``codec`` shrinks the first term, ``result_codec`` the second. Up to 64 KiB a contribution travels
inline, S·(N-1)·b·P. State: P values (x), more with momentum.
Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv:1602.05629, Algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from starling.algorithms.aggregators import Aggregator, Mean
from starling.algorithms.api import AllReduce, Layout, Node, all_reduce_bytes
from starling.algorithms.codecs import Codec, Identity, exchange_codecs, refuse_lossy
from starling.algorithms.federated.base import Federated, Shared

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.rules import Rule


class FedAvg(Federated, name="fedavg"):
    """Federated averaging; see the module's docstring."""

    weighting: Literal["samples", "uniform"] = "samples"  # w_i
    aggregator: Aggregator = Mean()  # combines the differences; mean: weighted by w_i
    codec: Codec = Identity()  # encodes contributions, which are decoded before they are combined
    result_codec: Codec = Identity()  # encodes the combined difference

    @model_validator(mode="after")
    def _codecs_lose_nothing(self) -> Self:
        refuse_lossy(self.codec, self.result_codec, feedback=None)
        return self

    def rule(self, model: Tensor) -> Rule | None:
        """Return the rule of local steps that begin at ``model``, shape (P,); ``None`` for plain gradients."""
        del model
        return None

    async def round(self, node: Node) -> None:
        model = Shared(node.shared).model
        contribution = None
        weight = 1.0
        if node.participates:
            report = await self.local_work(self.rule(model))
            contribution = model - node.parameters
            if self.weighting == "samples":
                # What an epoch has trained on: another number than its own part's where it stands in for others.
                trained = report.num_samples / self.epochs if self.steps is None else node.num_samples
                weight = max(1.0, float(trained))
        codec, result_codec = exchange_codecs(self.codec, self.result_codec, node.round)
        mean = await AllReduce(
            contribution,
            weight=weight,
            aggregator=self.aggregator,
            codec=codec,
            result_codec=result_codec,
            buffers=node.buffers,
        )
        self.move(node, mean.value)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        sent, received = layout.encoded_nbytes(self.codec), layout.encoded_nbytes(self.result_codec)
        return all_reduce_bytes(sent, num_nodes, self.cohort_size(num_nodes), received, self.aggregator)
