"""Surrogates of a queried function and their gradients: a Gaussian process, and random Fourier features."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, cast

import torch

from starling.algorithms.errors import ProgramError
from starling.algorithms.noise import fill
from starling.algorithms.seeds import derive_seed
from starling.algorithms.zeroth_order.kernels import ROOT5, distances_of, likeliest_length, matern

if TYPE_CHECKING:
    from torch import Tensor


class GaussianProcess:
    """The posterior of a function with a Matérn 5/2 kernel, given values at some points.

    With ρ = √5·r/ℓ for points at distance r:

        k(r) = (1 + ρ + ρ²/3)·exp(−ρ)          ∇μ(x) = Σ_j ∂k(x, x_j) [(K + σ²I)⁻¹ y]_j

    Args:
        points: shape (n, d), float64.
        values: y, shape (n,), float64.
        length: ℓ, of the kernel; ``None``: the one with the greatest marginal likelihood, see ``likeliest_length``.
        noise: σ², a variance that is added to the values'.
    """

    def __init__(self, points: Tensor, values: Tensor, length: float | None = 1.0, noise: float = 1e-6) -> None:
        self._origin = points.mean(dim=0)
        self._points = points - self._origin
        self._gram = self._points @ self._points.T
        distances = distances_of(self._gram)
        self.length = likeliest_length(distances, values, noise) if length is None else length
        self._factor = _factor(matern(distances / self.length), noise)
        self._weights = torch.cholesky_solve(values.unsqueeze(1), self._factor).squeeze(1)

    def mean(self, at: Tensor) -> Tensor:
        """Return μ at one point, shape (d,), as a number."""
        return matern(_lengths(self._points - (at - self._origin)) / self.length) @ self._weights

    def gradient(self, at: Tensor) -> Tensor:
        """Return ∇μ at one point, shape (d,)."""
        apart = (at - self._origin) - self._points
        return (self._slopes(_lengths(apart)) * self._weights) @ apart

    def gradient_variance(self, at: Tensor) -> Tensor:
        """Return the trace of the posterior covariance of ∇f at points of shape (m, d); shape (m,).

        It needs no more of the points than the products of their differences: n² numbers a point, whatever d is.
        """
        prior = at.shape[1] * 5 / (3 * self.length**2)
        inverse = torch.cholesky_inverse(self._factor)
        moved = at - self._origin
        squares, products = moved.square().sum(dim=1), moved @ self._points.T
        lengths = (squares.unsqueeze(1) - 2 * products + self._gram.diagonal()).clamp(min=0).sqrt()
        variances: list[Tensor] = []
        for square, product, slopes in zip(squares, products, self._slopes(lengths), strict=True):
            inner = square - product - product.unsqueeze(1) + self._gram
            variances.append(prior - slopes @ (inverse * inner) @ slopes)
        return torch.stack(variances)

    def _slopes(self, lengths: Tensor) -> Tensor:
        """∂k(x, x_j) / (x − x_j) at distances |x − x_j|."""
        rho = lengths * (ROOT5 / self.length)
        return (1 + rho) * (-rho).exp() * (-5 / (3 * self.length**2))


def _factor(covariance: Tensor, noise: float) -> Tensor:
    """Return the Cholesky factor of ``covariance`` with ``noise`` on its diagonal, or a little more.

    Raises:
        ProgramError: there is none, as points are too far apart for their differences to be numbers.
    """
    for _ in range(6):
        # Rounded distances may need more than the noise to be those of points.
        covariance.diagonal().add_(noise)
        factor, failed = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(covariance))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        if not int(failed):
            return factor
        noise *= 10
    raise ProgramError("fzoos: queries are too far apart for a surrogate; the model has diverged, lower lr")


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
        """Return φ of the rows of ``at``, shape (n, d); shape (n, D)."""
        return (at @ self._omega.T + self._phases).cos() * self._scale

    def fit(self, points: Tensor, values: Tensor, noise: float = 1e-6) -> Tensor:
        """Return ν, shape (D,), with the least ‖Φν − y‖² + ``noise``·‖ν‖²."""
        features = self(points)
        gram = features @ features.T
        gram.diagonal().add_(noise)
        solved = cast("Tensor", torch.linalg.solve(gram, values))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
        return features.T @ solved

    def gradient(self, weights: Tensor, at: Tensor) -> Tensor:
        """Return the gradient of νᵀφ at one point, shape (d,); linear in ``weights``, shape (D,)."""
        waves = (self._omega @ at + self._phases).sin()
        return (weights * waves) @ self._omega * -self._scale


@functools.lru_cache(maxsize=1)
def common_features(count: int, num_values: int, seed: int, length: float) -> FourierFeatures:
    """Return the features of all nodes of a run, which are many numbers: those of the last call are kept."""
    return FourierFeatures(count, num_values, seed, length)


def _lengths(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1).sqrt()
