"""Tasks: model, loss, data and metrics."""

from actors.tasks.base import Samples, Task, TensorSamples

__all__ = ["Samples", "Task", "TensorSamples"]
