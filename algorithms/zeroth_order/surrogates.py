"""Models of a function that was only queried: a Gaussian process, and random Fourier features; both for gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

from algorithms.noise import fill
from algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

_ROOT5 = math.sqrt(5)


class GaussianProcess:
    """The posterior of a function with a Matérn 5/2 kernel, given values at some points.

    With ρ = √5·r/ℓ for points at distance r:

        k(r) = (1 + ρ + ρ²/3)·exp(−ρ)          ∇μ(x) = Σ_j ∂k(x, x_j) [(K + σ²I)⁻¹ y]_j

    Args:
        points: shape (n, d), float64.
        values: y, shape (n,), float64.
        length: ℓ, of the kernel.
        noise: σ², a variance that is added to the values'.
    """

    def __init__(self, points: Tensor, values: Tensor, length: float = 1.0, noise: float = 1e-6) -> None:
        self._points = points
        self._length = length
        rho = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") * (_ROOT5 / length)
        covariance = (1 + rho + rho.square() / 3) * (-rho).exp()
        covariance.diagonal().add_(noise)
        self._factor = cast("Tensor", torch.linalg.cholesky(covariance))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        self._weights = torch.cholesky_solve(values.unsqueeze(1), self._factor).squeeze(1)

    def mean(self, at: Tensor) -> Tensor:
        """μ at one point, shape (d,); a number."""
        rho = _lengths(self._points - at) * (_ROOT5 / self._length)
        return ((1 + rho + rho.square() / 3) * (-rho).exp()) @ self._weights

    def gradient(self, at: Tensor) -> Tensor:
        """∇μ at one point, shape (d,)."""
        apart = at - self._points
        return (self._slopes(apart) * self._weights) @ apart

    def gradient_variance(self, at: Tensor) -> Tensor:
        """The trace of the posterior covariance of ∇f at each of several points, shape (m, d); shape (m,)."""
        num_values = at.shape[1]
        prior = num_values * 5 / (3 * self._length**2)
        inverse = torch.cholesky_inverse(self._factor)
        variances: list[Tensor] = []
        for point in at:
            apart = point - self._points
            jacobian = self._slopes(apart).unsqueeze(1) * apart
            variances.append(prior - (inverse * (jacobian @ jacobian.T)).sum())
        return torch.stack(variances)

    def _slopes(self, apart: Tensor) -> Tensor:
        """∂k(x, x_j) / (x − x_j) for the rows x − x_j of ``apart``, shape (n,)."""
        rho = _lengths(apart) * (_ROOT5 / self._length)
        return (1 + rho) * (-rho).exp() * (-5 / (3 * self._length**2))


class FourierFeatures:
    """D features φ(x) = √(2/D)·cos(Ωᵀx + u), for which E[φ(x)ᵀφ(y)] = exp(−‖x − y‖²/2ℓ²).

    Ω ~ N(0, 1/ℓ²) and u, uniform in [0, 2π), are the same wherever ``seed`` is.

    Args:
        count: D.
        num_values: d, the dimension of x.
        seed: names the features.
        length: ℓ.
    """

    def __init__(self, count: int, num_values: int, seed: int, length: float = 1.0) -> None:
        omega = torch.empty(count * num_values, dtype=torch.float64)
        self._omega = fill(omega, "gaussian", derive_seed("frequencies", seed)).view(count, num_values).div_(length)
        bits = fill(torch.empty(count * 32, dtype=torch.float64), "rademacher", derive_seed("phases", seed))
        places = 2.0 ** -torch.arange(1, 33, dtype=torch.float64)
        self._phases = (bits.view(count, 32).add_(1) / 2 @ places) * (2 * math.pi)
        self._scale = math.sqrt(2 / count)

    def __call__(self, at: Tensor) -> Tensor:
        """φ of the rows of ``at``, shape (n, d); shape (n, D)."""
        return (at @ self._omega.T + self._phases).cos() * self._scale

    def fit(self, points: Tensor, values: Tensor, noise: float = 1e-6) -> Tensor:
        """ν, shape (D,), with the least ‖Φν − y‖² + ``noise``·‖ν‖²."""
        features = self(points)
        gram = features @ features.T
        gram.diagonal().add_(noise)
        solved = cast("Tensor", torch.linalg.solve(gram, values))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        return features.T @ solved

    def gradient(self, weights: Tensor, at: Tensor) -> Tensor:
        """The gradient of νᵀφ at one point, shape (d,); linear in ``weights``, shape (D,)."""
        waves = (self._omega @ at + self._phases).sin()
        return (weights * waves) @ self._omega * -self._scale


def _lengths(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1).sqrt()
