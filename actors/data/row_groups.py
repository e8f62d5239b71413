"""Row groups: samples in Parquet files, of which a process holds a few row groups at a time.

What is known of all samples is the files' footers: how many rows each row group has. A row group is read when a sample
of it is drawn, turned into tensors, and dropped when others need its place. So memory is bounded by

    max(``memory_mb``, ``mixed`` row groups) + 2 row groups while one is read

whatever the size of the data set, each row group as tensors (float32 features take 4 bytes per value).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from actors.data import files
from actors.data.indices import Ranges
from algorithms.errors import DataError
from algorithms.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pyarrow as pa
    import pyarrow.dataset
    from numpy.typing import NDArray
    from torch import Tensor

_LOG = logging.getLogger("starling")


class UnreadableError(DataError):
    """What lies in a file is not what it should be; a task may leave it out."""


@dataclass(frozen=True)
class RowGroup:
    """One of a file; its rows, or some of them."""

    fragment: pyarrow.dataset.ParquetFileFragment
    number: int
    """In its file."""
    start: int
    stop: int
    """Of its rows that are meant."""

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.fragment.path}, row group {self.number}"

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Those columns of those rows."""
        table = self.fragment.to_table(columns=list(columns), use_threads=False)
        return table.slice(self.start, self.stop - self.start)

    def checked(self, columns: Sequence[str]) -> pa.Table:
        """The same.

        Raises:
            UnreadableError: they cannot be read; names the file and the row group.
        """
        import pyarrow as pa

        try:
            table = self.read(columns)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise UnreadableError(f"{self.place} cannot be read: {files.printable(reason)}") from None
        if table.num_rows != len(self):
            raise UnreadableError(f"{self.place} has {table.num_rows} rows instead of {len(self)}")
        return table


def open_row_groups(key: str, path: str) -> tuple[pa.Schema, list[RowGroup]]:
    """The schema, and all row groups in the order of the files' paths. Reads footers alone.

    Raises:
        DataError: a file is missing, is no Parquet, or has another schema than the first.
    """
    return _open(key, path)


@files.remembered
def _open(key: str, path: str) -> tuple[pa.Schema, list[RowGroup]]:
    import pyarrow as pa
    import pyarrow.dataset

    listing = files.find(key, path, {".parquet", ".pq"})
    kind = pyarrow.dataset.ParquetFileFormat()
    groups: list[RowGroup] = []
    first: pa.Schema | None = None
    for file in listing.files:
        try:
            fragment = kind.make_fragment(file, listing.filesystem)
            schema = fragment.physical_schema.remove_metadata()
            pieces = fragment.split_by_row_group()
        except (OSError, pa.ArrowException) as error:
            raise DataError(files.unreachable(key, f"{files.shown(path)} ({file})", error)) from None
        first = schema if first is None else first
        if schema != first:
            raise DataError(f"{key}: {file} has another schema than {listing.files[0]}: {_difference(first, schema)}")
        for piece in pieces:
            (info,) = piece.row_groups
            if info.num_rows:
                groups.append(RowGroup(piece, info.id, 0, info.num_rows))
    if not groups or first is None:
        raise DataError(f"{key}: {files.shown(path)} has no rows")
    return first, groups


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    for field in first:
        if field.name not in other.names:
            return f"it lacks the column {field.name}"
        if other.field(field.name).type != field.type:
            return f"column {field.name} is {other.field(field.name).type}, not {field.type}"
    more = [name for name in other.names if name not in first.names]
    return f"it has the columns {', '.join(more)} besides" if more else "its columns come in another order"


def require_column(key: str, schema: pa.Schema, name: str) -> pa.Field:
    """A column.

    Raises:
        DataError: there is none of that name.
    """
    if name not in schema.names:
        raise DataError(f"{key}: there is no column {name!r}{did_you_mean(name, schema.names)}")
    return schema.field(name)


