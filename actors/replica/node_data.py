"""A node's data: the samples that it draws, and its position in them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from starling.actors.data import Epoch, PlannedDraws, Position, blocks_of
from starling.actors.data.generators import seeded
from starling.actors.replica.spec import NOT_STARTED
from starling.actors.tasks import TensorSamples
from starling.actors.training.blame import non_finite, non_finite_of
from starling.algorithms.api import SERVER
from starling.algorithms.errors import DataError, ProgramError
from starling.algorithms.rules import DataBatch
from starling.algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from starling.actors.data import Draws, Indices, Place, Sampler, Segment
    from starling.actors.data.plans import Order
    from starling.actors.replica.spec import ReplicaSpec
    from starling.actors.tasks import Samples
    from starling.actors.training.workbench import Workbench
    from starling.algorithms.api import Batch, NodeId

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class DataSource:
    """The data sets of a run, and one node's share of them."""

    train: Samples
    """The training data of all nodes."""
    indices: Indices
    """The node's training samples, int64, shape (n,)."""
    sampler: Sampler = field(default_factory=Epoch)
    parts: Sequence[Indices] | None = None
    """The training samples of every node, if the process knows them."""
    validation: Samples | None = None
    """The held-out data, if the process has them."""


class NodeData:
    """Draws a node's training samples, and keeps the position of the next draw.

    Args:
        node: whose data they are; the server has none.
        spec: of the run.
        bench: gives samples the form that the module takes.
        source: where they come from.

    Raises:
        DataError: the node has fewer samples than a batch needs.
    """

    def __init__(self, node: NodeId, spec: ReplicaSpec, bench: Workbench, source: DataSource) -> None:
        self._node, self._spec, self._bench = node, spec, bench
        self._round = NOT_STARTED
        self.samples, self.parts, self.validation = source.train, source.parts, source.validation
        self._present: Callable[[Tensor], Tensor] | None = getattr(source.train, "present", None)
        self.num_samples = len(source.indices)
        """Samples that the node owns; without any of its own, those that it was handed, at least 1."""
        self._sampler = source.sampler
        self._draws: Draws | None = None
        if node != SERVER:
            self._draws = source.sampler.begin(source.indices, spec.seed, node, blocks_of(source.train))
            self._draws.min_batch = spec.min_batch
            if 0 < self.num_samples < spec.min_batch:
                few = f"{self.num_samples} samples, fewer than data.min_batch ({spec.min_batch})"
                raise DataError(f"data: node {node} has {few}; lower that, or give it more by data.partition")
        self.num_drawn = 0
        """Training samples drawn since the last commit, those of rounds that were given up too.

        Without those that a task leaves out because they cannot be read."""
        self.num_void = 0
        """Training samples drawn since the last commit, in rounds that were given up."""
        self._latest: tuple[DataBatch, Tensor] | None = None
        """The batch that was drawn last by itself, and the indices of its samples."""
        self._counts: dict[tuple[str | int, ...], int] = {}
        """Index of the round's latest draw from each part, counted from 0."""

    def begin(self, number: int) -> None:
        """Enter round ``number``."""
        self._round, self._counts = number, {}
        self.num_void = self.num_drawn

    # --- the node's own samples --------------------------------------------------------------------------------------

    def own(self, operation: str) -> Draws:
        """Return the node's draws from its own samples.

        Raises:
            ProgramError: the server awaits ``operation``, and has no data.
        """
        if self._draws is None:
            raise ProgramError(f"the server has no training data: it can await no {operation} on its own")
        return self._draws

    def draw(self, size: int) -> NDArray[np.int64]:
        """Draw the samples of an optimizer step of ``size``; return their indices."""
        drawn = self.own("Train").draw(size)
        drawn = drawn if self._present is None else self._present(torch.from_numpy(drawn)).numpy()
        self.num_drawn += len(drawn)
        return drawn

    def take(self, indices: Tensor) -> Tensor:
        """Count samples as drawn; return the indices of those that can be read, as a task may leave out others."""
        indices = indices if self._present is None else self._present(indices)
        self.num_drawn += len(indices)
        return indices

    def load(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Load training samples by index, as the module takes them."""
        return self._bench.loss.drawn(self.samples, indices)

    @property
    def position(self) -> Position:
        """Position of the node's next draw from its own samples."""
        return Position() if self._draws is None else self._draws.position

    @position.setter
    def position(self, position: Position) -> None:
        if self._draws is not None:
            self._draws.position = position

    # --- plans -------------------------------------------------------------------------------------------------------

    @property
    def extras(self) -> tuple[Segment, ...]:
        """Ranges of other nodes' parts that the node was handed."""
        return self._draws.extras if isinstance(self._draws, PlannedDraws) else ()

    def plan(self, place: Place) -> None:
        """Follow a new sampling plan from now on; the process has to know all parts."""
        draws = self.own("plan")
        if not isinstance(draws, PlannedDraws):
            own = draws if self._node < len(self.parts or ()) else None
            draws = PlannedDraws(own, draws.indices, self._spec.seed, self._node, self._order_of)
            draws.min_batch = self._spec.min_batch
            self._draws = draws
        draws.plan(place)
        if draws.own is None:
            self.num_samples = max(1, sum(one.size for one in place.extras))

    def _order_of(self, part: int) -> Order:
        assert self.parts is not None
        # The law of a plan is that of an epoch, which is without replacement.
        draws = self._sampler.begin(self.parts[part], self._spec.seed, part, blocks_of(self.samples))
        return cast("Order", draws)

    # --- single batches ----------------------------------------------------------------------------------------------

    def batch(self, operation: Batch) -> DataBatch:
        """Carry out ``Batch``.

        Raises:
            ProgramError: there is no such data, or the size is not positive.
        """
        size = self._spec.samples_per_step if operation.size is None else operation.size
        if size < 1:
            raise ProgramError(f"Batch takes a size of at least 1; got {size}")
        if operation.source == "validation":
            return self._validation_batch(operation, size)
        indices, labels = self._chosen(operation, size)
        with self._seeded_for_load(*labels):
            indices = self.take(indices)
            batch = DataBatch(self.load(indices), len(indices))
        self._latest = batch, indices
        return batch

    def _validation_batch(self, operation: Batch, size: int) -> DataBatch:
        if operation.part is not None or self.validation is None:
            why = "this process has no held-out data" if self.validation is None else "held-out data have no parts"
            raise ProgramError(f"Batch(source='validation', part={operation.part}): {why}")
        places = self._choose(("validation",), len(self.validation), size)
        with self._seeded_for_load("validation", self._round, self._counts["validation",]):
            tensors = self._bench.loss.drawn(self.validation, places)
        return DataBatch(tensors, len(places))

    def _chosen(self, operation: Batch, size: int) -> tuple[Tensor, tuple[int | str, ...]]:
        """Return indices of at most ``size`` training samples, and the labels that seed their noise."""
        if operation.part is None:
            labels: tuple[int | str, ...] = (self._round, self._node, *self.position.labels)
            return self.own("Batch without a part").next(size), labels
        if self.parts is None or not 0 <= operation.part < len(self.parts):
            known = f"0 to {len(self.parts) - 1}" if self.parts else "none"
            raise ProgramError(f"Batch(part={operation.part}): there is no such part (there are: {known})")
        part = self.parts[operation.part]
        # The same for all nodes: they may be asked for one batch, and its noise is part of it.
        if operation.key is None:
            places = self._choose(("part", operation.part), len(part), size)
            labels = ("part", operation.part, self._round, self._counts["part", operation.part])
        else:
            labels = ("part", operation.part, operation.key)
            # As no round is in the labels, a key cannot meet the draws of rounds, whose labels begin with one.
            places = _shuffled(len(part), self._spec.seed, "part", operation.part, operation.key)[:size]
        return part[places], labels

    def _choose(self, source: tuple[str | int, ...], population: int, size: int) -> Tensor:
        """Choose at most ``size`` places at random: a pure function of (seed, round, source, count), on any node."""
        count = self._counts[source] = self._counts.get(source, -1) + 1
        return _shuffled(population, self._spec.seed, self._round, *source, count)[:size]

    def _seeded_for_load(self, *labels: int | str) -> contextlib.AbstractContextManager[None]:
        """Seed the process's generators from (seed, round, node, draw), for samples that draw noise while they load."""
        if type(self.samples) is TensorSamples and type(self.validation) in (TensorSamples, type(None)):
            return _NOTHING  # they draw nothing, and a round may be as short as this takes
        return seeded(derive_seed(self._spec.seed, "load", *labels), self._bench.shared.device)

    # --- blame -------------------------------------------------------------------------------------------------------

    def culprit_at(self, indices: Tensor) -> str | None:
        """Name the first of these samples that is not finite; ``None``: all are finite."""
        return non_finite(self.samples, indices)

    def culprit_of(self, batch: DataBatch) -> str | None:
        """Name the first value of a batch that is not finite; ``None``: all are finite."""
        if self._latest is not None and self._latest[0] is batch:
            return non_finite(self.samples, self._latest[1])
        return non_finite_of(batch.tensors)


def _shuffled(population: int, *labels: int | str) -> Tensor:
    """Return places 0 … ``population`` - 1 in an order that is a pure function of ``labels``."""
    return torch.randperm(population, generator=generator(*labels))
