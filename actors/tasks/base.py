"""The task interface: what is trained, on what, and how one tells that it got better."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from starling.actors.data.samples import Samples, Subset
from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


_MIN_EVALUATION_BATCH = 256


class Metric(Part, family="metric", catalog="starling.actors.tasks.metrics"):
    """Something more to know of a model on held-out data, named in ``task.extra_metrics``.

    One of one's own derives from this class and is named by its import path, as a task is.
    """

    @abstractmethod
    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the rows of a batch, a scalar, from what ``Task.predictions`` gives."""

    @property
    def label(self) -> str:
        """Name under which the metric is reported."""
        return type(self).part_name or type(self).__name__.lower()


class Task(Part, family="task", catalog="starling.actors.tasks"):
    """Model, loss, data and metrics. Fields are hyper-parameters; a task holds no state.

    A user's own task derives from this class, lives in any importable module, and is named by its import path:
    ``task: {name: "my_module:MyTask", width: 64}``.
    """

    init_from: str | None = None  # where training begins: a safetensors file or a run's directory; null: at random
    extra_metrics: tuple[Metric, ...] = ()  # to be reported besides the task's own

    @abstractmethod
    def train_samples(self, num_nodes: int) -> Samples:
        """The training data of the whole run. Deterministic; ``num_nodes`` matters only to data with owners.

        Raises:
            DataError: the data cannot be read.
        """

    @abstractmethod
    def validation_samples(self, num_nodes: int) -> Samples:
        """Held-out data. Deterministic."""

    def own_samples(self, node: int, num_nodes: int) -> Samples | None:
        """The training data that belong to ``node``, for ``data.source: federated``; called where the node runs.

        Default: those of ``train_samples`` that ``node`` owns; ``None`` if samples have no owners.

        Raises:
            DataError: the data cannot be read.
        """
        samples = self.train_samples(num_nodes)
        return None if samples.owners is None else Subset(samples, (samples.owners == node).nonzero().flatten())

    def reading(self) -> dict[str, str]:
        """Describe the data that are read or left out, as text by heading; default: nothing."""
        return {}

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised model, in float32 on the CPU; called with torch's generator seeded by the run."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss over a batch, a scalar that can be differentiated."""

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
        """The gradient of ``loss`` in closed form, for n nodes at once; default ``None``: by automatic differentiation.

        A task's ``gradients`` replaces ``loss`` and its derivative, also for one node (n = 1). Each node's row must
        have bits that depend neither on n nor on the other nodes. It draws no random numbers, writes into neither
        argument, and may be called from several processes.

        Args:
            parameters: shape (n, P), one row per node, in the order of ``Layout.entries``.
            batch: as for ``loss``, with one more dimension in front: each tensor has shape (n, b, …).

        Returns:
            The mean gradients over each node's batch, shape (n, P), and the mean losses, shape (n,).
        """
        del parameters, batch

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Scalar means over a batch of held-out data; called without gradients, in evaluation mode."""
        return {"loss": self.loss(module, batch)}

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
        """Return what ``extra_metrics`` compare: outputs, shape (r, …), and targets, shape (r,), row by row.

        For a classifier, logits and labels. Default ``None``: the task offers none.
        """
        del module, batch

    def evaluation_batch_size(self, batch_size: int) -> int:
        """Return the size of evaluation batches, given that of training batches; default: ≥ 256."""
        return max(batch_size, _MIN_EVALUATION_BATCH)

    def export(self, module: nn.Module, folder: Path) -> bool:
        """Write the trained model into ``folder`` as others read it; ``True`` if the task has such a form."""
        del module, folder
        return False

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Turn metrics that were averaged over all held-out samples into what is reported (adds a perplexity, say)."""
        return means

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """Return reference values of the validation loss by name: a known optimum, an entropy. May be empty."""
        del num_nodes
        return {}
