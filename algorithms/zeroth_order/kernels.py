"""The Matérn 5/2 kernel, and the length that makes given values likeliest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

ROOT5 = math.sqrt(5)


def likeliest_length(distances: Tensor, values: Tensor, noise: float) -> float:
    """Return the ℓ between 1e-5 and 1e5 with the greatest −½ yᵀ(K + σ²I)⁻¹y − ½ log det(K + σ²I), to one percent.

    Args:
        distances: of the points, shape (n, n).
        values: y, shape (n,).
        noise: σ².
    """
    best, reach, count = 0.0, 5.0, 21
    for _ in range(4):
        tried = (best - reach + 2 * reach / (count - 1) * place for place in range(count))
        lengths = [10 ** min(5.0, max(-5.0, exponent)) for exponent in tried]
        likelihoods = [_likelihood(distances / length, values, noise) for length in lengths]
        best = math.log10(lengths[max(range(count), key=likelihoods.__getitem__)])
        reach, count = 2 * reach / (count - 1), 9
    return 10**best


def _likelihood(scaled: Tensor, values: Tensor, noise: float) -> float:
    covariance = matern(scaled)
    covariance.diagonal().add_(noise)
    factor, failed = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(covariance))  # pyright: ignore[reportUnknownMemberType] - torch's stubs
    if int(failed):
        return -math.inf
    solved = torch.cholesky_solve(values.unsqueeze(1), factor).squeeze(1)
    return -float(values @ solved) / 2 - float(factor.diagonal().log().sum())


def matern(scaled: Tensor) -> Tensor:
    """Return k at distances in units of ℓ."""
    rho = scaled * ROOT5
    return (1 + rho + rho.square() / 3) * (-rho).exp()


def distances_of(gram: Tensor) -> Tensor:
    """Return |x_j − x_k| of points with products x_j·x_k; 0 for those that rounding does not tell apart."""
    sums = gram.diagonal().unsqueeze(0) + gram.diagonal().unsqueeze(1)
    squares = sums - 2 * gram
    return squares.masked_fill(squares <= 1e-12 * sums, 0.0).sqrt()
