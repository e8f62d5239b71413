"""Metrics of the attached node's model on held-out data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from starling.actors.tasks import answers
from starling.algorithms.errors import DataError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from starling.actors.tasks import Samples, Task
    from starling.actors.training.shared_module import SharedModule
    from starling.actors.training.task_loss import TaskLoss


class Evaluator:
    """Computes the task's metrics, and those of ``task.extra_metrics``.

    Args:
        task: of the run.
        shared: the module.
        loss: loads batches.
    """

    def __init__(self, task: Task, shared: SharedModule, loss: TaskLoss) -> None:
        self._task, self._shared, self._loss = task, shared, loss

    def evaluate(self, samples: Samples, batch_size: int, max_batches: int | None) -> dict[str, float]:
        """Evaluate the attached node, in batches of the size that the task chooses."""
        size = answers.evaluation_batch_size(self._task, self._task.evaluation_batch_size(batch_size))
        present = getattr(samples, "present", None)
        self._shared.mode(training=False)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        with torch.no_grad(), self._loss.autocast():
            for number, start in enumerate(range(0, len(samples), size)):
                if max_batches is not None and number >= max_batches:
                    break
                indices = torch.arange(start, min(start + size, len(samples)))
                indices = indices if present is None else present(indices)
                if not len(indices):
                    continue
                for name, value in self._metrics(self._loss.drawn(samples, indices)).items():
                    sums[name] = sums.get(name, 0.0) + value * len(indices)
                    # Of each on its own: where a batch has no positive sample, there is no recall.
                    counts[name] = counts.get(name, 0) + len(indices)
        self._shared.check("metrics")
        if not counts:
            raise DataError("there are no held-out samples that can be read, or no metrics of them")
        means = {name: value / counts[name] for name, value in sums.items()}
        return answers.metrics(self._task, "summary", self._task.summary(means))

    def _metrics(self, batch: tuple[Tensor, ...]) -> dict[str, float]:
        task = self._task
        values = answers.metrics(task, "metrics", task.metrics(self._shared.module, batch))
        if task.extra_metrics:
            predicted = task.predictions(self._shared.module, batch)
            if predicted is None:
                what = f"the task {task.name} gives no predictions to work them out from"
                raise SettingsError(f"task.extra_metrics: {what}; leave it empty, or override Task.predictions")
            pair = answers.predictions(task, predicted)
            more = {metric.label: metric.of(*pair) for metric in task.extra_metrics}
            values = values | answers.metrics(task, "extra_metrics", more)
        return values
