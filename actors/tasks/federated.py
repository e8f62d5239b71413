"""Federated data: each node's own, read where the node runs and by nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch

from starling.actors.data.generators import seeded
from starling.actors.data.indices import Indices, Ranges
from starling.actors.tasks import answers
from starling.actors.tasks.base import Task
from starling.algorithms.errors import DataError
from starling.algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from starling.actors.data.samples import Samples

_STRIDE = 2**40
"""Node m's samples are numbered from m · 2⁴⁰: nobody has to know how many the others have."""


class FederatedSamples:
    """Federated samples of all nodes; a process opens a node's samples when it needs them.

    Args:
        task: gives a node's samples.
        num_nodes: of the run.
        seed: of the run.
    """

    owners = None

    def __init__(self, task: Task, num_nodes: int, seed: int = 0) -> None:
        self._task = task
        self._num_nodes = num_nodes
        self._seed = seed
        self._opened: dict[int, Samples] = {}
        self.parts = _Parts(self, num_nodes)

    @property
    def runs(self) -> Ranges | None:
        """Blocks of the opened nodes' samples, if samples come in blocks."""
        pairs = [pair for node in sorted(self._opened) for pair in self._runs(node)]
        return Ranges(pairs) if pairs else None

    @property
    def window(self) -> int:
        """Number of blocks kept in memory."""
        return max((getattr(samples, "window", 1) for samples in self._opened.values()), default=1)

    @property
    def present(self) -> Callable[[Tensor], Tensor] | None:
        """Leaves out what cannot be read, if samples do so."""
        return self._present if any(hasattr(samples, "present") for samples in self._opened.values()) else None

    def _present(self, indices: Tensor) -> Tensor:
        kept = torch.ones(len(indices), dtype=torch.bool)
        for node in (indices // _STRIDE).unique().tolist():
            here = (indices // _STRIDE == node).nonzero().flatten()
            own: Any = self.of(node)
            if hasattr(own, "present"):
                kept[here] = torch.isin(indices[here] % _STRIDE, own.present(indices[here] % _STRIDE))
        return indices[kept]

    def _runs(self, node: int) -> list[tuple[int, int]]:
        runs: Ranges | None = getattr(self.of(node), "runs", None)
        return [] if runs is None else [(node * _STRIDE + first, node * _STRIDE + last) for first, last in runs.runs()]

    @property
    def labels(self) -> Tensor | None:
        """Labels of all nodes' samples, in the order of the nodes; ``None`` if they have none."""
        labels = [getattr(self.of(node), "labels", None) for node in range(self._num_nodes)]
        known = [one for one in labels if one is not None]
        return torch.cat(known) if len(known) == self._num_nodes else None

    def __len__(self) -> int:
        """Number of samples of all nodes; opens all of them."""
        return sum(len(self.of(node)) for node in range(self._num_nodes))

    def of(self, node: int) -> Samples:
        """A node's own samples.

        Raises:
            DataError: the task has no data of single nodes, or they are not here.
        """
        if node not in self._opened:
            # By default a node's own are some of all, which must be the same for all nodes.
            is_part = type(self._task).own_samples is Task.own_samples
            labels = ("train_samples",) if is_part else ("own_samples", node)
            with seeded(derive_seed(self._seed, *labels), torch.device("cpu")):
                given = self._task.own_samples(node, self._num_nodes)
            samples = None if given is None else answers.samples(self._task, "own_samples", given)
            if samples is None:
                what = f"data.source: the task {self._task.name} has no data that belong to single nodes"
                raise DataError(f"{what}; set data.source: pooled")
            if not len(samples):
                raise DataError(f"data: node {node} of {self._num_nodes} has no samples of its own")
            self._opened[node] = samples
        return self._opened[node]

    def indices(self, node: int) -> Indices:
        """The numbers of a node's samples."""
        runs = self._runs(node)
        return Ranges(runs) if runs else node * _STRIDE + torch.arange(len(self.of(node)))

    def where(self, index: int) -> str | None:
        """Return the origin of a sample; ``None`` if it is unknown."""
        where = getattr(self.of(index // _STRIDE), "where", None)
        return None if where is None else where(index % _STRIDE)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The samples at ``indices``, of one node or of several."""
        nodes = indices // _STRIDE
        owners = nodes.unique().tolist()
        if len(owners) == 1:
            return self.of(owners[0]).batch(indices % _STRIDE)
        rows: tuple[Tensor, ...] = ()
        for node in owners:
            here = nodes == node
            own = self.of(node).batch(indices[here] % _STRIDE)
            rows = rows or tuple(one.new_empty(len(indices), *one.shape[1:]) for one in own)
            for whole, piece in zip(rows, own, strict=True):
                whole[here] = piece
        return rows


class _Parts(Sequence["Indices"]):
    """The indices of each node, found out when they are asked for."""

    def __init__(self, data: FederatedSamples, num_nodes: int) -> None:
        self._data = data
        self._num_nodes = num_nodes

    def __len__(self) -> int:
        return self._num_nodes

    @overload
    def __getitem__(self, index: int) -> Indices: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Indices]: ...
    def __getitem__(self, index: int | slice) -> Indices | Sequence[Indices]:
        if isinstance(index, slice):
            return [self._data.indices(node) for node in range(*index.indices(self._num_nodes))]
        if not 0 <= index < self._num_nodes:
            raise IndexError(index)
        return self._data.indices(index)
