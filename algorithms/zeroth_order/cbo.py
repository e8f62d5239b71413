"""CBO: particles drift to where the loss is low, and explore the more the farther they are from there.

Node m has n = ``particles`` particles x_mk with energies E_mk, their losses on a batch (α = ``alpha``, λ = ``drift``,
σ = ``diffusion``, Δt = ``dt``). One step of Euler and Maruyama:

    x_α = Σ w_mk x_mk / Σ w_mk,   w_mk = exp(-α (E_mk - E_min))          E_min = min_mk E_mk
    x_mk ← x_mk - λ Δt (x_mk - x_α) + σ √Δt D(x_mk - x_α) ξ,   ξ ~ N(0, I_P)

D(v) is ‖v‖ (isotropic) or the diagonal of |v| (anisotropic). The model is x_α. With one consensus point for good,
E‖x - x_α‖² falls by (1 - λ Δt)² + σ² Δt a step if anisotropic; if isotropic, by (1 - λ Δt)² + P σ² Δt.
Deviations: no drift along the gradient, no schedule of α and σ. Each node's energies are of the round's batch, which is
its own.
Elasticity: a particle belongs to its node. A lost node's weight is missing, and nothing else; a joiner's particles
begin at x_α + ``spread`` ξ, as all did at the first model.
Cost: 8 bytes from each to each other for E_min, and an exchange of P values of b = 4 bytes: 2·(N-1)·b·P, or N·(N-1)·b·P
up to 64 KiB. State: n·P values a node.
Reference: Riedl, Klock, Geldhauser and Fornasier, "Gradient is All You Need?", 2023, arXiv:2306.09778.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from algorithms.api import Algorithm, AllGather, AllReduce, Batch, Layout, Loss, Node, all_reduce_bytes
from algorithms.errors import ProgramError
from algorithms.noise import fill
from algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ENERGY_NBYTES = 8
"""Of a number."""

_NO_WEIGHT = 1e-300
"""Next to the 1 of the particle with the least energy."""


class CBO(Algorithm, name="cbo"):
    """Consensus-based optimization; see the module's docstring."""

    particles: PositiveInt = 10  # n, of each node
    alpha: NonNegativeFloat = 100.0  # α, 1 / units of the loss; 0: x_α is the mean; the authors' illustrations
    drift: PositiveFloat = 1.0  # λ, 1 / units of time
    diffusion: NonNegativeFloat = 0.7  # σ; stable below √(2λ) if anisotropic, and √(2λ/P) if isotropic, for small Δt
    dt: float = Field(default=0.1, gt=0, le=1)  # Δt, of a round; CBXpy
    anisotropic: bool = True  # noise by coordinate, which P does not make stronger
    spread: PositiveFloat = 1.0  # standard deviation of the particles at first, in units of the parameters

    def init(self, node: Node) -> None:
        node.local["particles"] = self._scattered(node)

    async def join(self, node: Node) -> None:
        node.local["particles"] = self._scattered(node)

    def _scattered(self, node: Node) -> Tensor:
        """Particles around the model, shape (n, P)."""
        return node.parameters + self._noise(node, "scatter") * self.spread

    def _noise(self, node: Node, purpose: str) -> Tensor:
        """Standard normal values, shape (n, P): a pure function of (run, round, node, purpose)."""
        values = torch.empty(self.particles * node.layout.num_values, dtype=node.parameters.dtype)
        key = derive_seed("particles", node.seed, node.round, node.id, purpose)
        return fill(values.to(node.parameters.device), "gaussian", key).view(self.particles, -1)

    async def round(self, node: Node) -> None:
        particles = cast("Tensor", node.local["particles"])
        batch = await Batch()
        energies = [await Loss(at=particle, batch=batch, probe=True) for particle in particles]
        lowest = min((energy for energy in energies if math.isfinite(energy)), default=math.inf)
        least = min((await AllGather(lowest)).values())
        if least == math.inf:
            raise ProgramError("cbo: no particle has a finite energy; lower spread or diffusion")
        weights = weights_of(energies, least, self.alpha)
        total = sum(weights)
        # What has no weight may be at infinity, and 0 · ∞ is no number.
        shares = [particle * (weight / total) for particle, weight in zip(particles, weights, strict=True) if weight]
        mean = torch.stack(shares).sum(dim=0) if shares else torch.zeros_like(node.parameters)
        consensus = (await AllReduce(mean, weight=total or _NO_WEIGHT)).value
        apart = particles - consensus
        strength = apart.abs() if self.anisotropic else apart.square().sum(dim=1, keepdim=True).sqrt()
        noise = strength * self._noise(node, "step") * (self.diffusion * math.sqrt(self.dt))
        node.local["particles"] = particles - apart * (self.drift * self.dt) + noise
        node.parameters.copy_(consensus)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (num_nodes - 1) * _ENERGY_NBYTES + all_reduce_bytes(layout.nbytes, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        del num_samples, batch_size
        return 0


def weights_of(energies: Sequence[float], least: float, alpha: float) -> list[float]:
    """exp(-α (E - E_min)) of each energy; 0 where it is not finite.

    >>> weights_of([1.0, 2.0, math.nan], least=1.0, alpha=0.0)
    [1.0, 1.0, 0.0]
    """
    return [math.exp(-alpha * (energy - least)) if math.isfinite(energy) else 0.0 for energy in energies]
