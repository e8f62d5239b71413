"""From plain data to replicas: what every process of a run does first, alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.data import assign
from algorithms.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from actors.data import DataConfig
    from actors.tasks import Samples, Task


@dataclass(frozen=True)
class RunData:
    """A task's data, and which node owns what."""

    train: Samples
    validation: Samples
    parts: list[Tensor]
    """Indices into ``train`` for each node."""


def load_data(task: Task, data: DataConfig, num_nodes: int, seed: int) -> RunData:
    """Load and divide the data; deterministic, so that all processes agree without a word.

    Raises:
        DataError: it cannot be read, or not be divided among ``num_nodes`` nodes.
    """
    train = task.train_samples(num_nodes)
    validation = task.validation_samples(num_nodes)
    if not len(validation):
        message = f"task {task.name}: there are no held-out samples to evaluate on"
        raise DataError(message)
    return RunData(train, validation, assign(train, data.partition, num_nodes, seed))
