"""Parquet: a class or a number from columns of Parquet files, read a few row groups at a time.

* ``path`` is a file, a folder, a pattern (``data/part-*.parquet``) or a URI (``s3://bucket/folder``) of pyarrow's file
  systems. With ``data.source: federated`` it has ``{node}`` in it, and each node opens its own.
* ``features`` are columns of numbers, or of lists of numbers of one length; by default all of them but the label and
  the index of a pandas frame. Nulls, NaN and infinity are refused, and whole numbers that float32 does not hold.
* A label of whole numbers is a class, from 0 to ``classes`` − 1. So is a label of texts or of pandas categories:
  ``classes`` are their names in order, by default all that there are, sorted. A label of floats is a number to predict.
* Without ``validation``, every tenth row group is held out; of fewer than ten, the last tenth of each one's rows.

Row groups are dealt to nodes as a whole where there are at least two per node, and each node reads only its own. An
epoch mixes rows within ``mix_row_groups`` row groups. A node holds at most ``memory_mb`` of rows, or ``mix_row_groups``
row groups if those are more, and two row groups while it reads one, whatever the size of the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data import files, row_groups
from starling.actors.data.classes import Classes, ClassesField, find_classes
from starling.actors.data.columns import is_feature, is_listed, is_number, is_text, is_whole, numbers_of
from starling.actors.data.row_groups import RowGroup, RowGroupSamples, open_row_groups
from starling.actors.tasks import supervised
from starling.actors.tasks.base import Task
from starling.actors.tasks.models import MLP, Model
from starling.algorithms.errors import DataError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa


class Parquet(Task, name="parquet"):
    """Predict one column from others."""

    path: str  # of the training data; {node} in it stands for the node's number, with data.source: federated
    label: str  # the column that is predicted
    features: tuple[str, ...] | None = None  # the columns that it is predicted from; null: all other columns of numbers
    validation: str | None = None  # held-out data; null: a tenth of the training data
    classes: ClassesField = None  # how many, or their names; null: the largest number plus one, or the texts there are
    model: Model = MLP()
    whole_row_groups: bool | None = None  # deal them to nodes as a whole; null: if there are two per node
    mix_row_groups: PositiveInt = 4  # how many an epoch shuffles together
    memory_mb: PositiveInt = 64  # of rows that a node keeps, in 10⁶ bytes
    on_bad_row_group: Literal["stop", "skip"] = "stop"  # if one cannot be read: end the run, or leave it out

    def train_samples(self, num_nodes: int) -> RowGroupSamples:
        """The rows that are not held out."""
        files.refuse_per_node("task.path", self.path)
        groups = self._training_groups(self.path)
        whole = len(groups) >= 2 * num_nodes if self.whole_row_groups is None else self.whole_row_groups
        return self._samples(groups, whole=whole)

    def own_samples(self, node: int, num_nodes: int) -> RowGroupSamples | None:
        """The rows of the node's own file or folder."""
        if not files.is_per_node(self.path):
            return None
        path = files.of_node(self.path, node)
        self._check_schema("task.path", path)
        return self._samples(open_row_groups("task.path", path)[1], whole=True)

    def validation_samples(self, num_nodes: int) -> RowGroupSamples:
        """The held-out rows, in their order."""
        if self.validation is not None:
            self._check_schema("task.validation", self.validation)
            return self._samples(open_row_groups("task.validation", self.validation)[1], whole=False)
        self._common()
        groups = row_groups.held_out(self._groups(self.path))[1]
        if not groups:
            raise DataError(f"task.path: {self.path} has too few rows to hold out a tenth; name task.validation")
        return self._samples(groups, whole=False)

    def reading(self) -> dict[str, str]:
        """The features and the label; the columns that are left out, and why."""
        path = self._common()
        schema = open_row_groups("task.path", path)[0]
        chosen = _feature_columns(path, self.label, self.features)
        index = row_groups.index_columns("task.path", path)
        others = [field for field in schema if field.name not in {*chosen, self.label}]
        left = [f"{one.name} ({'index of a pandas frame' if one.name in index else one.type})" for one in others]
        classes = self._classes
        label = f"{self.label} (a number)" if classes is None else f"{self.label} ({classes.count} classes)"
        told = {"features": listed(chosen), "label": label}
        return told | ({"left out": listed(left)} if left else {})

    def build(self) -> nn.Module:
        """The chosen model, with as many inputs as the features have values."""
        shape = _shape(self._common(), self.label, self.features)
        return self.model.build(shape, self._classes.count if self._classes else 1)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy in nats of a class, mean squared error of a number."""
        features, labels = batch
        return (supervised.classification_loss if self._classes else supervised.regression_loss)(
            module(features), labels
        )

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss, and accuracy or mean absolute error."""
        measured = supervised.classification_metrics if self._classes else supervised.regression_metrics
        return measured(module(batch[0]), batch[1])

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits, shape (b, classes), or numbers, shape (b, 1); and labels."""
        return module(batch[0]), batch[1]

    # --- files -------------------------------------------------------------------------------------------------------

    def _common(self) -> str:
        """The path from which every process learns what columns there are."""
        return files.require_common("task.validation", self.validation) if files.is_per_node(self.path) else self.path

    def _groups(self, path: str) -> list[RowGroup]:
        self._check_schema("task.path", path)
        return open_row_groups("task.path", path)[1]

    def _training_groups(self, path: str) -> list[RowGroup]:
        groups = self._groups(path)
        return groups if self.validation is not None else row_groups.held_out(groups)[0]

    def _samples(self, groups: Sequence[RowGroup], *, whole: bool) -> RowGroupSamples:
        columns = _feature_columns(self._common(), self.label, self.features)
        decoder = _FeatureDecoder(
            columns, self.label, self._classes, _shape(self._common(), self.label, self.features)[0]
        )
        samples = RowGroupSamples(
            groups,
            decoder,
            label=decoder.labels if self._classes else None,
            label_columns=(self.label,),
            memory_mb=self.memory_mb,
            mixed=self.mix_row_groups,
            whole=whole,
            skip_bad=self.on_bad_row_group == "skip",
        )
        samples.class_names = self._classes.names if self._classes else None
        return samples

    def _check_schema(self, key: str, path: str) -> None:
        """Check that a file has the needed columns, in the types of the other files."""
        schema = open_row_groups(key, path)[0]
        common = open_row_groups(key, self._common())[0]
        for name in (*_feature_columns(self._common(), self.label, self.features), self.label):
            kind, expected = row_groups.require_column(key, schema, name).type, common.field(name).type
            if kind != expected:
                raise DataError(f"{key}: column {name} of {path} is {kind}, and {expected} in {self._common()}")

    @property
    def _classes(self) -> Classes | None:
        """``None``: the label is a number."""
        return _classes(self._common(), self.label, self.classes, skip_bad=self.on_bad_row_group == "skip")


class _FeatureDecoder:
    """Features, float32 of shape (r, d), and labels, int64 or float32 of shape (r,), of a row group."""

    def __init__(self, features: Sequence[str], label: str, classes: Classes | None, width: int) -> None:
        self._features, self._label, self._classes = tuple(features), label, classes
        self._width = width
        self.columns = (*features, label)

    def __call__(self, table: pa.Table, place: str) -> tuple[Tensor, ...]:
        pieces = [numbers_of(table.column(name), name, place, np.dtype(np.float32)) for name in self._features]
        widths = [1 if piece.ndim == 1 else piece.shape[1] for piece in pieces]
        if sum(widths) != self._width:
            each = ", ".join(f"{name} {width}" for name, width in zip(self._features, widths, strict=True) if width > 1)
            what = f"{place}: rows have {sum(widths)} values ({each}), and {self._width} in the first row group"
            raise DataError(f"{what}; features must have one shape")
        features = torch.empty(table.num_rows, self._width, dtype=torch.float32)
        start = 0
        for piece, width in zip(pieces, widths, strict=True):
            features.numpy()[:, start : start + width] = piece.reshape(table.num_rows, width)
            start += width
        return features, self.labels(table, place)

    def labels(self, table: pa.Table, place: str) -> Tensor:
        """The label column.

        Raises:
            DataError: a class is not among the classes.
        """
        if self._classes is None:
            return torch.from_numpy(
                numbers_of(table.column(self._label), self._label, place, np.dtype(np.float32)).copy()
            )
        return self._classes.of(table, self._label, place)


@files.remembered
def _feature_columns(path: str, label: str, features: tuple[str, ...] | None) -> tuple[str, ...]:
    """The feature columns.

    Raises:
        DataError: there are none, or they hold no numbers.
    """
    schema = open_row_groups("task.path", path)[0]
    row_groups.require_column("task.label", schema, label)
    if features is None:
        index = row_groups.index_columns("task.path", path)
        found = [field.name for field in schema if field.name not in {label, *index} and is_feature(field.type)]
        if not found:
            raise DataError(f"task.features: {path} has no columns of numbers besides {label}")
        for name in found:
            row_groups.require_column("task.features", schema, name)
        return tuple(found)
    for name in features:
        kind = row_groups.require_column("task.features", schema, name).type
        if not is_feature(kind):
            what = f"column {name} is {kind}; features must be numbers, or lists of numbers of one length"
            raise DataError(f"task.features: {what}")
    if label in features:
        raise DataError(f"task.features: {label} is the label; a model that is given it has nothing to learn")
    if not features:
        raise DataError("task.features: name at least one column, or leave it out for all of them")
    return features


@files.remembered
def _shape(path: str, label: str, features: tuple[str, ...] | None) -> tuple[int, ...]:
    """The shape of one sample's features, (d,)."""
    schema, groups = open_row_groups("task.path", path)
    columns = _feature_columns(path, label, features)
    kinds = [schema.field(name).type for name in columns]
    if any(is_listed(kind) and not hasattr(kind, "list_size") for kind in kinds):
        table, place = groups[0].checked(columns), groups[0].place  # how long lists are is not in the schema
        shapes = [numbers_of(table.column(name), name, place, np.dtype(np.float32)).shape[1:] for name in columns]
        return (sum(shape[0] if shape else 1 for shape in shapes),)
    return (sum(getattr(kind, "list_size", 1) for kind in kinds),)


@files.remembered
def _classes(path: str, label: str, chosen: int | tuple[str, ...] | None, *, skip_bad: bool) -> Classes | None:
    """``None`` for a label that is a number.

    Raises:
        DataError: the label is neither, or classes are given for a label that has none.
    """
    schema = open_row_groups("task.path", path)[0]
    kind = row_groups.require_column("task.label", schema, label).type
    if is_number(kind) and not is_whole(kind):
        if chosen is not None:
            raise DataError(f"task.classes: column {label} is {kind}; classes must be whole numbers, from 0, or texts")
        return None
    if not is_whole(kind) and not is_text(kind):
        what = f"column {label} is {kind}; a label must be whole numbers (classes, from 0), texts (classes) or floats"
        raise DataError(f"task.label: {what}")
    return find_classes("task.path", path, label, chosen, skip_bad=skip_bad)
