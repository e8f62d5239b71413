"""CBO: particles drift to where the mean loss is low, with noise that grows with their distance from there.

All nodes have the same K = ``particles`` particles x_k. Each of the N nodes evaluates all particles on a batch of its
own data. A particle's energy E_k is the mean of its N losses, so one function compares all particles: the mean loss
over nodes (α = ``alpha``, λ = ``drift``, σ = ``diffusion``, Δt = ``dt``). One step of Euler and Maruyama:

    E_k = mean_m f_m(x_k)          x_α = Σ w_k x_k / Σ w_k,   w_k = exp(-α (E_k - min_l E_l))
    x_k ← x_k - λ Δt (x_k - x_α) + σ √Δt D(x_k - x_α) ξ_k,   ξ_k ~ N(0, I_P)

D(v) is ‖v‖ (isotropic) or the diagonal of |v| (anisotropic). The model is x_α. All nodes draw the same ξ_k, from the
run's seed. With one consensus point for good, E‖x - x_α‖² falls by (1 - λ Δt)² + σ² Δt a step if anisotropic; if
isotropic, by (1 - λ Δt)² + P σ² Δt.
Deviations: no drift along the gradient, no schedule of α and σ. Nodes divide the data among themselves, not the
particles: energies of different data are not comparable, and the authors' code too evaluates all particles on one
batch. The batch of a round is N batches, one of each node.
Elasticity: particles are shared state; a joiner receives them. A lost node's loss is missing in the mean, and nothing
else.
Cost: one exchange of K values of 8 bytes, whatever P is: 2·(N-1)·8·K bytes, or N·(N-1)·8·K up to 64 KiB. K evaluations
a node. State: K·P values on each node.
Reference: Riedl, Klock, Geldhauser and Fornasier, "Gradient is All You Need?", 2023, arXiv:2306.09778. The settings of
their illustration (CBOSchemeIntuition.m): dt 0.01, λ 1, σ 1.6 isotropic, α 100, 200 particles; those of CBXpy's code:
dt 0.01, λ 1, σ 5.1, α 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from starling.algorithms.api import Algorithm, AllReduce, Batch, Layout, Loss, Node, all_reduce_bytes
from starling.algorithms.errors import ProgramError
from starling.algorithms.noise import fill
from starling.algorithms.seeds import derive_seed
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ENERGY_NBYTES = 8
"""Bytes of an energy."""

_UNFIT = 1e300
"""The energy of a particle whose loss is not finite at a node: what travels is finite, and so is the mean."""

_FITTEST_UNFIT = 1e290
"""Less than the mean of one ``_UNFIT`` among any number of nodes, more than any loss."""


class Shared(NodeState):
    particles: Tensor  # x_k, shape (K, P)


class CBO(Algorithm, name="cbo"):
    """Consensus-based optimization; see the module's docstring."""

    uses_optimizer: ClassVar[bool] = False

    particles: PositiveInt = 40  # K, of all nodes together; each node evaluates all of them in a round
    alpha: NonNegativeFloat = 100.0  # α, 1 / units of the loss; 0: x_α is the mean; the authors' illustration
    drift: PositiveFloat = 1.0  # λ, 1 / units of time; the authors' illustration, and CBXpy
    diffusion: NonNegativeFloat = 0.7  # σ, ours; stable below √(2λ) if anisotropic, √(2λ/P) if isotropic, for small Δt
    dt: float = Field(default=0.1, gt=0, le=1)  # Δt, of a round; ours, ten times that of the authors and of CBXpy
    anisotropic: bool = True  # noise by coordinate, which P does not make stronger
    spread: PositiveFloat = 1.0  # standard deviation of the particles at first, in units of the parameters

    def init(self, node: Node) -> None:
        Shared(node.shared).particles = node.parameters + self._noise(node, "scatter") * self.spread

    def _noise(self, node: Node, purpose: str) -> Tensor:
        """Standard normal values, shape (K, P): a pure function of (run, round, purpose)."""
        values = torch.empty(self.particles * node.layout.num_values, dtype=node.parameters.dtype)
        key = derive_seed("particles", node.seed, node.round, purpose)
        return fill(values.to(node.parameters.device), "gaussian", key).view(self.particles, -1)

    async def round(self, node: Node) -> None:
        particles = Shared(node.shared).particles
        batch = await Batch()
        losses = [await Loss(at=particle, batch=batch, probe=True) for particle in particles]
        told = [loss if math.isfinite(loss) else _UNFIT for loss in losses]
        mean = (await AllReduce(torch.tensor(told, dtype=torch.float64))).value
        weights = weights_of([float(energy) for energy in mean], self.alpha)
        if not any(weights):
            raise ProgramError("cbo: no particle has a finite loss on all nodes; lower spread or diffusion")
        # What has no weight may be at infinity, and 0 · ∞ is no number.
        total = sum(weights)
        shares = [particle * (weight / total) for particle, weight in zip(particles, weights, strict=True) if weight]
        consensus = torch.stack(shares).sum(dim=0)
        apart = particles - consensus
        strength = apart.abs() if self.anisotropic else apart.square().sum(dim=1, keepdim=True).sqrt()
        noise = strength * self._noise(node, "step") * (self.diffusion * math.sqrt(self.dt))
        Shared(node.shared).particles = particles - apart * (self.drift * self.dt) + noise
        node.parameters.copy_(consensus)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        del layout
        return all_reduce_bytes(self.particles * _ENERGY_NBYTES, num_nodes)


def weights_of(energies: Sequence[float], alpha: float) -> list[float]:
    """Return exp(-α (E - min E)) for each energy, 0 for those of unfit particles; all 0 if all are unfit.

    >>> weights_of([1.0, 2.0, math.nan], alpha=0.0)
    [1.0, 1.0, 0.0]
    """
    least = min((energy for energy in energies if energy < _FITTEST_UNFIT), default=0.0)
    return [math.exp(-alpha * (energy - least)) if energy < _FITTEST_UNFIT else 0.0 for energy in energies]
