"""The task's loss of the shared module, and the batches that it is computed from."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from starling.actors.data.generators import Settings
from starling.actors.tasks import answers
from starling.actors.training import blame
from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from starling.actors.tasks import Samples, Task
    from starling.actors.training.optimizers import OptimizerConfig
    from starling.actors.training.shared_module import SharedModule
    from starling.algorithms.rules import DataBatch

_NO_CONTEXT = contextlib.nullcontext()


class TaskLoss:
    """Computes the task's loss of batches.

    Args:
        task: of the run.
        config: the precision.
        shared: the module.
    """

    def __init__(self, task: Task, config: OptimizerConfig, shared: SharedModule) -> None:
        self._task, self._shared = task, shared
        self._is_bf16 = config.precision == "bf16"

    def to_device(self, batch: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Move samples to the device, in the module's dtype."""
        return tuple(
            one.to(self._shared.device, self._shared.dtype if one.is_floating_point() else one.dtype) for one in batch
        )

    def drawn(self, samples: Samples, indices: Tensor) -> tuple[Tensor, ...]:
        """Load the samples at ``indices`` as the module takes them.

        Raises:
            ProgramError: the task's samples give no tensors with a row for each.
        """
        return self.to_device(answers.batch(self._task, samples.batch(indices), len(indices)))

    def of_batch(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Compute the task's mean loss of the attached node, to be differentiated."""
        return self._compute(self._shared.module, batch)

    def of_module(self, module: nn.Module, batch: DataBatch) -> Tensor:
        """Compute the task's mean loss of a module that a rule has made of the shared one."""
        return self._compute(module, batch.tensors)

    def _compute(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        before = Settings.now()
        with self.autocast():
            try:
                given = self._task.loss(module, batch)
            except ValueError as error:
                hint = blame.too_small(error, len(batch[0]))
                if hint is None:
                    raise
                raise ProgramError(f"task {self._task.name}: {hint}") from error
        before.restore()
        return answers.loss(self._task, given, is_differentiated=before.records_gradients)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute in ``optimizer.precision``."""
        if self._is_bf16:
            return torch.autocast(self._shared.device.type, torch.bfloat16)
        return _NO_CONTEXT
