"""The task interface: what is trained, on what, and how one tells that it got better."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn


_MIN_EVALUATION_BATCH = 256


class Samples(Protocol):
    """A data set that is drawn from by index.

    It may say more of its samples, for partitions and ``starling data``:

    * ``labels``: their classes, int64, shape (n,), or ``None``;
    * ``columns``, names, and ``column(name)``: what else is known of each sample, an array of n values;
    * ``where(index)``: where a sample is from, a text or ``None``, for messages;
    * ``blocks`` and ``window``: that they come in blocks which are read as a whole (``Ranges``), and how many of those
      are kept in memory.
    """

    @property
    def owners(self) -> Tensor | None:
        """The node index that each sample naturally belongs to, shape (n,), or ``None``: samples are pooled."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The samples at ``indices``, shape (b,), as CPU tensors with b rows each."""
        ...


class TensorSamples:
    """Samples that fit in memory: tensors with one row per sample.

    Args:
        tensors: inputs, targets, whatever the task's loss takes, each with n rows.
        owners: the node index that each sample belongs to, shape (n,).
        labels: their classes, int64, shape (n,).
        columns: by name, what else is known of each sample, n values each.
    """

    def __init__(
        self,
        *tensors: Tensor,
        owners: Tensor | None = None,
        labels: Tensor | None = None,
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.tensors = tensors
        self.labels = labels
        self.columns = dict(columns or {})
        self._owners = owners

    @property
    def owners(self) -> Tensor | None:
        """The node index of each sample, if the samples have owners."""
        return self._owners

    def __len__(self) -> int:
        return len(self.tensors[0])

    def column(self, name: str) -> NDArray[Any] | None:
        """The values of a column; ``None``: there is none of that name."""
        return self.columns.get(name)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The rows at ``indices``, copied."""
        return tuple(tensor.index_select(0, indices) for tensor in self.tensors)


class Subset:
    """Some of the samples of others, in the order of ``indices``, int64, shape (n,)."""

    owners = None

    def __init__(self, samples: Samples, indices: Tensor) -> None:
        self._samples = samples
        self._indices = indices

    @property
    def labels(self) -> Tensor | None:
        """Their classes, if they have any."""
        labels = getattr(self._samples, "labels", None)
        return None if labels is None else labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, index: int) -> str | None:
        """Where a sample is from, if that is known."""
        where = getattr(self._samples, "where", None)
        return None if where is None else where(int(self._indices[index]))

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Those at places ``indices``."""
        return self._samples.batch(self._indices[indices])


class Metric(Part, family="metric", catalog="actors.metrics"):
    """Something more to know of a model on held-out data, named in ``task.extra_metrics``.

    One of one's own derives from this class and is named by its import path, as a task is.
    """

    @abstractmethod
    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the rows of a batch, a scalar, from what ``Task.predictions`` gives."""

    @property
    def label(self) -> str:
        """Under which it is reported."""
        return type(self).part_name or type(self).__name__.lower()


class Task(Part, family="task", catalog="actors.tasks"):
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
        """What is read of the data, and what is left out, as text by heading; default: nothing to say."""
        return {}

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised model, in float32 on the CPU; called with torch's generator seeded by the run."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss over a batch, a scalar that can be differentiated."""

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
        """The gradient of ``loss`` in closed form, for n nodes at once; default ``None``: by automatic differentiation.

        Where a task has it, it is used in place of ``loss`` and its derivative, also for one node (n = 1): each node's
        rows must come out the same to the last bit whatever n is, and whichever the other nodes are. It draws no random
        numbers, writes into neither argument, and may be called from several processes.

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
        """What ``extra_metrics`` are worked out from: outputs, shape (r, …), and targets, shape (r,), row by row.

        Of a classifier, logits and labels. Default ``None``: the task offers none.
        """
        del module, batch

    def evaluation_batch_size(self, batch_size: int) -> int:
        """How many held-out samples are looked at at once, if a training batch has ``batch_size``; default: ≥ 256."""
        return max(batch_size, _MIN_EVALUATION_BATCH)

    def export(self, module: nn.Module, folder: Path) -> bool:
        """Write the trained model into ``folder`` as others read it; ``True`` if the task has such a form."""
        del module, folder
        return False

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Turn metrics that were averaged over all held-out samples into what is reported (adds a perplexity, say)."""
        return means

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """What the validation loss should be compared with, by name: a known optimum, an entropy. May be empty."""
        del num_nodes
        return {}
