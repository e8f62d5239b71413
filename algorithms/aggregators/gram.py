"""Aggregators that compare whole contributions: a Gram matrix is measured part by part, and gives each a coefficient.

    G = Σ_parts (X - r)(X - r)ᵀ          c = weigh(G, w)          result = Σ_i c_i x_i

X has a row for each contribution and, last, the origin. Each block of columns has a reference row r of its own, which
changes no distance: ‖x_i - x_j‖² = G_ii + G_jj - 2 G_ij, and ‖x_i‖ is the distance to the origin. Without r, rows with
a large common offset would differ only in digits that the products have not got.

r is the row whose norm in the block is in the middle. The mean, or a row of fixed place, would let a single dishonest
node set r to 10³⁰ and thereby round all other rows to one. So most rows being honest, r is no longer than some of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from starling.algorithms.aggregators.base import BLOCK, Aggregator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.algorithms.codecs import Codec

Matrix: TypeAlias = NDArray[np.float64]

_COLUMNS = 8192
"""Of a block: twenty float64 rows of it stay in a core's cache."""


class GramAggregator(Aggregator):
    """Combines contributions linearly, with coefficients that depend on all coordinates of all contributions.

    An exchange with such an aggregator has one step more: each part is measured, and the measures are added up in the
    order of the parts, before any part is reduced. A contribution that is not finite has the coefficient 0.
    """

    bears_nan: ClassVar[bool] = True

    def measure(self, contributions: Sequence[Tensor]) -> Matrix:
        """Return one part's measure of N contributions, each of shape (n,): by default ``gram``, shape (N + 1, N + 1).

        The sum over the parts has to be the measure of whole contributions. An override may return any float64 matrix
        of that shape, or several, shape (k, N + 1, N + 1).
        """
        wide = (torch.float32, torch.float64)
        return gram([(one if one.dtype in wide else one.to(torch.float32)).numpy() for one in contributions])

    def measured_nbytes(self, num_contributions: int) -> int:
        return 8 * (num_contributions + 1) ** 2

    @abstractmethod
    def weigh(self, measured: Matrix, weights: Sequence[float], own: int | None = None) -> list[float]:
        """Return the coefficient of each of the N contributions in their combination.

        Every member that reduces a part computes this, on whatever machine, and all must come to the same bits. So add
        with ``math.fsum``: ``sum`` of numpy or torch, and products of matrices, add in an order that depends on the
        machine.

        Args:
            measured: sum of ``measure`` over all parts.
            weights: one for each contribution.
            own: place of the caller's own contribution; ``None`` in an ``AllReduce``, which has one result for all.
        """

    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Add up contributions in the order given; ``weights`` are the coefficients, and NaN makes the result NaN."""
        used = [(one, weight) for one, weight in zip(contributions, weights, strict=True) if weight != 0.0]
        product = torch.empty(min(BLOCK, out.numel()), dtype=out.dtype)
        for start in range(0, out.numel(), BLOCK):
            block = out[start : start + BLOCK].zero_()
            for values, weight in used:
                # Rounded apart, as in the mean: a fused multiply-add depends on where an exchange was cut.
                scaled = torch.mul(values[start : start + BLOCK].to(out.dtype), weight, out=product[: block.numel()])
                block.add_(scaled)

    def combine(self, contributions: Sequence[Tensor], weights: Sequence[float], own: int | None = None) -> Tensor:
        """Return the combination of whole contributions, each of shape (n,), for programs that hold them all.

        ``own`` is the place of the caller's own contribution, for rules that measure from there.
        """
        first = contributions[0]
        out = torch.empty(first.numel(), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
        self.reduce(contributions, self.weigh(self.measure(contributions), weights, own), out)
        return out.to(first.dtype)


def gram(rows: Sequence[NDArray[Any]]) -> Matrix:
    """Return inner products of N rows and, last, of the origin, relative to a reference row; shape (N + 1, N + 1).

    The products of a row that is not finite are not finite, and those of others do not depend on it.
    """
    count, size = len(rows), rows[0].size
    total = np.zeros((count + 1, count + 1))
    scratch = np.empty((count + 1, min(size, _COLUMNS)))
    with np.errstate(all="ignore"):
        for start in range(0, size, _COLUMNS):
            pieces = [row[start : start + _COLUMNS] for row in rows]
            block = scratch[:, : pieces[0].size]
            block[count] = 0.0
            for place, piece in enumerate(pieces):
                block[place] = piece
            block -= block[_middle(pieces)].copy()
            total += block @ block.T  # numpy sees that both are one, and halves the work
    return total


def _middle(rows: Sequence[NDArray[Any]]) -> int:
    """Return the place of the finite row whose norm is in the middle; if there is none, of the last, the origin."""
    norms = sorted((norm, place) for place, row in enumerate(rows) if math.isfinite(norm := float(np.dot(row, row))))
    return norms[(len(norms) - 1) // 2][1] if norms else len(rows)


def finite_rows(measured: Matrix) -> list[int]:
    """Return the places of the contributions that are finite, in order.

    >>> finite_rows(np.diag([1.0, math.nan, 2.0, 0.0]))
    [0, 2]
    """
    return [place for place in range(len(measured) - 1) if math.isfinite(measured[place, place])]


def squared_distances(measured: Matrix) -> Matrix:
    """Return ‖x_i - x_j‖² of a ``gram``, the origin being the last row; infinite where a row is not finite."""
    norms = measured.diagonal()
    with np.errstate(all="ignore"):
        distances = np.maximum(norms[:, None] + norms[None, :] - 2.0 * measured, 0.0)
    distances[~np.isfinite(distances)] = np.inf
    np.fill_diagonal(distances, 0.0)
    return distances


def refuse_hidden(aggregator: Aggregator, codec: Codec) -> None:
    """Refuse a codec that hides single contributions from an aggregator that compares them.

    Raises:
        ValueError: says which parts would do.
    """
    if codec.hides_contributions and isinstance(aggregator, GramAggregator):
        text = f"aggregator: {aggregator.name} compares contributions, and codec {codec.name} hides them"
        raise ValueError(f"{text}; take codec identity, or mean")
