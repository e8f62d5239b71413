"""Texts: a corpus of files, or a column of Parquet files, as one row of bytes or tokens, split into two parts.

Every tenth file is held out. A single file, and a folder of fewer than ten, holds out its last tenth instead. At most
``max_bytes`` are read. Beyond 64 MB the tokens lie in an unnamed temporary file that ends with the process; they then
use the system's page cache and not the process's memory.
"""

from __future__ import annotations

import codecs
import functools
import os
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from starling.actors.data import contents, files
from starling.actors.data.columns import is_text, plain
from starling.actors.data.row_groups import open_row_groups, require_column
from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

_SUFFIXES = frozenset({".py", ".txt", ".md"})
_SKIPS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
_HOLD_OUT_EVERY = 10
_IN_MEMORY_BYTES = 64_000_000
_AT_ONCE = 1_000_000
"""Characters that are tokenized at once, or the next line end after them."""


class Encoding(Protocol):
    """An encoding of texts as numbers; hashable, as it names loaded corpora."""

    def load(self) -> tuple[Callable[[str], list[int]] | None, int]:
        """The function, ``None`` for the bytes themselves, and how many numbers there are.

        Raises:
            DataError: it cannot be loaded.
        """
        ...


@dataclass(frozen=True)
class Bytes:
    """A byte is a token."""

    def load(self) -> tuple[None, int]:
        """Return no function, and 256."""
        return None, 256


@dataclass(frozen=True)
class TokenizerFile:
    """A ``tokenizer.json`` of Hugging Face's tokenizers, or a folder with one."""

    path: str

    def load(self) -> tuple[Callable[[str], list[int]], int]:
        """Return the tokenizer's function, without the special tokens that it may add around a text."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise DataError("task.tokenizer needs the package tokenizers: pip install '.[hf]'") from None
        place = Path(self.path).expanduser()
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.is_file():
            raise DataError(f"task.tokenizer: {file} does not exist here; name a tokenizer.json, or a folder with one")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions
            raise DataError(f"task.tokenizer: {file} is not a tokenizer: {_first_line(error)}") from None
        # Both may be saved with it, and are meant for batches of sentences: a corpus is neither cut nor filled up.
        tokenizer.no_padding()
        tokenizer.no_truncation()

        def encode(text: str) -> list[int]:
            try:
                return tokenizer.encode(text, add_special_tokens=False).ids
            except Exception as error:  # noqa: BLE001 - as above
                raise DataError(f"task.tokenizer: {file} cannot encode the corpus: {_first_line(error)}") from None

        return encode, vocabulary_size(tokenizer.get_vocab(with_added_tokens=True))


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """The highest number of a token plus one: numbers may have gaps, as reserved and added tokens leave them.

    >>> vocabulary_size({"a": 0, "b": 7})
    8
    """
    return 1 + max(vocabulary.values(), default=0)


@dataclass(frozen=True, eq=False)
class Text:
    """One part of a corpus."""

    tokens: NDArray[Any]
    """uint8, uint16 or uint32; not to be written to."""
    ends: NDArray[np.int64]
    """End of each file's tokens."""


