"""Quadratic: a problem whose every quantity is known in closed form, for exact tests of algorithms.

Node m minimises

    f_m(θ) = ½ (θ − c_m)ᵀ A_m (θ − c_m)        c_m = c + ``heterogeneity`` · z_m
    A_m = A + ``curvature_heterogeneity`` · u_m v_m v_mᵀ        ‖v_m‖ = 1, u_m in [0, 1]

A has eigenvalues from 1 down to 1/``condition``, evenly spaced on a logarithmic scale, in a random basis; c and z_m
are standard normal. So gradient descent is stable below lr = 2 / (1 + ``curvature_heterogeneity``), whatever the
condition number. A node's problem depends on ``problem_seed`` and its index, and not on how many nodes there are.

Each sample is a center of its own, c_m + ``noise`` · ξ, and the vector v_m, scaled so that s_m s_mᵀ = A_m − A. A
node's ξ are shifted to sum to zero, which makes the mean loss of its samples f_m plus a constant: noise moves no
optimum. Held-out data are the exact centers, so the validation loss is mean_m f_m(θ). θ starts at zero.
"""

from __future__ import annotations

import functools

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from starling.actors.data.samples import TensorSamples
from starling.actors.tasks.base import Task
from starling.algorithms.seeds import generator


class Quadratic(Task, name="quadratic"):
    """Minimise the mean of the nodes' quadratics."""

    dimension: PositiveInt = 10
    heterogeneity: NonNegativeFloat = 1.0  # standard deviation of c_m around c; 0: all nodes share one center
    curvature_heterogeneity: NonNegativeFloat = 0.0  # 0: all nodes share one A
    condition: float = Field(default=10.0, ge=1)  # condition number of the shared A; 1: the identity, exactly
    noise: NonNegativeFloat = 0.0  # standard deviation of a sample's center; 0: every gradient is the exact one
    samples_per_node: PositiveInt = 64  # with one, its noise is zero, as it must sum to zero
    problem_seed: int = 0

    def center(self, node: int) -> Tensor:
        """c_m of node ``node``, shape (d,), float64."""
        mean = self._normal("center")
        return mean + self.heterogeneity * self._normal("center", node)

    def curvature(self, node: int) -> Tensor:
        """A_m of node ``node``, shape (d, d), float64, symmetric and positive definite."""
        stretch = self._stretch(node)
        return _shared_curvature(self.dimension, self.condition, self.problem_seed) + stretch.outer(stretch)

    def optimum(self, num_nodes: int) -> Tensor:
        """The minimiser of mean_m f_m, (Σ A_m)⁻¹ Σ A_m c_m, shape (d,), float64."""
        curvatures = [self.curvature(node) for node in range(num_nodes)]
        pulls = [curvature @ self.center(node) for node, curvature in enumerate(curvatures)]
        return torch.linalg.solve(torch.stack(curvatures).sum(0), torch.stack(pulls).sum(0))

    def objective(self, parameters: Tensor, num_nodes: int) -> float:
        """mean_m f_m at ``parameters``, shape (d,)."""
        residuals = [parameters.double() - self.center(node) for node in range(num_nodes)]
        losses = [residual @ self.curvature(node) @ residual / 2 for node, residual in enumerate(residuals)]
        return float(torch.stack(losses).mean())

    def train_samples(self, num_nodes: int) -> TensorSamples:
        """``samples_per_node`` pairs of a center and s_m for each node, two float64 tensors of shape (n, d)."""
        count = self.samples_per_node
        noise = [self._sample_noise(node) for node in range(num_nodes)]
        centers = [self.center(node) + noise[node] for node in range(num_nodes)]
        stretches = [self._stretch(node).expand(count, -1) for node in range(num_nodes)]
        owners = torch.arange(num_nodes).repeat_interleave(count)
        return TensorSamples(torch.cat(centers), torch.cat(stretches), owners=owners)

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        """One sample per node: its exact center."""
        centers = [self.center(node) for node in range(num_nodes)]
        stretches = [self._stretch(node) for node in range(num_nodes)]
        return TensorSamples(torch.stack(centers), torch.stack(stretches), owners=torch.arange(num_nodes))

    def build(self) -> nn.Module:
        """θ = 0."""
        return _Point(self.dimension)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean of ½ rᵀAr + ½ (s·r)², r = θ − center: A_m is applied to every sample and formed for none."""
        centers, stretches = batch
        residuals = module(centers)
        curvature = _shared_curvature(self.dimension, self.condition, self.problem_seed).to(residuals)
        shared = ((residuals @ curvature) * residuals).sum(dim=1)
        own = (residuals * stretches).sum(dim=1).square()
        return (shared + own).mean() / 2

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """The least possible validation loss."""
        return {"optimum": self.objective(self.optimum(num_nodes), num_nodes)}

    def _stretch(self, node: int) -> Tensor:
        """s_m = √(curvature_heterogeneity · u_m) · v_m, shape (d,)."""
        direction = self._normal("direction", node)
        rng = generator("quadratic", self.problem_seed, "amount", node)
        amount = torch.rand((), dtype=torch.float64, generator=rng)
        return direction / direction.norm() * (self.curvature_heterogeneity * amount).sqrt()

    def _sample_noise(self, node: int) -> Tensor:
        """Perturbations of a node's centers, shape (samples_per_node, d); they sum to zero."""
        rng = generator("quadratic", self.problem_seed, "noise", node)
        noise = torch.randn(self.samples_per_node, self.dimension, dtype=torch.float64, generator=rng)
        return (noise - noise.mean(dim=0)) * self.noise

    def _normal(self, *labels: int | str) -> Tensor:
        rng = generator("quadratic", self.problem_seed, *labels)
        return torch.randn(self.dimension, dtype=torch.float64, generator=rng)


class _Point(nn.Module):
    """A model that is its parameters; maps centers, shape (b, d), to residuals θ − center."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))

    def forward(self, centers: Tensor) -> Tensor:
        return self.theta - centers


@functools.cache
def _shared_curvature(dimension: int, condition: float, problem_seed: int) -> Tensor:
    """A, shape (d, d), float64; not to be written to."""
    eigenvalues = condition ** -torch.linspace(0, 1, dimension, dtype=torch.float64)
    rng = generator("quadratic", problem_seed, "basis")
    basis, _ = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=rng))
    # The least eigenvalue apart: what is left is exactly zero for condition 1, so that A is exactly the identity.
    least = eigenvalues.min()
    rest = (basis * (eigenvalues - least)) @ basis.T
    return least * torch.eye(dimension, dtype=torch.float64) + (rest + rest.T) / 2
