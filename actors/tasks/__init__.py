"""Tasks: model, loss, data and metrics."""

from actors.tasks.base import Metric, Samples, Subset, Task, TensorSamples

__all__ = ["Metric", "Samples", "Subset", "Task", "TensorSamples"]
