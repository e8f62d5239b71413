"""The task interface: what is trained, on what, and how one tells that it got better."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from algorithms.registry import Part

if TYPE_CHECKING:
    from torch import Tensor, nn


class Samples(Protocol):
    """A data set that is drawn from by index."""

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
    """Samples that fit in memory: tensors with one row per sample."""

    def __init__(self, *tensors: Tensor, owners: Tensor | None = None) -> None:
        self.tensors = tensors
        self._owners = owners

    @property
    def owners(self) -> Tensor | None:
        """The node index of each sample, if the samples have owners."""
        return self._owners

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The rows at ``indices``, copied."""
        return tuple(tensor.index_select(0, indices) for tensor in self.tensors)


class Task(Part, family="task", catalog="actors.tasks"):
    """Model, loss, data and metrics. Fields are hyper-parameters; a task holds no state.

    A user's own task derives from this class, lives in any importable module, and is named by its import path:
    ``task: {name: "my_module:MyTask", width: 64}``.
    """

    @abstractmethod
    def train_samples(self, num_nodes: int) -> Samples:
        """The training data of the whole run. Deterministic; ``num_nodes`` matters only to data with owners.

        Raises:
            DataError: the data cannot be read.
        """

    @abstractmethod
    def validation_samples(self, num_nodes: int) -> Samples:
        """Held-out data. Deterministic."""

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

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Turn metrics that were averaged over all held-out samples into what is reported (adds a perplexity, say)."""
        return means

    def baselines(self, num_nodes: int) -> dict[str, float]:
        """What the validation loss should be compared with, by name: a known optimum, an entropy. May be empty."""
        del num_nodes
        return {}
