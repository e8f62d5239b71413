"""Tasks: model, loss, data and metrics."""

from actors.tasks.base import Metric, Samples, Subset, Task, TensorSamples
from actors.tasks.datasets import DatasetSamples

__all__ = ["DatasetSamples", "Metric", "Samples", "Subset", "Task", "TensorSamples"]
