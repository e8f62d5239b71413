"""Samplers choose the samples that a node draws, and their order.

A sampler is chosen in the configuration (``data.sampler``) and holds nothing but its fields. A node draws from a
``Draws``, a pure function of (run seed, node, position). So the position, a few numbers, is enough to go on in the
middle of an epoch. A round that is rolled back sets it to what it was and draws the same again.

One of one's own needs a class and a method::

    class Twice(Sampler):
        def order(self, num_samples, epoch, rng):
            return torch.randperm(num_samples // 2, generator=rng).repeat(2)  # the first half, twice
"""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch

from starling.actors.data.indices import Indices, Ranges, concrete
from starling.algorithms.errors import DataError, ProgramError
from starling.algorithms.registry import Part
from starling.algorithms.seeds import generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from starling.actors.data.samples import Samples


class Position(NamedTuple):
    """A position in a node's data: ``offset`` samples of epoch ``epoch``; of Poisson batches, ``offset`` batches."""

    epoch: int = 0
    offset: int = 0
    extra: int = 0
    """Samples drawn of others' parts that were handed to it (``actors.data.plans``), before its own go on."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels that seed random numbers at this position: two numbers, or three after extra samples."""
        return self if self.extra else (self.epoch, self.offset)


class Blocks(NamedTuple):
    """Blocks of samples that are read as a whole."""

    runs: Ranges
    """The blocks, ascending."""
    window: int
    """Number of blocks kept in memory."""


class Draws(ABC):
    """A node's draws from its samples.

    Args:
        indices: of the node's samples, int64, shape (n,), n at least 1.
        seed: of the run.
        node: whose they are.

    Raises:
        DataError: there are no samples.
    """

    min_batch = 1
    """Rests of fewer samples join the batch before them."""
    may_be_empty = False
    """Whether a batch without samples is one of its law, whose gradient is zero, and not the lack of a batch."""

    def __init__(self, indices: Indices, seed: int, node: int) -> None:
        if len(indices) == 0:
            raise DataError(f"data: node {node} has no samples to draw from")
        self._indices = indices
        self._seed = seed
        self._node = node
        self._position = Position()

    @property
    def indices(self) -> Indices:
        """The node's samples."""
        return self._indices

    @property
    def position(self) -> Position:
        """Position of the next draw; the offset is less than the number of samples."""
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        if position.epoch < 0 or not 0 <= position.offset < len(self._indices):
            raise ValueError(f"{position} is not a position in epochs of {len(self._indices)} samples")
        self._position = Position(position.epoch, position.offset)

    def next(self, batch_size: int) -> Tensor:
        """Draw the samples of the next batch."""
        return torch.from_numpy(self.draw(batch_size))

    @abstractmethod
    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """Draw the samples of the next batch as an array, not to be written to."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches in an epoch, the last and smaller one included."""
        return len(piece_sizes(len(self._indices), batch_size, self.min_batch))


def piece_sizes(count: int, size: int, least: int = 1) -> list[int]:
    """Return the sizes of batches of ``count`` samples: a rest of fewer than ``least`` joins the batch before it.

    >>> piece_sizes(9, 4), piece_sizes(9, 4, 2), piece_sizes(10, 4, 2), piece_sizes(1, 4, 2)
    ([4, 4, 1], [4, 5], [4, 4, 2], [1])
    """
    full, rest = divmod(count, size)
    sizes = [size] * full
    if full and 0 < rest < least:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def planned_samples(count: int, size: int, least: int) -> int:
    """Round ``count`` down to whole batches of ``size`` where ``piece_sizes`` lets the rest join the last batch."""
    rest = count % size
    return count - rest if count > size and rest < least else count


