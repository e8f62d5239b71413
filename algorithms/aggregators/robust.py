"""Robust aggregators: the coordinate-wise median and trimmed mean.

A NaN counts as +∞, coordinate by coordinate, so that a node that sends NaN does no more harm than a node that sends
huge values. The result is not finite only where too many values are not. Whole contributions with a NaN cannot be left
out here: a part of an exchange does not show what is in the others.

References: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
arXiv:1803.01498, definitions 1 and 2 (``trim`` is their βm).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from starling.algorithms.aggregators.base import Aggregator
from starling.algorithms.aggregators.sorting import blocks, load, sort
from starling.algorithms.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Median(Aggregator, name="median"):
    """The median of each coordinate; with unequal weights the weighted median.

    Let x₍₁₎ ≤ … ≤ x₍ₙ₎ be the sorted values, W_k = w₍₁₎ + … + w₍ₖ₎ and W = Wₙ. The result is the mean of the lower
    weighted median, the first x₍ₖ₎ with W_k ≥ W/2, and the upper one, the first with W_k > W/2. The two differ only
    where the weight is divided exactly in two (sums in float64). So equal weights give the usual median: the value in
    the middle, or the mean of the two in the middle. Nodes can claim any weight: against dishonest ones let all
    contribute with weight 1.

    >>> import torch
    >>> out = torch.empty(1)
    >>> Median().reduce([torch.tensor([1.0]), torch.tensor([7.0]), torch.tensor([9.0])], [1.0, 1.0, 2.0], out)
    >>> out.item()  # half of the weight lies up to 7, half from 9 on
    8.0
    """

    bears_nan: ClassVar[bool] = True

    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        count = len(contributions)
        middle = range((count - 1) // 2, count // 2 + 1)
        equal = all(weight == weights[0] for weight in weights)
        for here in blocks(out.numel(), count):
            rows = load(contributions, here, out.dtype)
            if equal:
                inner = sort(rows, middle)
                lower, upper = inner[0], inner[-1]
            else:
                lower, upper = _weighted_medians(rows, weights)
            if lower is upper:
                out[here].copy_(lower)
            else:
                torch.add(lower, upper, out=out[here]).div_(2.0)


def _weighted_medians(rows: list[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper weighted median, each of shape (n,)."""
    values, order = torch.stack(rows, dim=1).sort(dim=1, stable=True)
    sums = torch.tensor(weights, dtype=torch.float64)[order].cumsum(dim=1)
    half = torch.full((len(values), 1), sum(weights) / 2, dtype=torch.float64)
    # Clamped: the sums are rounded, and the last one may come out below a half that is nearly all of one weight.
    lower = torch.searchsorted(sums, half).clamp_(max=len(rows) - 1)
    upper = torch.searchsorted(sums, half, right=True).clamp_(max=len(rows) - 1)
    return values.gather(1, lower).squeeze(1), values.gather(1, upper).squeeze(1)


class TrimmedMean(Aggregator, name="trimmed_mean"):
    """The mean of each coordinate without its f smallest and f largest values; weights are ignored.

    The values that remain are added up in ascending order. A fraction fits any number of contributions, but trims
    nothing where it makes less than one.

    >>> import torch
    >>> out = torch.empty(1)
    >>> TrimmedMean(trim=1).reduce([torch.tensor([x]) for x in (3.0, 1.0, 99.0, 2.0)], [1.0] * 4, out)
    >>> out.item()
    2.5
    """

    bears_nan: ClassVar[bool] = True

    trim: NonNegativeInt | Annotated[float, Field(ge=0, lt=0.5)] = 1  # f; below 1 the fraction f/n, f rounded down

    @property
    def least(self) -> int:
        return 1 if isinstance(self.trim, float) else 2 * self.trim + 1

    def num_trimmed(self, num_contributions: int) -> int:
        """Return f, the number of values that are left out at each end.

        Raises:
            SettingsError: nothing would remain.
        """
        if isinstance(self.trim, float):
            # Rounded: 0.29 · 100 is 28.999999999999996 in floating point, and must not become 28.
            return min(math.floor(round(self.trim * num_contributions, 9)), (num_contributions - 1) // 2)
        if 2 * self.trim >= num_contributions:
            text = (
                f"trimmed_mean with trim {self.trim} needs {2 * self.trim + 1} contributions, got {num_contributions}"
            )
            message = f"{text}; lower trim, or give it as a fraction of the contributions (0.2)"
            raise SettingsError(message)
        return self.trim

    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        count = len(contributions)
        trim = self.num_trimmed(count)
        kept = range(trim, count - trim)
        for here in blocks(out.numel(), count):
            first, *rest = sort(load(contributions, here, out.dtype), kept)
            block = out[here].copy_(first)
            for values in rest:
                block.add_(values)
            block.div_(len(kept))
