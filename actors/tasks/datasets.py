"""Samples from a map-style ``Dataset`` of torch, as torchvision's are and everybody has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.data import Dataset


class DatasetSamples:
    """The items of a data set, put together by ``collate``.

    A task's ``train_samples`` may give a ``Dataset`` as it is, which comes to ``DatasetSamples(dataset)``. Items are
    read one by one, in the process of the node that draws them, without workers.

    Args:
        dataset: has ``len()``, and items by number.
        collate: makes tensors with a row for each item of a list of items; default: torch's.
        owners: the node index that each sample belongs to, shape (n,).
        labels: their classes, int64, shape (n,); default: the data set's ``targets``, or the last tensor of a
            ``TensorDataset``, if those are whole numbers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] = default_collate,
        owners: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self._dataset: Any = dataset
        self._collate = collate
        self.owners = owners
        if not hasattr(dataset, "__len__"):
            raise DataError(f"{type(dataset).__name__} has no len(), and samples are drawn by number")
        self.labels = _labels(dataset) if labels is None else labels

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The items at ``indices``, with a row for each.

        Raises:
            DataError: ``collate`` makes something else of them than tensors.
        """
        data = self._dataset
        if type(data) is TensorDataset and self._collate is default_collate:
            return tuple(one.index_select(0, indices) for one in data.tensors)
        found: object = self._collate([data[index] for index in indices.tolist()])
        rows = (found,) if isinstance(found, Tensor) else found
        if isinstance(rows, tuple | list) and all(isinstance(one, Tensor) for one in cast("list[Any]", rows)):
            return tuple(cast("list[Tensor]", rows))
        what = f"items of {type(data).__name__} come to a {type(found).__name__}, and a batch is a tuple of tensors"
        raise DataError(f"{what}; give DatasetSamples a collate that makes one")


def _labels(dataset: Any) -> Tensor | None:  # noqa: ANN401 - a Dataset says little of itself
    found = dataset.tensors[-1] if type(dataset) is TensorDataset else getattr(dataset, "targets", None)
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_class = labels.shape == (len(dataset),) and labels.dtype in (torch.int64, torch.int32, torch.uint8)
    return labels.long() if is_class else None
