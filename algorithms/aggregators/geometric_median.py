"""The geometric median, by Weiszfeld's steps in the space of coefficients.

    z = Σ_i a_i x_i, Σ_i a_i = 1          ‖x_i - z‖² = G_ii - 2 (G a)_i + aᵀ G a
    a_i ← w_i / max(ν, ‖x_i - z‖), divided by their sum; T times, or until no ‖x_i - z‖ changes by a ``tol``-th

z approaches the point with the least Σ w_i ‖x_i - z‖. A contribution that is not finite is left out. Nodes can claim
any weight: against dishonest ones let all contribute with weight 1.

Deviations: the paper takes few steps (T = 3), which may end far from the median; here there are as many as are needed.
Reference: Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 2022, arXiv:1912.13445, algorithm 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from starling.algorithms.aggregators.gram import GramAggregator, Matrix, finite_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


class GeometricMedian(GramAggregator, name="geometric_median"):
    """The point with the least weighted sum of distances to the contributions, smoothed near them.

    >>> import torch
    >>> rows = [torch.tensor([value, 0.0]) for value in (1.0, 2.0, 99.0)]
    >>> GeometricMedian().combine(rows, [1.0] * 3).round(decimals=3).tolist()
    [2.0, 0.0]
    """

    steps: PositiveInt = 100  # T, at most
    nu: PositiveFloat = 1e-6  # ν, smaller distances count as this
    start: Literal["mean", "origin"] = "mean"  # z before the first step: the weighted mean, or 0
    tol: float = Field(default=1e-6, ge=0)  # relative change of the distances to z at which the steps end

    def weigh(self, measured: Matrix, weights: Sequence[float], own: int | None = None) -> list[float]:
        del own
        finite = finite_rows(measured)
        if not finite:
            return [math.nan] * len(weights)
        origin = len(weights)
        points = [*finite, origin]
        masses = [*(weights[row] for row in finite), 0.0]
        start = normalized(masses) if self.start == "mean" else [*([0.0] * len(finite)), 1.0]
        found = weiszfeld(measured[points][:, points], masses, start, self.nu, self.steps, self.tol)
        coefficients = dict(zip(points, found, strict=True))
        return [coefficients.get(row, 0.0) for row in range(len(weights))]


def weiszfeld(
    products: Matrix, weights: Sequence[float], start: Sequence[float], nu: float, steps: int, tol: float
) -> list[float]:
    """Return the coefficients of the geometric median of N points, which add up to 1.

    Args:
        products: inner products of the points, relative to any point that is not far from most; shape (N, N).
        weights: one for each point.
        start: coefficients to begin with, which add up to 1.
        nu: distance that smaller ones count as.
        steps: at most so many.
        tol: relative change of a distance to z at which the steps end.
    """
    current, reach = list(start), [0.0] * len(weights)
    for _ in range(steps):
        # Sums of products instead of a product of matrices: all machines have to come to the same bits.
        inner = [math.fsum(row) for row in (products * current).tolist()]
        square = math.fsum(one * coefficient for one, coefficient in zip(inner, current, strict=True))
        before = reach
        norms = products.diagonal().tolist()
        # Not from distances: that of a point at 10³⁰, times its small coefficient, would round all others away.
        squares = [norm - 2.0 * one + square for norm, one in zip(norms, inner, strict=True)]
        reach = [max(nu, math.sqrt(max(0.0, one))) for one in squares]
        current = normalized([weight / one for weight, one in zip(weights, reach, strict=True)])
        # Coefficients are no measure: that of a point at 10³⁰ is small long before it does no more harm.
        if all(abs(one - other) <= tol * one for one, other in zip(reach, before, strict=True)):
            break
    return current


def normalized(values: Sequence[float]) -> list[float]:
    """Return values divided by their sum.

    >>> normalized([1.0, 3.0])
    [0.25, 0.75]
    """
    total = math.fsum(values)
    return [value / total for value in values]
