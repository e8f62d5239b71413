"""Row groups: samples in Parquet files, of which a process holds a few row groups at a time.

The files' footers, with the number of rows of each row group, are known for all samples. A row group is read when a
sample of it is drawn, turned into tensors, and dropped when others need its place. So memory is bounded by

    max(``memory_mb``, ``mixed`` row groups) + 2 row groups while one is read

whatever the size of the data set, each row group as tensors (float32 features take 4 bytes per value).
"""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from starling.actors.data import contents, files
from starling.actors.data.columns import codes_of, is_finite, plain, plain_type
from starling.actors.data.indices import Ranges
from starling.algorithms.errors import DataError
from starling.algorithms.registry import did_you_mean
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pyarrow as pa
    import pyarrow.dataset
    from numpy.typing import NDArray
    from torch import Tensor

_LOG = logging.getLogger("starling")


class UnreadableError(DataError):
    """A file's content is damaged; a task may leave it out."""


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file, or some of its rows."""

    fragment: pyarrow.dataset.ParquetFileFragment
    number: int
    """Number in its file."""
    start: int
    stop: int
    """Rows ``start`` to ``stop`` of the group belong to the data."""

    @property
    def place(self) -> str:
        """The row group's name in messages."""
        return f"{self.fragment.path}, row group {self.number}"

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read columns of the row group's rows."""
        table = self.fragment.to_table(columns=list(columns), use_threads=False)
        return table.slice(self.start, self.stop - self.start)

    def checked(self, columns: Sequence[str]) -> pa.Table:
        """Read columns, and check them.

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

    def statistics(self, column: str) -> tuple[Any, Any] | None:
        """The least and the greatest value of a column as the footer has them; ``None``: one has to read it.

        Reads this column's alone: another column's may be of a kind that pyarrow cannot read.
        """
        import pyarrow as pa

        (info,) = self.fragment.row_groups
        metadata: Any = self.fragment.metadata.row_group(info.id)
        for number in range(metadata.num_columns):
            if metadata.column(number).path_in_schema == column:
                try:
                    known = metadata.column(number).statistics
                    return (known.min, known.max) if known is not None and known.has_min_max else None
                except pa.ArrowException:
                    return None
        return None


def open_row_groups(key: str, path: str) -> tuple[pa.Schema, list[RowGroup]]:
    """The schema, and all row groups in the order of the files' paths. Reads footers alone.

    Types are those of the values (``plain_type``): files may differ in how these are encoded, in the order of columns,
    and in whether values may be missing.

    Raises:
        DataError: a file is missing, is no Parquet, or has another schema than the first.
    """
    opened = _opened(key, path)
    return opened.schema, opened.groups


class _Opened(NamedTuple):
    schema: pa.Schema
    groups: list[RowGroup]
    index_columns: frozenset[str]


@files.remembered
def _opened(key: str, path: str) -> _Opened:
    import pyarrow as pa
    import pyarrow.dataset

    listing = files.find(key, path, {".parquet", ".pq"})
    checked = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    kind = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=checked)
    groups: list[RowGroup] = []
    index: set[str] = set()
    merged: pa.Schema | None = None
    for file in listing.files:
        try:
            fragment = kind.make_fragment(file, listing.filesystem)
            schema = fragment.physical_schema
            pieces = fragment.split_by_row_group()
        except (OSError, pa.ArrowException) as error:
            raise DataError(files.unreachable(key, f"{files.shown(path)} ({file})", error)) from None
        index |= _index_of(schema)
        plain = pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])
        merged = plain if merged is None else _merged(key, merged, plain, listing.files[0], file)
        for piece in pieces:
            (info,) = piece.row_groups
            if info.num_rows:
                groups.append(RowGroup(piece, info.id, 0, info.num_rows))
    if not groups or merged is None:
        raise DataError(f"{key}: {files.shown(path)} has no rows")
    named = {name for file in listing.files for name in _OF_FOLDERS.findall(listing.relative(file))} - set(merged.names)
    if named:
        what = f"{key}: folders of {files.shown(path)} are named by {listed(sorted(named))}"
        files.say_once(f"folders {path}", f"{what}, and such columns are not read; write them into the files")
    return _Opened(merged, groups, frozenset(index))


def index_columns(key: str, path: str) -> frozenset[str]:
    """Columns that are the index of a pandas frame: numbers of rows, and no data."""
    return _opened(key, path).index_columns


def _index_of(schema: pa.Schema) -> set[str]:
    names = {name for name in schema.names if _INDEX.fullmatch(name)}
    try:
        known = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
        return names | {name for name in known if isinstance(name, str)}  # a range of numbers is no column
    except (ValueError, AttributeError, TypeError):
        return names


_OF_FOLDERS = re.compile(r"(?:^|/)([^/=]+)=[^/]*(?=/)")
"""Hive and Spark write columns into names: ``user=3/part-0.parquet``."""
_INDEX = re.compile(r"__index_level_\d+__")


def _merged(key: str, first: pa.Schema, other: pa.Schema, first_file: str, file: str) -> pa.Schema:
    """Merge two files' schemas: the columns that both have in one type, in any order, nullable or not.

    A column that has no values in one file has the other's type.

    Raises:
        DataError: they differ.
    """
    import pyarrow as pa

    what = f"{key}: {file} has another schema than {first_file}"
    if sorted(first.names) != sorted(other.names):
        more = sorted(set(other.names) - set(first.names))
        lacking = sorted(set(first.names) - set(other.names))
        told = f"it lacks the column {lacking[0]}" if lacking else f"it has the columns {listed(more)} besides"
        raise DataError(f"{what}: {told if more or lacking else 'it has columns of one name twice'}")
    fields: list[pa.Field] = []
    for place, field in enumerate(first):
        # Of columns that share a name one only knows the place.
        unique = first.names.count(field.name) == 1
        found = other.field(field.name) if unique else other.field(place)
        if pa.types.is_null(field.type):
            fields.append(found)
        elif pa.types.is_null(found.type) or found.type == field.type:
            fields.append(field)
        else:
            raise DataError(f"{what}: column {field.name} is {found.type}, not {field.type}")
    return pa.schema(fields)


def require_column(key: str, schema: pa.Schema, name: str) -> pa.Field:
    """Return the field of a column.

    Raises:
        DataError: there is none of that name, or there are several.
    """
    if name not in schema.names:
        raise DataError(f"{key}: there is no column {name!r}{did_you_mean(name, schema.names)}")
    if schema.names.count(name) > 1:
        count = schema.names.count(name)
        raise DataError(f"{key}: there are {count} columns {name!r}; give them different names (a join leaves such)")
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
        label: makes the classes of a row group, if samples have any.
        label_columns: what it is made of.
        memory_mb: how much of what was read is kept, in 10⁶ bytes.
        mixed: how many row groups an epoch mixes with one another; that many are always kept.
        whole: whether row groups are dealt to nodes as a whole.
        skip_bad: leave out a row group that cannot be read, with a warning, instead of stopping.
        option: the field of the task that says so.
    """

    owners = None
    class_names: Sequence[str] | None = None
    """Names of the classes, in the order of their numbers; None if they have none."""

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
        """Blocks of samples that partitions deal to nodes as a whole."""
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

    def content(self) -> Iterator[bytes]:
        """Pieces of the files, for a fingerprint; and of all row groups what the footers say of their size."""
        infos = [(group.fragment.row_groups[0], group) for group in self._groups]
        yield json.dumps(
            [(one.num_rows, one.total_byte_size, group.start, group.stop) for one, group in infos]
        ).encode()
        paths = {group.fragment.path: group.fragment.filesystem for group in self._groups}
        if paths:
            yield from contents.of_files(next(iter(paths.values())), list(paths))

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(self._groups[0].fragment.physical_schema.names)

    def column(self, name: str) -> NDArray[Any] | None:
        """The values of a column, numbered in their order; reads it of all row groups, one at a time."""
        if name not in self.columns:
            return None
        if self.columns.count(name) > 1:
            raise DataError(f"data.partition.column: there are {self.columns.count(name)} columns {name!r}")
        import pyarrow as pa

        # Numbered in the order of the values: of texts that takes less memory, and it is all that is asked for.
        pieces = [chunk for group in self._groups for chunk in self._column_of(group, name).chunks]
        codes, missing = codes_of(pa.chunked_array(pieces), name)
        if missing:
            what = f"data.partition.column: {missing} of {len(codes)} rows have no {name}"
            files.say_once(f"missing {name}", f"{what}; these are taken for rows of one value, the last")
        return codes

    def _column_of(self, group: RowGroup, name: str) -> pa.ChunkedArray:
        import pyarrow as pa

        kind = next((plain_type(one.fragment.physical_schema.field(name).type) for one in self._groups), pa.null())
        try:
            return plain(group.checked([name]).column(0)).cast(kind)
        except UnreadableError as error:
            if not self._skip_bad:
                raise DataError(f"{error}; {self._advice}") from None
            return pa.chunked_array([pa.nulls(len(group), kind)])

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

    def where(self, index: int) -> str:
        """The file, the row group and the row of a sample, and which of its columns are not finite."""
        group, _, places = next(self._by_group(torch.tensor([index])))
        row = int(places[0])
        table = self._groups[group].checked(list(self._decode.columns)).slice(row, 1)
        bad = [name for name in table.column_names if not is_finite(table.column(name)[0].as_py())]
        what = f"{self._groups[group].place}, row {row}"
        return f"{what}: column {listed(bad)} is NaN or infinite" if bad else what

    def present(self, indices: Tensor) -> Tensor:
        """Return the ``indices`` whose row groups can be read; all of them unless bad ones are skipped."""
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