class Sampler(Part, family="sampler", catalog="starling.actors.data"):
    """Chooses the samples of a node's epochs."""

    def order(self, num_samples: int, epoch: int, rng: torch.Generator) -> Tensor:
        """Return the places, among the node's ``num_samples`` samples, that an epoch draws, in that order.

        Args:
            num_samples: that the node owns, n.
            epoch: counted from 0.
            rng: a pure function of (run seed, node, epoch).

        Returns:
            int64, shape (n,), values in [0, n): an epoch has as many draws as there are samples.
        """
        raise ProgramError(f"sampler {self.name}: define order(num_samples, epoch, rng), or begin")

    def begin(self, indices: Indices, seed: int, node: int, blocks: Blocks | None = None) -> Draws:
        """Return a node's draws from its first epoch on; ``blocks``: of samples that come in blocks."""
        del blocks
        return EpochSampler(indices, seed, node, self)


class Epoch(Sampler, name="epoch"):
    """Without replacement: each sample once per epoch, in an order of that epoch's own.

    Blocks of samples (Parquet row groups) are drawn in random order, and samples are mixed within a window of a few
    blocks. A node never holds more than one window.
    """

    def order(self, num_samples: int, epoch: int, rng: torch.Generator) -> Tensor:
        """A permutation."""
        del epoch
        return torch.randperm(num_samples, generator=rng)

    def begin(self, indices: Indices, seed: int, node: int, blocks: Blocks | None = None) -> Draws:
        if blocks is not None and len(indices):
            return BlockDraws(indices, seed, node, blocks)
        return EpochSampler(indices, seed, node, self)


class WithReplacement(Sampler, name="replacement"):
    """With replacement: every draw is any of the samples, each as likely; an epoch is as many draws as samples."""

    def order(self, num_samples: int, epoch: int, rng: torch.Generator) -> Tensor:
        """Uniform draws."""
        del epoch
        return torch.randint(num_samples, (num_samples,), generator=rng)


class Poisson(Sampler, name="poisson"):
    """Each sample is in a batch with probability q = batch size / n, independently: what DP accountants assume.

    Batches differ in size and may be empty: such a step has no gradient. Reference: Abadi et al., "Deep Learning with
    Differential Privacy", CCS 2016; amplification by it, Mironov et al., "Rényi Differential Privacy of the Sampled
    Gaussian Mechanism", 2019, arXiv:1908.10530.
    """

    @staticmethod
    def rate(num_samples: int, batch_size: int) -> float:
        """Return q, the probability of each sample.

        >>> Poisson.rate(1000, 50)
        0.05
        """
        return min(1.0, batch_size / num_samples)

    def begin(self, indices: Indices, seed: int, node: int, blocks: Blocks | None = None) -> Draws:
        del blocks
        return PoissonDraws(indices, seed, node)


