"""FZooS: gradients of surrogates instead of the function's, which is only queried; corrected by what all know of it.

Client i keeps its queries of f_i, and goes T = ``steps`` steps x_1, …, x_T from the shared x, by Adam (η = ``lr``)
along the gradient of a Gaussian process' mean μ_i, corrected by a surrogate F̂ of all clients' functions and its own
share f̂_i:

    g_t = ∇μ_i(x_t) + (1/t) (∇F̂(x_t) - ∇f̂_i(x_t))
    x ← x - η_s Σ_i w_i (x - x_i)          ν ← Σ_i w_i ν_i          F̂ = νᵀφ,  f̂_i = ν_iᵀφ

After each step it queries the ``queries`` of ``candidates`` points near x_t at which μ_i's gradient is least certain,
and after the common step (η_s = ``server_lr``) some around the new x, to which it fits ν_i, the weights of D =
``features`` random Fourier features φ that all clients share.
Deviations: gradients are analytic, where the authors' code differentiates numerically with a step of 1e-20. The common
step is always taken; their server keeps the old x if F, which it can evaluate, does not improve. f_i is the loss on one
batch in each round. Least squares have a ridge of ``noise``.
Elasticity: x and ν are shared state. A joiner without queries makes some before its first step; a lost node's share of
ν and x is left out, and the others' weights are scaled up.
Cost: two exchanges, of P and of D values of b = 4 bytes: 2·(N-1)·b·(P + D), or N·(N-1)·b·(P + D) up to 64 KiB each.
State: x, ν, and ``history`` queries of P values at each node; O(n³ + n·P) a step for n = ``neighbors``.
Reference: Shu et al., "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients", 2023,
arXiv:2308.04077.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from algorithms.api import Algorithm, AllReduce, Batch, Layout, Loss, Node, all_reduce_bytes
from algorithms.errors import ProgramError
from algorithms.outer import Adam
from algorithms.zeroth_order.surrogates import FourierFeatures, GaussianProcess

if TYPE_CHECKING:
    from torch import Tensor

    from algorithms.rules import DataBatch


class FZooS(Algorithm, name="fzoos"):
    """Federated zeroth-order optimization with surrogates; see the module's docstring."""

    steps: PositiveInt = 10  # T, local steps in a round
    lr: PositiveFloat = 0.1  # η, Adam's; the authors' code
    server_lr: PositiveFloat = 1.0  # η_s, of the common step
    correction: NonNegativeFloat = 1.0  # γ_1, weight of the correction in the first local step; γ_t = γ_1 / t
    queries: PositiveInt = 5  # after each local step; the authors' code
    candidates: PositiveInt = 100  # points of which those are chosen; the authors' code
    radius: PositiveFloat = 0.01  # largest difference of a candidate's coordinates from x; the authors' code
    surrogate_queries: PositiveInt = 50  # around the common x, at each round's end; the authors' code
    neighbors: PositiveInt = 150  # queries nearest to x that the Gaussian process is fitted to; the authors' code
    history: int = Field(default=500, ge=2)  # last queries that a node keeps, to which f̂_i is fitted
    features: PositiveInt = 1000  # D, random Fourier features; the authors' code has 10 000
    length: PositiveFloat = 1.0  # ℓ, of both kernels, in units of x
    noise: PositiveFloat = 1e-6  # σ², of a value between the least and the largest, which are 0 and 1

    async def round(self, node: Node) -> None:
        batch = await Batch()
        features = FourierFeatures(self.features, node.layout.num_values, node.seed, self.length)
        rng = node.rng("queries")
        start = node.parameters.double()
        points, values = self._known(node)
        if not len(values):
            points, values = await self._query(node, batch, (points, values), self._near(start, self.radius, rng))
        x, adam = start.clone(), Adam(lr=self.lr)
        state = adam.init(x)
        for step in range(1, self.steps + 1):
            gradient = self._process(points, values, x)[1]
            if "surrogate" in node.shared and "surrogate" in node.local:
                difference = cast("Tensor", node.shared["surrogate"]) - cast("Tensor", node.local["surrogate"])
                gradient = gradient + features.gradient(difference.double(), x) * (self.correction / step)
            move, state = adam.update(gradient, state)
            x = x + move
            chosen = self._least_certain(points, values, x, self._near(x, self.radius, rng))
            points, values = await self._query(node, batch, (points, values), chosen)
        moved = await AllReduce((start - x).to(node.parameters.dtype), weight=node.num_samples)
        node.parameters.sub_(moved.value * self.server_lr)
        common = node.parameters.double()
        around = float((common - x).abs().mean()) / 2 or self.radius
        places = self._near(common, around, rng)[: self.surrogate_queries]
        points, values = await self._query(node, batch, (points, values), places)
        weights = self._fit(features, points, values).to(node.parameters.dtype)
        node.local["points"], node.local["values"], node.local["surrogate"] = points, values, weights
        node.shared["surrogate"] = (await AllReduce(weights, weight=node.num_samples)).value

    def _known(self, node: Node) -> tuple[Tensor, Tensor]:
        """Queried points, shape (n, P), and their values, shape (n,); float64."""
        if "points" not in node.local:
            return node.parameters.new_empty((0, node.layout.num_values)).double(), node.parameters.new_empty(
                0
            ).double()
        return cast("Tensor", node.local["points"]), cast("Tensor", node.local["values"])

    def _near(self, x: Tensor, radius: float, rng: torch.Generator) -> Tensor:
        """Candidates, uniform in a cube around ``x``, shape (m, P)."""
        count = max(self.candidates, self.surrogate_queries)
        away = torch.rand(count, len(x), dtype=torch.float64, generator=rng) * 2 - 1
        return x + away.to(x.device) * radius

    async def _query(
        self, node: Node, batch: DataBatch, known: tuple[Tensor, Tensor], places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the values at ``places`` to what is known; what is not finite is no value."""
        values = [await Loss(at=place.to(node.parameters.dtype), batch=batch, probe=True) for place in places]
        good = [place for place, value in enumerate(values) if math.isfinite(value)]
        if not good and not len(known[1]):
            raise ProgramError(f"fzoos: none of the {len(values)} values around the first model is finite")
        points = torch.cat([known[0], places[good]])
        return points[-self.history :], torch.cat([known[1], places.new_tensor(values)[good]])[-self.history :]

    def _process(self, points: Tensor, values: Tensor, x: Tensor) -> tuple[GaussianProcess, Tensor]:
        """The posterior given what was queried nearest to ``x``, and the gradient of its mean there, shape (P,)."""
        nearest = (points - x).square().sum(dim=1).argsort(stable=True)[: self.neighbors]
        scaled, extent = _scaled(values[nearest])
        process = GaussianProcess(points[nearest], scaled, self.length, self.noise)
        return process, process.gradient(x) * extent

    def _least_certain(self, points: Tensor, values: Tensor, x: Tensor, candidates: Tensor) -> Tensor:
        variances = self._process(points, values, x)[0].gradient_variance(candidates[: self.candidates])
        return candidates[variances.argsort(descending=True, stable=True)[: self.queries]]

    def _fit(self, features: FourierFeatures, points: Tensor, values: Tensor) -> Tensor:
        scaled, extent = _scaled(values)
        return features.fit(points, scaled, self.noise) * extent

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        weights = self.features * layout.dtype.itemsize
        return all_reduce_bytes(layout.nbytes, num_nodes) + all_reduce_bytes(weights, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        del num_samples, batch_size
        return 0


def _scaled(values: Tensor) -> tuple[Tensor, float]:
    """Values between 0 and 1, and the length of the range that they had."""
    extent = float(values.max() - values.min()) or 1.0
    return (values - values.min()) / extent, extent
