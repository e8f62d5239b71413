"""Data sets that are drawn from by index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor


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
    """A selection of another data set's samples, in the order of ``indices``, int64, shape (n,)."""

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
        """Return the origin of a sample; ``None`` if it is unknown."""
        where = getattr(self._samples, "where", None)
        return None if where is None else where(int(self._indices[index]))

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the rows at places ``indices``."""
        return self._samples.batch(self._indices[indices])
