"""Indices: a node's samples as one tensor, or as runs of consecutive numbers where they are too many for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable


class Ranges:
    """Runs of consecutive indices, in the order given: the rows of Parquet row groups, say.

    A hundred million rows in a thousand runs take 16 KB; as a tensor they would take 800 MB, in every process.
    """

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        pairs = torch.tensor([(start, stop) for start, stop in runs], dtype=torch.int64).view(-1, 2)
        self.starts, self.stops = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
        sizes = self.stops - self.starts
        if len(sizes) and int(sizes.min()) < 1:
            raise ValueError("a run of indices cannot be empty")
        self._ends = sizes.cumsum(0)
        self._before = self._ends - sizes

    def __len__(self) -> int:
        """Indices in all runs together."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, places: Tensor) -> Tensor:
        """The indices at ``places``, int64 in [0, len), of any shape.

        >>> Ranges([(10, 12), (0, 3)])[torch.tensor([0, 1, 2, 4])].tolist()
        [10, 11, 0, 2]
        """
        run = torch.searchsorted(self._ends, places, right=True)
        return self.starts[run] + places - self._before[run]

    def runs(self) -> list[tuple[int, int]]:
        """The runs as pairs of the first index and the one behind the last."""
        return list(zip(self.starts.tolist(), self.stops.tolist(), strict=True))


Indices: TypeAlias = "Tensor | Ranges"
"""Sample indices, as a tensor or as ranges: both have a length, and subscripting gives the indices at positions."""


def concrete(indices: Indices) -> Tensor:
    """All of them as one tensor, int64."""
    return indices if isinstance(indices, Tensor) else indices[torch.arange(len(indices))]
