"""Samplers: in which order a node draws its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from algorithms.errors import DataError
from algorithms.seeds import generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Position(NamedTuple):
    """How far a node has read: ``offset`` samples of epoch ``epoch``."""

    epoch: int = 0
    offset: int = 0


class EpochSampler:
    """Draws without replacement: each sample once per epoch, in an order of that epoch's own.

    The order is a pure function of (seed, node, epoch), so the position is the whole state: a round that is rolled
    back sets it to what it was and draws the same samples again.
    """

    def __init__(self, indices: Tensor, seed: int, node: int) -> None:
        if len(indices) == 0:
            raise DataError(f"data: node {node} has no samples to draw from")
        self._indices = indices
        self._seed = seed
        self._node = node
        self._position = Position()
        self._order: tuple[int, NDArray[np.int64]] | None = None  # an epoch, and the samples in its order

    @property
    def indices(self) -> Tensor:
        """The node's samples, int64, shape (n,)."""
        return self._indices

    @property
    def position(self) -> Position:
        """Where the next draw begins; the offset is less than the number of samples."""
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        if position.epoch < 0 or not 0 <= position.offset < len(self._indices):
            raise ValueError(f"{position} is not a position in epochs of {len(self._indices)} samples")
        self._position = position

    def next(self, batch_size: int) -> Tensor:
        """The next at most ``batch_size`` indices; fewer at an epoch's end, which no batch straddles."""
        return torch.from_numpy(self.draw(batch_size))

    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """The same as an array, for those who draw for many nodes and put the arrays together; not to be written to."""
        epoch, start = self._position
        order = self._epoch(epoch)
        stop = start + batch_size
        self._position = Position(epoch, stop) if stop < len(order) else Position(epoch + 1)
        return order[start:stop]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches that one epoch gives, the last and smaller one included."""
        return -(-len(self._indices) // batch_size)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self._indices), generator=generator("epoch", self._seed, self._node, epoch))
            self._order = epoch, self._indices.numpy()[order.numpy()]
        return self._order[1]