class Windows:
    """Consecutive windows of a text, drawn from by index."""

    owners = None
    columns = ("file",)

    def __init__(self, text: Text, length: int) -> None:
        self._text = text
        self._windows = text.tokens[: len(text.tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def column(self, name: str) -> NDArray[np.int64] | None:
        """Return column ``file``: the number of the file in which each window begins, in the order of their paths."""
        starts = np.arange(len(self)) * self._windows.shape[1]
        return np.searchsorted(self._text.ends, starts, side="right") if name == "file" else None

    def content(self) -> Iterator[NDArray[np.uint8]]:
        """Pieces of the tokens, for a fingerprint."""
        return contents.of_memory(np.ascontiguousarray(self._windows).reshape(-1).view(np.uint8))

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The windows at ``indices``, one tensor of int64, shape (b, length)."""
        return (torch.from_numpy(self._windows[indices.numpy()].astype(np.int64)),)


def load_corpus(
    corpus: str | None,
    column: str | None,
    max_bytes: int,
    encoding: Encoding,
    *,
    split: bool = True,
    key: str = "task.corpus",
) -> tuple[Text, Text, int]:
    """Training and held-out text, and the size of the vocabulary; read once per process, while files stay as they are.

    Args:
        corpus: a file, a folder, a pattern or a URI; ``None``: the sources of Python's standard library.
        column: of texts, if the files are Parquet.
        max_bytes: that are read at most, both parts together.
        encoding: how they become numbers.
        split: hold out a tenth; else the held-out text is empty.
        key: of the configuration that names the corpus, for errors.

    Raises:
        DataError: it cannot be read.
    """
    suffixes = _SUFFIXES if column is None else {".parquet", ".pq"}
    listing = None if corpus is None else files.find(key, corpus, suffixes)
    written = () if listing is None else (listing.files, listing.sizes, listing.stamps)
    return _load(corpus, column, max_bytes, encoding, split, key, written)


@functools.lru_cache(maxsize=4)
def _load(
    corpus: str | None,
    column: str | None,
    max_bytes: int,
    encoding: Encoding,
    split: bool,  # noqa: FBT001 - as above
    key: str,
    written: tuple[tuple[object, ...], ...],
) -> tuple[Text, Text, int]:
    del written
    encode, vocabulary = encoding.load()
    dtype = np.dtype(np.uint8 if vocabulary <= 2**8 else np.uint16 if vocabulary <= 2**16 else np.uint32)
    train, held_out = _Writer(dtype), _Writer(dtype)
    room, num_files = max_bytes, 0
    for name, pieces in _columns(key, corpus, column) if column is not None else _plain(key, corpus):
        if room == 0:
            break
        num_files += 1
        writer = train if not split or num_files % _HOLD_OUT_EVERY else held_out
        writer.begin_file(name)
        for piece in _limited(pieces(room), room):
            room -= len(piece)
            writer.add(piece, encode)
        writer.end_file(encode, is_cut=room == 0)
    if not split or num_files >= _HOLD_OUT_EVERY:
        return train.done(), held_out.done(), vocabulary
    text = train.done()
    cut = len(text.tokens) - len(text.tokens) // _HOLD_OUT_EVERY
    first = Text(text.tokens[:cut], np.minimum(text.ends, cut))
    return first, Text(text.tokens[cut:], np.maximum(text.ends - cut, 0)), vocabulary


@dataclass(frozen=True)
class TextSource:
    """The source of a task's texts, from its fields of these names."""

    corpus: str | None
    column: str | None
    validation: str | None
    max_bytes: int
    encoding: Encoding
    length: int
    """Tokens of a window."""

    def train(self) -> Windows:
        """The texts that are not held out."""
        files.refuse_per_node("task.corpus", self.corpus)
        return self._windows(self.texts()[0], self.corpus, "training", "task.corpus")

    def of_node(self, node: int) -> Windows | None:
        """The texts of one node; ``None`` if all have the same."""
        if self.corpus is None or not files.is_per_node(self.corpus):
            return None
        corpus = files.of_node(self.corpus, node)
        text = load_corpus(corpus, self.column, self.max_bytes, self.encoding, split=False)[0]
        return self._windows(text, corpus, "training", "task.corpus")

    def held_out(self) -> Windows:
        """The held-out texts."""
        if self.validation is None and files.is_per_node(self.corpus):
            files.require_common("task.validation", None)
        if self.validation is None:
            return self._windows(self.texts()[1], self.corpus, "validation", "task.corpus")
        return self._windows(self.texts()[1], self.validation, "validation", "task.validation")

    def texts(self) -> tuple[Text, Text]:
        """Both, as a baseline needs them; of federated texts the held-out one twice."""
        if self.validation is None:
            return load_corpus(self.corpus, self.column, self.max_bytes, self.encoding)[:2]
        out = load_corpus(
            self.validation, self.column, self.max_bytes, self.encoding, split=False, key="task.validation"
        )[0]
        if files.is_per_node(self.corpus):
            return out, out
        return load_corpus(self.corpus, self.column, self.max_bytes, self.encoding, split=False)[0], out

    def _windows(self, text: Text, corpus: str | None, part: str, key: str) -> Windows:
        windows = Windows(text, self.length)
        unit = "bytes" if isinstance(self.encoding, Bytes) else "tokens"
        if len(windows) == 0:
            raise DataError(
                f"{key}: {describe(corpus)} has {len(text.tokens)} {unit} of {part} text, less than one sample of "
                f"{self.length}; lower task.context, or name a larger corpus"
            )
        return windows


def describe(corpus: str | None) -> str:
    """Describe a corpus in words."""
    return files.shown(corpus) if corpus is not None else f"the standard library ({sysconfig.get_paths()['stdlib']})"


def _limited(pieces: Iterator[bytes], room: int) -> Iterator[bytes]:
    for piece in pieces:
        yield piece[:room]
        room -= len(piece[:room])
        if room == 0:
            return


_Pieces = tuple[str, "Callable[[int], Iterator[bytes]]"]
"""A file's name for errors, and what gives its bytes, at most so many."""


def _plain(key: str, corpus: str | None) -> Iterator[_Pieces]:
    if corpus is None:
        for path in _standard_library():
            yield f"{key}: {path}", functools.partial(_read_local, path)
        return
    listing = files.find(key, corpus, _SUFFIXES)
    for path in listing.files:
        yield f"{key}: {path}", functools.partial(_read, key, corpus, listing, path)


def _read_local(path: Path, room: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield file.read(room)
    except OSError as error:
        raise DataError(f"task.corpus: {describe(None)} cannot be read: {error}") from None


def _read(key: str, corpus: str, listing: files.Listing, path: str, room: int) -> Iterator[bytes]:
    try:
        with listing.filesystem.open_input_stream(path) as stream:
            while room and (piece := stream.read(min(room, 8 * _AT_ONCE))):
                yield piece
                room -= len(piece)
    except OSError as error:
        raise DataError(files.unreachable(key, corpus, error)) from None


def _columns(key: str, corpus: str | None, column: str) -> Iterator[_Pieces]:
    """Each Parquet file's texts, a line end after each."""
    import pyarrow as pa

    if corpus is None:
        raise DataError("task.corpus: name the Parquet files whose column task.column is")
    schema, groups = open_row_groups(key, corpus)
    kind = require_column("task.column", schema, column).type
    if not is_text(kind):
        raise DataError(f"task.column: column {column} is {kind}; it must hold texts (string)")
    by_file: dict[str, list[Any]] = {}
    for group in groups:
        by_file.setdefault(group.fragment.path, []).append(group)

    def texts(of: list[Any], room: int) -> Iterator[bytes]:
        for group in of:
            if room <= 0:
                return
            # As bytes: a column of texts may hold some that are none, and they are looked at when they are encoded.
            for text in plain(group.checked([column]).column(0)).cast(pa.large_binary()).to_pylist():
                piece = (text or b"") + b"\n"
                yield piece
                room -= len(piece)

    for file, of in by_file.items():
        yield f"{key}: column {column} of {file}", functools.partial(texts, of)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        # In place: what is skipped is not walked either; site-packages may hold a hundred thousand files.
        folders[:] = [name for name in folders if name not in _SKIPS and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix == ".py" and path.is_file()]
    if not found:
        raise DataError(f"task.corpus: {describe(None)} has no .py files")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


class _Writer:
    """Takes bytes, keeps tokens: in memory, or, when they are many, in a file without a name."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._pieces: list[NDArray[Any]] = []
        self._file: Any = None
        self._waiting = b""
        self._count = 0
        self._kept = 0
        self._ends: list[int] = []
        self._name, self._offset = "", 0

    def begin_file(self, name: str) -> None:
        """Begin another file."""
        self._name, self._offset = name, 0

    def add(self, piece: bytes, encode: Callable[[str], list[int]] | None) -> None:
        """More bytes of the file that is being read."""
        if encode is None:
            self._append(np.frombuffer(piece, dtype=np.uint8))
            return
        self._waiting += piece
        while len(self._waiting) > _AT_ONCE and (cut := self._waiting.find(b"\n", _AT_ONCE) + 1):
            self._encode(self._waiting[:cut], encode)
            self._waiting = self._waiting[cut:]

    def end_file(self, encode: Callable[[str], list[int]] | None, *, is_cut: bool = False) -> None:
        """End a file, or the wanted part of it."""
        if encode is not None and self._waiting:
            self._encode(self._waiting, encode, is_cut=is_cut)
            self._waiting = b""
        self._ends.append(self._count)

    def _encode(self, piece: bytes, encode: Callable[[str], list[int]], *, is_cut: bool = False) -> None:
        start = len(codecs.BOM_UTF8) if not self._offset and piece.startswith(codecs.BOM_UTF8) else 0
        try:
            # A file that max_bytes cuts may end within a character.
            text = codecs.getincrementaldecoder("utf-8")().decode(piece[start:], final=not is_cut)
        except UnicodeDecodeError as error:
            where = f"at byte {self._offset + start + error.start}"
            raise DataError(f"{self._name} is not UTF-8 {where}; convert it (iconv -t UTF-8)") from None
        self._offset += len(piece)
        self._append(np.array(encode(text), dtype=self._dtype))

    def _append(self, tokens: NDArray[Any]) -> None:
        self._count += len(tokens)
        self._kept += tokens.nbytes
        self._pieces.append(tokens)
        if self._kept > _IN_MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is mapped
        for piece in self._pieces:
            self._file.write(piece.tobytes())
        self._pieces, self._kept = [], 0

    def done(self) -> Text:
        """Return the collected corpus."""
        ends = np.array(self._ends, dtype=np.int64)
        if self._file is None:
            empty = np.empty(0, dtype=self._dtype)
            return Text(np.concatenate([empty, *self._pieces]), ends)
        self._spill()
        self._file.flush()
        tokens = cast("NDArray[Any]", np.memmap(self._file, dtype=self._dtype, mode="r"))
        self._file.close()  # the mapping stays
        return Text(tokens, ends)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
