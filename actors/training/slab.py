"""The tensors of nodes: a slab holds the models of several nodes as rows, current and committed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from starling.actors.training.module_init import give_back_memory

if TYPE_CHECKING:
    from torch import Tensor

    from starling.actors.training.shared_module import SharedModule
    from starling.actors.training.workbench import Workbench

_ALIGNMENT = 64
"""Bytes, as torch allocates on the CPU."""


@dataclass(frozen=True, eq=False)
class ModelTensors:
    """A node's own values of a model."""

    parameters: Tensor
    """Flat and contiguous, shape (P,)."""
    buffers: Tensor
    """Floating-point buffers, flat, shape (B,)."""
    counters: list[Tensor]
    """Buffers that are not floating-point: how many batches a batch norm has seen, say."""
    views: list[Tensor] = field(default_factory=list)
    """The parameters one by one, once the node has been attached, if they are few."""


class Slab:
    """The tensors of several nodes as rows, so that many are copied in one call; current and committed ones.

    Args:
        bench: has the module that they are for.
        num_rows: how many nodes.
        keeps_copy: of the committed parameters; without one they are the current ones, which no round may write to.
    """

    def __init__(self, bench: Workbench, num_rows: int = 1, *, keeps_copy: bool = True) -> None:
        self.bench = bench
        shared = bench.shared
        layout = shared.layout
        self._parameters = _rows(num_rows, layout.num_values, shared)
        self._buffers = _rows(num_rows, layout.num_buffer_values, shared)
        counters = shared.initialize(
            self._parameters[0, : layout.num_values], self._buffers[0, : layout.num_buffer_values]
        )
        for rows in (self._parameters, self._buffers):
            rows[1:] = rows[0]
        self.current = [
            # .data: else all rows would share one version counter, and autograd would take a write to one node's
            # parameters for a write to all of them.
            ModelTensors(
                self._parameters[row, : layout.num_values].data,
                self._buffers[row, : layout.num_buffer_values].data,
                [counter.clone() for counter in counters],
            )
            for row in range(num_rows)
        ]
        # Before the copy below: what the module was built with is freed.
        shared.attach(self.current[0])
        give_back_memory()
        self._keeps_copy = keeps_copy
        self._committed_parameters = self._parameters.clone() if keeps_copy else self._parameters
        self._committed_buffers = self._buffers.clone()
        self._committed_counters = [[counter.clone() for counter in one.counters] for one in self.current]
        self._layout = layout

    def stacked(self, start: int, stop: int) -> Tensor:
        """The current parameters of a range of rows, shape (stop - start, P); to be read and written."""
        return self._parameters[start:stop, : self._layout.num_values]

    def committed(self, row: int) -> ModelTensors:
        """Return a row's committed tensors; not to be written to."""
        parameters = self._committed_parameters[row, : self._layout.num_values].data
        buffers = self._committed_buffers[row, : self._layout.num_buffer_values].data
        return ModelTensors(parameters, buffers, self._committed_counters[row])

    def commit(self, start: int, stop: int) -> None:
        """Make the current values of a range of rows the committed ones."""
        if self._keeps_copy:
            self._committed_parameters[start:stop] = self._parameters[start:stop]
        if self._layout.num_buffer_values:
            self._committed_buffers[start:stop] = self._buffers[start:stop]
        if not self._committed_counters[start]:
            return
        for row in range(start, stop):
            for committed, counter in zip(self._committed_counters[row], self.current[row].counters, strict=True):
                committed.copy_(counter)

    def restore(self, row: int) -> None:
        """Roll a row back to its committed values."""
        committed, current = self.committed(row), self.current[row]
        if self._keeps_copy:
            current.parameters.copy_(committed.parameters)
        current.buffers.copy_(committed.buffers)
        for counter, value in zip(current.counters, committed.counters, strict=True):
            counter.copy_(value)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins where torch would have a tensor begin.

    The bits of a matrix product may depend on that, and what a node received, or cut out of something larger, begins
    elsewhere in a simulation than on a cluster.
    """
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _rows(num_rows: int, width: int, shared: SharedModule) -> Tensor:
    """Memory for rows, each of which begins where torch would have a tensor begin; see ``aligned``."""
    unit = _ALIGNMENT // shared.dtype.itemsize
    return torch.empty(num_rows, -(-width // unit) * unit, dtype=shared.dtype, device=shared.device)