def held_out(groups: Sequence[RowGroup]) -> tuple[list[RowGroup], list[RowGroup]]:
    """Training and held-out rows: of ten or more row groups every tenth, of fewer the last tenth of each one's rows."""
    if len(groups) >= _HOLD_OUT_EVERY:
        chosen = [number % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1 for number in range(len(groups))]
        train = [group for group, out in zip(groups, chosen, strict=True) if not out]
        return train, [group for group, out in zip(groups, chosen, strict=True) if out]
    cuts = [(group, group.stop - len(group) // _HOLD_OUT_EVERY) for group in groups]
    train = [RowGroup(group.fragment, group.number, group.start, cut) for group, cut in cuts if cut > group.start]
    return train, [RowGroup(group.fragment, group.number, cut, group.stop) for group, cut in cuts if cut < group.stop]


_HOLD_OUT_EVERY = 10

UNREADABLE = -1
"""The label of samples in a row group that is left out because it cannot be read."""


class Decoder(Protocol):
    """Turns a row group's columns into tensors with one row per sample.

    Raises ``DataError`` if the values cannot be used.
    """

    columns: tuple[str, ...]

    def __call__(self, table: pa.Table, place: str) -> tuple[Tensor, ...]:
        """The tensors."""
        ...


class RowGroupSamples:
    """Samples in Parquet row groups; see the module's docstring.

    Args:
        groups: whose rows they are, in order.
        decode: makes tensors of a row group.
        label: the column of the classes, if samples have any.
        memory_mb: how much of what was read is kept, in 10⁶ bytes.
        mixed: how many row groups an epoch mixes with one another; that many are always kept.
        whole: whether row groups are dealt to nodes as a whole.
        skip_bad: leave out a row group that cannot be read, with a warning, instead of stopping.
        option: the field of the task that says so.
    """

    owners = None

    def __init__(
        self,
        groups: Sequence[RowGroup],
        decode: Decoder,
        *,
        label: Callable[[pa.Table, str], Tensor] | None = None,
        label_columns: Sequence[str] = (),
        memory_mb: int = 64,
        mixed: int = 4,
        whole: bool = True,
        skip_bad: bool = False,
        option: str = "on_bad_row_group",
    ) -> None:
        self._groups = list(groups)
        self._decode = decode
        self._label, self._label_columns = label, label_columns
        self._memory = memory_mb * 1_000_000
        self._skip_bad = skip_bad
        self._advice = f"task.{option}: skip leaves such row groups out"
        self._ends = np.cumsum([len(group) for group in groups])
        self._cache: OrderedDict[int, tuple[Tensor, ...]] = OrderedDict()
        self._bad: set[int] = set()
        self.window = mixed
        self.runs = Ranges(
            zip((self._ends - [len(group) for group in groups]).tolist(), self._ends.tolist(), strict=True)
        )
        self.whole = whole
        self.num_reads = 0
        """Row groups read so far, those read again included."""

    @property
    def blocks(self) -> Ranges | None:
        """What is dealt to nodes as a whole."""
        return self.runs if self.whole else None

    @property
    def labels(self) -> Tensor | None:
        """The class of each sample; reads that column of all row groups, one at a time."""
        if self._label is None:
            return None
        return torch.cat([self._labels_in(group, self._label) for group in self._groups])

    def _labels_in(self, group: RowGroup, label: Callable[[pa.Table, str], Tensor]) -> Tensor:
        try:
            return label(group.checked(self._label_columns), group.place)
        except UnreadableError as error:
            if not self._skip_bad:
                raise DataError(f"{error}; {self._advice}") from None
            return torch.full((len(group),), UNREADABLE)

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(self._groups[0].fragment.physical_schema.names)

    def column(self, name: str) -> NDArray[Any] | None:
        """The values of a column; reads it of all row groups, one at a time."""
        if name not in self.columns:
            return None
        import pyarrow as pa

        # Values may be texts, of which numbers in the order of the values are as good and take less memory.
        pieces = [group.checked([name]).column(0).combine_chunks() for group in self._groups]
        encoded = pa.chunked_array(pieces).combine_chunks()
        return encoded.to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The samples at ``indices``.

        Raises:
            DataError: one is in a row group that cannot be read; names the file and the row group.
        """
        rows: tuple[Tensor, ...] = ()
        for group, here, places in self._by_group(indices):
            tensors = self._tensors(group)
            if tensors is None:
                raise DataError(f"{self._groups[group].place} cannot be read, and samples of it are asked for")
            if len(here) == len(indices):
                return tuple(one.index_select(0, places) for one in tensors)
            rows = rows or tuple(one.new_empty(len(indices), *one.shape[1:]) for one in tensors)
            for whole, one in zip(rows, tensors, strict=True):
                whole[here] = one.index_select(0, places)
        if not rows:
            readable = next(tensors for tensors in map(self._tensors, range(len(self._groups))) if tensors is not None)
            return tuple(one[:0] for one in readable)
        return rows

    def present(self, indices: Tensor) -> Tensor:
        """Those of ``indices`` that are in row groups which can be read; all of them unless bad ones are skipped."""
        if not self._skip_bad:
            return indices
        bad = [here for group, here, _ in self._by_group(indices) if self._tensors(group) is None]
        if not bad:
            return indices
        keep = torch.ones(len(indices), dtype=torch.bool)
        keep[torch.cat(bad)] = False
        return indices[keep]

    def _by_group(self, indices: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Row groups that hold ``indices``: which of the indices, and which rows; those in memory come first."""
        groups = torch.from_numpy(np.searchsorted(self._ends, indices.numpy(), side="right"))
        wanted = groups.unique().tolist()
        for group in sorted(wanted, key=lambda one: one not in self._cache):
            here = (groups == group).nonzero().flatten()
            yield group, here, indices[here] - int(self._ends[group] - len(self._groups[group]))

    def _tensors(self, number: int) -> tuple[Tensor, ...] | None:
        """A row group as tensors; ``None`` if it cannot be read and is skipped."""
        if number in self._bad:
            return None
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self._groups[number]
        try:
            tensors = self._decode(group.checked(self._decode.columns), group.place)
        except UnreadableError as error:
            if not self._skip_bad:
                raise DataError(f"{error}; {self._advice}") from None
            _LOG.warning("%s; left out", error)
            self._bad.add(number)
            if len(self._bad) == len(self._groups):
                raise DataError("not one row group can be read") from None
            return None
        self.num_reads += 1
        self._cache[number] = tensors
        while len(self._cache) > max(1, self.window) and sum(map(_nbytes, self._cache.values())) > self._memory:
            self._cache.popitem(last=False)
        return tensors


def _nbytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without its encoding: of categories (a dictionary) their values."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, whatever encodes them: files of one table may differ in that."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts, or categories that are texts."""
    import pyarrow as pa

    return pa.types.is_string(plain_type(kind))


def numbers_of(column: pa.ChunkedArray, name: str, place: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A column of numbers as an array of ``dtype``, shape (n,), or (n, k) if its values are lists of k numbers.

    Raises:
        DataError: there are nulls, or lists of different lengths.
    """
    import pyarrow as pa

    if column.null_count:
        raise DataError(f"{place}: column {name} has {column.null_count} nulls; fill them, or leave those rows out")
    array = column.combine_chunks()
    num_rows = len(array)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = array.value_lengths().unique()
        if len(lengths) > 1:
            raise DataError(f"{place}: the lists of column {name} have different lengths; features must have one shape")
        array = array.flatten()
    elif pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if array.null_count:
        raise DataError(f"{place}: column {name} has nulls in its lists")
    values = array.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return (
        values
        if len(values) == num_rows and values.ndim == 1 and not _is_listed(column)
        else values.reshape(num_rows, -1)
    )


def _is_listed(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa

    kind = column.type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# --- classes ----------------------------------------------------------------------------------------------------------


def checked_classes(table: pa.Table, label: str, place: str, classes: int) -> Tensor:
    """A column of classes, int64, shape (r,).

    Raises:
        DataError: one is not among the classes, or the column holds something else.
    """
    labels = numbers_of(table.column(label), label, place, np.dtype(np.int64))
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        what = f"column {label} has the class {wrong}, and classes are 0 to {classes - 1}"
        raise DataError(f"{place}: {what}; raise task.classes, or number the classes from 0")
    return torch.from_numpy(labels.copy())


@files.remembered
def num_classes(key: str, path: str, label: str) -> int:
    """The largest label, plus one: from the files' footers, or else by reading that column.

    Raises:
        DataError: the label is no column of whole numbers.
    """
    from pyarrow import types

    schema, groups = open_row_groups(key, path)
    kind = require_column("task.label", schema, label).type
    if not types.is_integer(kind) and not types.is_boolean(kind):
        raise DataError(f"task.label: column {label} is {kind}; classes must be whole numbers, from 0")
    return 1 + max(_greatest(group, label) for group in groups)


def _greatest(group: RowGroup, label: str) -> int:
    (info,) = group.fragment.row_groups
    known: dict[str, Any] = (info.statistics or {}).get(label) or {}
    if known.get("max") is not None:
        return int(known["max"])
    return int(numbers_of(group.checked([label]).column(label), label, group.place, np.dtype(np.int64)).max())
