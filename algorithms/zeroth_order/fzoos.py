"""FZooS: descent along gradients of surrogates, which are fitted to queries of the loss.

Client i keeps its queries of f_i, and takes T = ``steps`` steps x_1, …, x_T of Adam (η = ``lr``) from the shared x. The
direction is the gradient of a Gaussian process' mean μ_i, corrected by a surrogate F̂ of all clients' functions and the
client's own share f̂_i:

    g_t = ∇μ_i(x_t) + (1/t) (∇F̂(x_t) - ∇f̂_i(x_t))
    x ← x - η_s Σ_i w_i (x - x_i)          ν ← Σ_i w_i ν_i          F̂ = νᵀφ,  f̂_i = ν_iᵀφ

It queries the round's x, each x_t, and after each step but the last the ``queries`` of ``candidates`` points near x_t
at which μ_i's gradient is least certain. After the common step (η_s = ``server_lr``) it queries the new x, and the
``surrogate_queries`` least certain of ``surrogate_candidates`` around it. It then fits ν_i to the ``fitted`` queries
nearest to x. ν_i are the weights of D = ``features`` random Fourier features φ that all clients share. The length of
μ_i's kernel is fitted at each step, by the marginal likelihood of its values.

Deviations: gradients are analytic, where the authors' code differentiates numerically with a step of 1e-20. The
likelihood's maximum is searched on a grid that is refined, where scikit-learn climbs from 20 random starts. Uncertainty
is that of μ_i's own Matérn kernel; theirs is an RBF kernel's of the same length. The common step is always taken; their
server keeps the old x if F, which it can evaluate, does not improve. f_i is the loss on one batch in each round; values
of earlier batches are shifted so that they agree at the round's x. Least squares have a ridge of ``noise``. The last
``history`` queries are kept, there all.
Elasticity: x and ν are shared state. A joiner without queries makes ``initial`` before its first step; a lost node's
share of ν and x is left out, and the others' weights are scaled up.
Cost: two exchanges, of P and of D values of b = 4 bytes: 2·(N-1)·b·(P + D), or N·(N-1)·b·(P + D) up to 64 KiB each.
State: x, ν, and ``history`` queries of P values at each node; O(n³ + n²·P) a step for n = ``neighbors``.
Reference: Shu et al., "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients", 2023,
arXiv:2308.04077.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from starling.algorithms.api import Algorithm, AllReduce, Batch, Layout, Loss, Node, all_reduce_bytes
from starling.algorithms.errors import ProgramError
from starling.algorithms.outer import Adam
from starling.algorithms.state import NodeState
from starling.algorithms.zeroth_order.queries import Local, around, known_to, nearest, rebased, scaled
from starling.algorithms.zeroth_order.surrogates import GaussianProcess, common_features

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.rules import DataBatch
    from starling.algorithms.zeroth_order.queries import Queries


class Shared(NodeState):
    surrogate: Tensor | None = None  # ν, shape (D,)


class FZooS(Algorithm, name="fzoos"):
    """Federated zeroth-order optimization with surrogates; see the module's docstring."""

    uses_optimizer: ClassVar[bool] = False

    steps: PositiveInt = 10  # T, local steps in a round; the authors' commands (their script's default: 30)
    lr: PositiveFloat = 0.01  # η, Adam's; the authors' script
    server_lr: PositiveFloat = 1.0  # η_s, of the common step; the authors' script
    correction: NonNegativeFloat = 1.0  # γ_1, of the first local step; γ_t = γ_1 / t; the authors' code
    initial: PositiveInt = 10  # queries near x before a node's first step; the authors' script
    queries: PositiveInt = 5  # after each local step but the last; the authors' code
    candidates: PositiveInt = 100  # points of which those are chosen; the authors' code
    radius: PositiveFloat = 0.01  # largest difference of a candidate's coordinates from x; the authors' code
    surrogate_queries: PositiveInt = 50  # around the common x, at each round's end; the authors' code
    surrogate_candidates: PositiveInt = 200  # points of which those are chosen; the authors' code
    neighbors: PositiveInt = 150  # queries nearest to x that the Gaussian process is fitted to; the authors' code
    fitted: PositiveInt = 500  # queries nearest to x that f̂_i is fitted to; the authors' code
    history: int = Field(default=1000, ge=2)  # last queries that a node keeps; ours
    features: PositiveInt = 1000  # D, random Fourier features; the authors' code has 10 000
    length: PositiveFloat = 1.0  # ℓ, of the features' kernel, in units of x; the authors' code
    noise: PositiveFloat = 1e-6  # σ², of a value between the least and the largest, which are 0 and 1; their code

    async def round(self, node: Node) -> None:
        batch = await Batch()
        features = common_features(self.features, node.layout.num_values, node.seed, self.length)
        rng = node.rng("queries")
        x = start = node.parameters.double()
        shared, local, known = Shared(node.shared), Local(node.local), known_to(node)
        earlier, near = len(known[1]), start.unsqueeze(0)
        if not earlier:
            near = torch.cat([around(start, self.radius, self.initial, rng), near])
        known = await self._query(node, batch, known, near)
        if earlier and torch.equal(known[0][-1], node.parameters):  # its value there is finite
            known = rebased(known)
        adam, length = Adam(lr=self.lr), self.length
        state = adam.init(x)
        for step in range(1, self.steps + 1):
            process, extent = self._process(known, x)
            gradient, length = process.gradient(x) * extent, process.length
            if shared.surrogate is not None and local.surrogate is not None:
                difference = shared.surrogate - local.surrogate
                gradient = gradient + features.gradient(difference.double(), x) * (self.correction / step)
            move, state = adam.update(gradient, state)
            x = x + move
            known = await self._query(node, batch, known, x.unsqueeze(0))
            if step < self.steps:
                candidates = around(x, self.radius, self.candidates, rng)
                known = await self._query(
                    node, batch, known, self._least_certain(known, x, candidates, self.queries, length)
                )
        moved = await AllReduce((start - x).to(node.parameters.dtype), weight=node.num_samples)
        node.parameters.sub_(moved.value * self.server_lr)
        common = node.parameters.double()
        known = await self._query(node, batch, known, common.unsqueeze(0))
        reach = float((common - x).abs().mean()) / 2 or self.radius
        candidates = around(common, reach, self.surrogate_candidates, rng)
        places = self._least_certain(known, common, candidates, self.surrogate_queries, length)
        known = await self._query(node, batch, known, places)
        points, values = nearest(known, common, self.fitted)
        unit, extent = scaled(values)
        weights = (features.fit(points, unit, self.noise) * extent).to(node.parameters.dtype)
        local.points, local.values, local.surrogate = *known, weights
        shared.surrogate = (await AllReduce(weights, weight=node.num_samples)).value

    async def _query(self, node: Node, batch: DataBatch, known: Queries, places: Tensor) -> Queries:
        """Add the values at ``places`` to what is known; what is not finite is no value."""
        rounded = places.to(node.parameters.dtype)
        values = [await Loss(at=place, batch=batch, probe=True) for place in rounded]
        good = [place for place, value in enumerate(values) if math.isfinite(value)]
        if not good and not len(known[1]):
            raise ProgramError(f"fzoos: none of the {len(values)} values around the first model is finite")
        points, added = torch.cat([known[0], rounded[good]]), places.new_tensor(values)[good]
        return points[-self.history :], torch.cat([known[1], added])[-self.history :]

    def _process(self, known: Queries, x: Tensor, length: float | None = None) -> tuple[GaussianProcess, float]:
        """The posterior given what was queried nearest to ``x``, in units of the values' range, and that range."""
        points, values = nearest(known, x, self.neighbors)
        unit, extent = scaled(values)
        return GaussianProcess(points, unit, length, self.noise), extent

    def _least_certain(self, known: Queries, x: Tensor, candidates: Tensor, count: int, length: float) -> Tensor:
        variances = self._process(known, x, length)[0].gradient_variance(candidates)
        return candidates[variances.argsort(descending=True, stable=True)[:count]]

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        weights = self.features * layout.dtype.itemsize
        return all_reduce_bytes(layout.nbytes, num_nodes) + all_reduce_bytes(weights, num_nodes)
