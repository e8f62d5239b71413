"""Sorting networks: a few tensors, sorted against one another coordinate by coordinate.

``torch.sort`` along the short side of a stack costs ten times as much as the compare-exchanges of a network (16 rows of
float32: 380 against 27 ns a coordinate, one core). Each compare-exchange is a minimum and a maximum of two whole rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from starling.algorithms.aggregators.base import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Above, the n·log²n exchanges of a network lose against numpy's sort.
_MAX_NETWORK = 96

# Values that are sorted at once, at most: 8 MiB of float32.
_MAX_SCRATCH = 2 * 1024 * 1024


class Comparator(NamedTuple):
    """Put the smaller of two rows first; a side that nobody reads afterwards is left as it is."""

    first: int
    second: int
    needs_first: bool
    needs_second: bool


@functools.lru_cache(maxsize=256)
def network(num_rows: int, wanted: range) -> tuple[Comparator, ...]:
    """Return Batcher's merge-exchange network, cut down to the comparisons that the places ``wanted`` depend on.

    Reference: Knuth, "The Art of Computer Programming", vol. 3, 2nd ed., algorithm 5.2.2M.
    """
    pairs: list[tuple[int, int]] = []
    top = step = (1 << max(num_rows - 1, 0).bit_length()) >> 1  # the largest power of two below num_rows
    while step:
        distance, remainder, size = step, 0, top
        while True:
            pairs += [(row, row + distance) for row in range(num_rows - distance) if row & step == remainder]
            if size == step:
                break
            distance, remainder, size = size - step, step, size >> 1
        step >>= 1
    needed = set(wanted)
    kept: list[Comparator] = []
    for first, second in reversed(pairs):
        if first in needed or second in needed:
            kept.append(Comparator(first, second, first in needed, second in needed))
            needed |= {first, second}
    return tuple(reversed(kept))


def blocks(num_values: int, num_rows: int) -> Iterator[slice]:
    """Return cuts of ``num_values`` whose rows fit into a cache, and many rows into memory."""
    size = min(BLOCK, max(1, _MAX_SCRATCH // num_rows))
    for start in range(0, num_values, size):
        yield slice(start, min(start + size, num_values))


def load(contributions: Sequence[Tensor], here: slice, dtype: torch.dtype) -> list[Tensor]:
    """Copies of the values at ``here`` with a total order, in ``dtype``: NaN becomes +∞, and −0 becomes 0."""
    rows = torch.empty(len(contributions), here.stop - here.start, dtype=dtype)
    for row, values in zip(rows, contributions, strict=True):
        # Which of two zeros is the smaller differs between a vector loop and its tail, so the sign of a zero would
        # depend on where an exchange was cut; and NaN, once in an exchange, would spread to values that are fine.
        torch.add(values[here], 0.0, out=row)
        row.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return list(rows.unbind())


def sort(rows: list[Tensor], wanted: range) -> list[Tensor]:
    """Return the sorted rows at the places ``wanted``; all rows may be overwritten.

    Args:
        rows: from ``load``, each of shape (n,).
        wanted: places in the ascending order.
    """
    if len(rows) > _MAX_NETWORK:
        stacked = torch.stack(rows)
        stacked.numpy().sort(axis=0)  # in place; values that compare equal are the same bits
        return [stacked[place] for place in wanted]
    spare = torch.empty_like(rows[0])
    for first, second, needs_first, needs_second in network(len(rows), wanted):
        low, high = rows[first], rows[second]
        if not needs_second:
            torch.minimum(low, high, out=low)
        elif not needs_first:
            torch.maximum(low, high, out=high)
        else:
            torch.minimum(low, high, out=spare)
            torch.maximum(low, high, out=high)
            rows[first], spare = spare, low
    return [rows[place] for place in wanted]
