"""Krum and Multi-Krum: the contributions whose nearest neighbours are nearest.

    s_i = Σ of the k smallest ‖x_i - x_j‖², j ≠ i          result = mean of the m contributions with the least s_i

Among equal scores the one of the lowest node comes first. Weights are ignored. A contribution that is not finite is
left out and counts as one of the f.

Deviations: k = n - f - 1, the number of other honest nodes, and n ≥ 2f + 1, as in later work (ByzFL); ``neighbors:
n-f-2`` is the paper's score, for which it asks for n ≥ 2f + 3.
Reference: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
arXiv:1703.02757.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveInt

from starling.algorithms.aggregators.gram import GramAggregator, Matrix, finite_rows, squared_distances

if TYPE_CHECKING:
    from collections.abc import Sequence


class Krum(GramAggregator, name="krum"):
    """The contribution with the least sum of squared distances to its nearest neighbours; weights are ignored.

    >>> import torch
    >>> rows = [torch.tensor([value]) for value in (1.0, 1.5, 2.25, 3.25, 99.0)]
    >>> Krum(f=1).combine(rows, [1.0] * 5).item()
    2.25
    """

    f: NonNegativeInt = 1  # contributions that may be dishonest
    neighbors: Literal["n-f-1", "n-f-2"] = "n-f-1"  # k, distances that count

    @property
    def least(self) -> int:
        return self._least(self.f)

    def _least(self, f: int) -> int:
        return 2 * f + (1 if self.neighbors == "n-f-1" else 3)

    def num_chosen(self, num_honest: int) -> int:
        """Return m, the number of contributions whose mean is the result, at most ``num_honest``, n - f."""
        return min(1, num_honest)

    def weigh(self, measured: Matrix, weights: Sequence[float], own: int | None = None) -> list[float]:
        del own
        finite = finite_rows(measured)
        f = max(0, self.f - (len(weights) - len(finite)))
        if len(finite) < self._least(f):
            return [math.nan] * len(weights)
        distances = squared_distances(measured)
        count = len(finite) - f - (1 if self.neighbors == "n-f-1" else 2)
        scores: list[tuple[float, int]] = []
        for row in finite:
            nearest = sorted(float(distances[row, other]) for other in finite if other != row)
            scores.append((math.fsum(nearest[:count]), row))
        chosen = {row for _, row in sorted(scores)[: self.num_chosen(len(finite) - f)]}
        return [1.0 / len(chosen) if row in chosen else 0.0 for row in range(len(weights))]


class MultiKrum(Krum, name="multi_krum"):
    """The mean of the m contributions with the least sums of squared distances to their nearest; weights are ignored.

    >>> import torch
    >>> rows = [torch.tensor([value]) for value in (1.0, 1.5, 2.25, 3.25, 99.0)]
    >>> MultiKrum(f=1, m=2).combine(rows, [1.0] * 5).item()
    1.875
    """

    m: PositiveInt | None = None  # contributions that are averaged, at most n - f; null: n - f

    def num_chosen(self, num_honest: int) -> int:
        return num_honest if self.m is None else min(self.m, num_honest)