class OrderedDraws(Draws):
    """Draws in an order that each epoch has."""

    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """Draw at most ``batch_size`` indices; fewer at an epoch's end, which no batch straddles."""
        epoch, start, _ = self._position
        rest = len(self._indices) - start - batch_size
        drawn = self.read(epoch, start, batch_size + rest if 0 < rest < self.min_batch else batch_size)
        stop = start + len(drawn)
        self._position = Position(epoch, stop) if stop < len(self._indices) else Position(epoch + 1)
        return drawn

    @abstractmethod
    def read(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        """Read at most ``count`` samples of an epoch's order from place ``start`` on; the position stays."""


class EpochSampler(OrderedDraws):
    """Draws in the order that a sampler gives each epoch, by default each sample once."""

    def __init__(self, indices: Indices, seed: int, node: int, sampler: Sampler | None = None) -> None:
        super().__init__(indices, seed, node)
        self._sampler = Epoch() if sampler is None else sampler
        self._order: tuple[int, NDArray[np.int64]] | None = None  # an epoch, and the samples in its order

    def read(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        return self._epoch(epoch)[start : start + count]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            size = len(self._indices)
            places = self._sampler.order(size, epoch, generator("epoch", self._seed, self._node, epoch))
            if type(self._sampler) is not Epoch:
                self._check(places)
            indices = self._indices
            chosen = indices[places].numpy() if isinstance(indices, Ranges) else indices.numpy()[places.numpy()]
            self._order = epoch, chosen
        return self._order[1]

    def _check(self, places: Tensor) -> None:
        size = len(self._indices)
        good = places.dtype == torch.int64 and places.shape == (size,)
        if not good or not 0 <= int(places.min()) <= int(places.max()) < size:
            raise ProgramError(
                f"the sampler {self._sampler.name} must give {size} places of shape [{size}], int64 in [0, {size}); it "
                f"gives {places.dtype} of shape {list(places.shape)}"
            )


class PoissonDraws(Draws):
    """Each sample with probability q, independently of all others and of all other batches."""

    may_be_empty = True

    def draw(self, batch_size: int) -> NDArray[np.int64]:
        """A batch of about ``batch_size`` samples in ascending places."""
        epoch, step, _ = self._position
        last = step + 1 >= self.steps_per_epoch(batch_size)
        self._position = Position(epoch + 1) if last else Position(epoch, step + 1)
        size = len(self._indices)
        rng = generator("poisson", self._seed, self._node, epoch, step)
        # float64: among 2²⁴ values of a float32 a small q would be rounded.
        chosen = torch.rand(size, generator=rng, dtype=torch.float64) < Poisson.rate(size, batch_size)
        return self._indices[chosen.nonzero().flatten()].numpy()


class BlockDraws(OrderedDraws):
    """Each sample once per epoch, block by block: a window of a few blocks at a time, mixed with one another.

    Blocks come in an order of that epoch's own. The order of one window is kept, whatever the epoch's size.
    """

    def __init__(self, indices: Indices, seed: int, node: int, blocks: Blocks) -> None:
        super().__init__(indices, seed, node)
        self._window = blocks.window
        self._members = _by_block(indices, blocks.runs)
        self._plan: tuple[int, list[int], list[int]] | None = None  # an epoch, its order of blocks, where windows end
        self._order: tuple[int, int, Tensor] | None = None  # an epoch, a window, and the samples in its order

    def read(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        order, ends = self._planned(epoch)
        window = bisect.bisect_right(ends, start)
        pieces: list[Tensor] = []
        while count and window < len(ends):
            begin = ends[window - 1] if window else 0
            pieces.append(self._mixed(epoch, window, order)[start - begin :][:count])
            start += len(pieces[-1])
            count -= len(pieces[-1])
            window += 1
        return torch.cat(pieces).numpy()

    def _planned(self, epoch: int) -> tuple[list[int], list[int]]:
        if self._plan is None or self._plan[0] != epoch:
            rng = generator("blocks", self._seed, self._node, epoch)
            order: list[int] = torch.randperm(len(self._members), generator=rng).tolist()
            ends = list(itertools.accumulate(len(self._members[block]) for block in order))
            self._plan = epoch, order, [*ends[self._window - 1 : -1 : self._window], ends[-1]]
        return self._plan[1], self._plan[2]

    def _mixed(self, epoch: int, window: int, order: list[int]) -> Tensor:
        if self._order is None or self._order[:2] != (epoch, window):
            blocks = order[window * self._window : (window + 1) * self._window]
            members = torch.cat([concrete(self._members[block]) for block in blocks])
            rng = generator("window", self._seed, self._node, epoch, window)
            self._order = epoch, window, members[torch.randperm(len(members), generator=rng)]
        return self._order[2]


def blocks_of(samples: Samples) -> Blocks | None:
    """The blocks of samples that come in blocks."""
    runs: Ranges | None = getattr(samples, "runs", None)
    return None if runs is None else Blocks(runs, getattr(samples, "window", 1))


def _by_block(indices: Indices, runs: Ranges) -> list[Indices]:
    """A node's samples block by block, without those that have none."""
    if isinstance(indices, Ranges):
        return [Ranges([run]) for run in indices.runs()]
    ordered = indices.sort().values
    bounds = torch.searchsorted(ordered, runs.stops[:-1])
    return [piece for piece in ordered.tensor_split(bounds) if len(piece)]
