"""Sampling plans: ranges of absent nodes' parts that a node draws besides its own part, or instead of it.

The order of a part in an epoch is a pure function of (run seed, part, epoch), so a range of it names exact samples
without sending one index. The controller (``orchestrator.protocol.sample_ledger``) hands such ranges out; a node draws
those that it was handed first, then goes on with its own part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from starling.actors.data.samplers import Draws, Position

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from starling.actors.data.indices import Indices


class Segment(NamedTuple):
    """Places ``start`` … ``stop`` - 1 of the order in which part ``part`` is drawn in epoch ``epoch``."""

    part: int
    epoch: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start


class Place(NamedTuple):
    """A node's sampling plan and its position in it."""

    extras: tuple[Segment, ...] = ()
    """Before its own part goes on."""
    position: Position = Position()
    """Position whose ``extra`` counts from the begin of ``extras``."""

    @staticmethod
    def of(extras: Sequence[Sequence[int]], position: Sequence[int]) -> Place:
        """Read a plan from plain JSON.

        >>> Place.of([[0, 1, 2, 3]], [1, 0]).extras[0].size
        1
        """
        return Place(tuple(Segment(*one) for one in extras), Position(*position))


class Order(Protocol):
    """The order of a part's epochs, drawn without replacement."""

    def read(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        """Read at most ``count`` samples of an epoch's order from place ``start`` on; the position stays."""
        ...


class PlannedDraws(Draws):
    """Draws first from ranges of other nodes' parts that the node was handed, then from its own.

    A batch may span several ranges, but not what comes after the last of them, as none straddles an epoch's end. A node
    without a part of its own has empty batches when nothing is left.

    Args:
        own: of its own part; ``None``: it has none.
        indices: of the samples that it counts as its own.
        seed: of the run.
        node: whose they are.
        order_of: gives the order of a part.
    """

    def __init__(
        self, own: Draws | None, indices: Indices, seed: int, node: int, order_of: Callable[[int], Order]
    ) -> None:
        super().__init__(indices, seed, node)
        self._own, self._order_of = own, order_of
        self._extras: tuple[Segment, ...] = ()
        self._extra = 0
        self._open: tuple[int, Order] | None = None
        """The part that was read last: of one at a time the order is kept."""

    @property
    def own(self) -> Draws | None:
        """Draws from the node's own part; ``None`` if it has none."""
        return self._own

    @property
    def extras(self) -> tuple[Segment, ...]:
        """Ranges of other nodes' parts that the node was handed."""
        return self._extras

    def plan(self, place: Place) -> None:
        """Draw as ``place`` says from now on."""
        self._extras = place.extras
        self.position = place.position

    @property
    def position(self) -> Position:
        """Position of the next draw."""
        epoch, offset, _ = self._position if self._own is None else self._own.position
        return Position(epoch, offset, self._extra)

    @position.setter
    def position(self, position: Position) -> None:
        if not 0 <= position.extra <= sum(one.size for one in self._extras):
            raise ValueError(f"{position} is not a position in {self._extras}")
        if self._own is not None:
            self._own.position = Position(position.epoch, position.offset)
        self._extra = position.extra

    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """Draw at most ``batch_size`` indices."""
        pieces: list[NDArray[np.int64]] = []
        left = sum(one.size for one in self._extras) - self._extra
        if 0 < left - batch_size < self.min_batch:
            batch_size = left
        # Too few by themselves: they are drawn with its own, or not yet.
        joins_own = 0 < left < self.min_batch
        if joins_own and self._own is None:
            return np.empty(0, dtype=np.int64)
        whole = batch_size
        skipped = self._extra
        for one in self._extras:
            start = one.start + skipped
            skipped = max(0, skipped - one.size)
            if start < one.stop and batch_size:
                pieces.append(self._order(one.part).read(one.epoch, start, min(batch_size, one.stop - start)))
                batch_size -= len(pieces[-1])
                self._extra += len(pieces[-1])
        if joins_own and self._own is not None:
            pieces.append(self._own.draw(whole))
        if pieces:
            return np.concatenate(pieces)
        return np.empty(0, dtype=np.int64) if self._own is None else self._own.draw(batch_size)

    def _order(self, part: int) -> Order:
        if self._open is None or self._open[0] != part:
            self._open = part, self._order_of(part)
        return self._open[1]
