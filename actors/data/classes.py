"""Classes of a table's label: whole numbers from 0, or texts in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

import numpy as np
import torch
from pydantic import BeforeValidator, PositiveInt
from pydantic_core import PydanticCustomError
from torch import Tensor

from starling.actors.data import files
from starling.actors.data.columns import is_text, is_whole, numbers_of, plain
from starling.actors.data.row_groups import UnreadableError, open_row_groups, require_column
from starling.algorithms.errors import DataError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

    from starling.actors.data.row_groups import RowGroup


def _as_words(value: object) -> object:
    """YAML 1.1 takes ``no`` and ``yes`` for truth values, and ``1`` for a number."""
    if not isinstance(value, list | tuple):
        return value
    words = {False: "no", True: "yes"}
    names = [words[one] if isinstance(one, bool) else str(one) for one in cast("list[object]", value)]
    if len(set(names)) < len(names):
        raise PydanticCustomError("classes", "must name each class once")
    return tuple(names)


ClassesField: TypeAlias = Annotated[PositiveInt | tuple[str, ...] | None, BeforeValidator(_as_words)]
"""Number of classes, or the class names in the order of their numbers; ``None``: the classes found in the data."""


@dataclass(frozen=True)
class Classes:
    """The classes of a label."""

    count: int
    names: tuple[str, ...] | None = None
    """Names in the order of their numbers."""
    texts: bool = False
    """Whether the column holds the names, and not the numbers."""

    def of(self, table: pa.Table, label: str, place: str) -> Tensor:
        """The classes of a column's rows, int64, shape (r,).

        Raises:
            DataError: one is not among the classes, or there is none.
        """
        return self._named(table, label, place) if self.texts else self._numbered(table, label, place)

    def _numbered(self, table: pa.Table, label: str, place: str) -> Tensor:
        labels = numbers_of(table.column(label), label, place, np.dtype(np.int64))
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.count:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(f"{place}: {_outside(label, wrong, self.count)}")
        return torch.from_numpy(labels.copy())

    def _named(self, table: pa.Table, label: str, place: str) -> Tensor:
        import pyarrow as pa
        import pyarrow.compute

        compute: Any = pyarrow.compute
        column = plain(table.column(label))
        if column.null_count:
            raise DataError(
                f"{place}: column {label} has {column.null_count} nulls; fill them, or leave those rows out"
            )
        names = self.names or ()
        places = compute.index_in(column, value_set=pa.array(names, pa.string()))
        if places.null_count:
            wrong = _texts(compute.filter(column, compute.is_null(places)).unique(), label, place)[0]
            known = listed(names, _SHOWN)
            raise DataError(
                f"{place}: column {label} has the class {wrong!r}, and classes are {known}; see task.classes"
            )
        return torch.from_numpy(places.to_numpy().astype(np.int64))


_SHOWN = 8
_ALL_DIFFERENT = 100
"""Classes from which on texts of which most are there but once are not taken for classes."""


def _outside(label: str, wrong: int, count: int) -> str:
    what = f"column {label} has the class {wrong}, and classes are 0 to {count - 1}"
    return f"{what}; raise task.classes, or number the classes from 0"


@files.remembered
def find_classes(
    key: str, path: str, label: str, chosen: int | tuple[str, ...] | None = None, *, skip_bad: bool = False
) -> Classes:
    """The classes of a label, as ``chosen`` or as they are in the files; of whole numbers their footers may suffice.

    Args:
        key: of the configuration that names ``path``.
        path: of the Parquet files.
        label: the column.
        chosen: ``task.classes``.
        skip_bad: leave out what cannot be read.

    Raises:
        DataError: the label is neither whole numbers from 0 nor texts, or there are too many of them to be classes.
    """
    schema, groups = open_row_groups(key, path)
    kind = require_column("task.label", schema, label).type
    names = chosen if isinstance(chosen, tuple) else None
    if is_text(kind):
        if isinstance(chosen, int):
            raise DataError(f"task.classes: column {label} holds texts; name its classes (a list), or leave it out")
        names = _found_texts(groups, label, skip_bad=skip_bad) if names is None else names
        return Classes(len(names), names, texts=True)
    if not is_whole(kind):
        raise DataError(f"task.label: column {label} is {kind}; classes must be whole numbers, from 0, or texts")
    if chosen is not None:
        return Classes(len(names) if names else cast("int", chosen), names)
    return Classes(_count(groups, label, skip_bad=skip_bad))


def _count(groups: list[RowGroup], label: str, *, skip_bad: bool) -> int:
    """The largest label, plus one."""
    bounds = [found for group in groups if (found := _bounds(group, label, skip_bad=skip_bad)) is not None]
    if not bounds:
        raise DataError("not one row group can be read")
    least, greatest = min(low for low, _ in bounds), max(high for _, high in bounds)
    rows = sum(map(len, groups))
    if least < 0:
        raise DataError(f"task.label: {_outside(label, least, greatest + 1)}")
    if greatest >= rows:
        what = (
            f"column {label} would have {greatest + 1} classes (its largest number plus one), and there are {rows} rows"
        )
        raise DataError(f"task.label: {what}; number the classes from 0, or say with task.classes that it is so")
    return greatest + 1


def _bounds(group: RowGroup, label: str, *, skip_bad: bool) -> tuple[int, int] | None:
    known = group.statistics(label)
    if known is not None and all(isinstance(one, int) for one in known):  # truth values too
        return int(known[0]), int(known[1])
    try:
        column = group.checked([label]).column(label)
    except UnreadableError:
        if skip_bad:
            return None
        raise
    numbers = numbers_of(column, label, group.place, np.dtype(np.int64))
    return int(numbers.min()), int(numbers.max())


def _found_texts(groups: list[RowGroup], label: str, *, skip_bad: bool) -> tuple[str, ...]:
    found: set[str] = set()
    rows = 0
    for group in groups:
        try:
            column = group.checked([label]).column(label)
        except UnreadableError:
            if skip_bad:
                continue
            raise
        rows += len(group)
        found.update(_texts(plain(column).drop_null().unique(), label, group.place))
    if not found:
        raise DataError(f"task.label: column {label} has no values")
    if len(found) > max(_ALL_DIFFERENT, rows // 2):
        what = f"column {label} has {len(found)} different texts in {rows} rows"
        raise DataError(f"task.label: {what}: these are no classes; take another column, or name them in task.classes")
    return tuple(sorted(found))


def _texts(values: Any, label: str, place: str) -> list[str]:  # noqa: ANN401 - a pyarrow array
    try:
        found: Iterable[str] = values.to_pylist()
    except UnicodeDecodeError:
        raise DataError(f"{place}: column {label} has texts that are not UTF-8") from None
    return list(found)
