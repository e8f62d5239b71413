"""The aggregator interface, and the means."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

# Large sums run in blocks that stay in a core's cache: each block of the output is read and written once per
# contribution there, and not in main memory.
BLOCK = 32_768


class Aggregator(Part, family="aggregator", catalog="starling.algorithms.aggregators"):
    """Combines the contributions of several nodes, coordinate by coordinate.

    A large exchange is cut into parts that different members reduce, so the result of a coordinate must not depend
    on any other coordinate, nor on where the cuts are. What depends on whole contributions is a ``GramAggregator``.
    """

    bears_nan: ClassVar[bool] = False
    """Whether contributions that are not finite do no more harm than large ones; else no node may give such."""

    @property
    def least(self) -> int:
        """Return the least number of contributions that this aggregator combines."""
        return 1

    def measured_nbytes(self, num_contributions: int) -> int:
        """Return the bytes of the measure of one part; 0: contributions are combined without one."""
        del num_contributions
        return 0

    @abstractmethod
    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        """Combine ``contributions``, each of shape (n,), in the order given, into ``out``, shape (n,).

        Args:
            contributions: in canonical (sorted ``NodeId``) order; not to be written to.
            weights: one per contribution.
            out: float32, or float64 when the contributions are.
        """


class Mean(Aggregator, name="mean"):
    """The weighted mean, Σ wᵢ xᵢ / Σ wᵢ, added up in the order of the members. NaN and infinities stay.

    >>> import torch
    >>> out = torch.empty(2)
    >>> Mean().reduce([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])], [2.0, 1.0], out)
    >>> out.tolist()
    [2.0, 4.0]
    """

    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        _mean(contributions, weights, out)


class Uniform(Aggregator, name="uniform"):
    """The mean that ignores the weights, Σ xᵢ / n, added up in the order of the members. NaN and infinities stay.

    >>> import torch
    >>> out = torch.empty(1)
    >>> Uniform().reduce([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, 1.0], out)
    >>> out.tolist()
    [2.5]
    """

    def reduce(self, contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
        _mean(contributions, [1.0] * len(contributions), out)


def _mean(contributions: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    total = sum(weights)
    plain = all(weight == 1.0 for weight in weights)
    first, *rest = contributions
    scratch = None if plain else torch.empty(min(BLOCK, out.numel()), dtype=out.dtype)
    for start in range(0, out.numel(), BLOCK):
        here = slice(start, min(start + BLOCK, out.numel()))
        block = out[here]
        if plain:
            block.copy_(first[here])
            for values in rest:
                block.add_(values[here].to(out.dtype))
        else:
            assert scratch is not None
            product = scratch[: block.numel()]
            torch.mul(first[here].to(out.dtype), weights[0], out=block)
            for values, weight in zip(rest, weights[1:], strict=True):
                # Product and sum are rounded apart, on purpose: a fused multiply-add is used by torch in vector
                # loops but not in their tails, so the last bit would depend on where an exchange was cut.
                torch.mul(values[here].to(out.dtype), weight, out=product)
                block.add_(product)
        if total != 1.0:
            block.div_(total)
