"""Tasks: model, loss, data and metrics."""

from starling.actors.data.samples import Samples, Subset, TensorSamples
from starling.actors.tasks.base import Metric, Task
from starling.actors.tasks.datasets import DatasetSamples

__all__ = ["DatasetSamples", "Metric", "Samples", "Subset", "Task", "TensorSamples"]
