"""Filesystems for checkpoints: a folder of this machine, or a URI that pyarrow reaches.

All paths are ``folder/file`` below a root. Every failure is an ``OSError``, whichever library found it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from starling.actors.data.files import is_uri, printable, shown
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

Piece: TypeAlias = bytes | memoryview

CONNECT_TIMEOUT_S = 3.0
REQUEST_TIMEOUT_S = 5.0
"""Seconds without a byte after which a request to an object store fails; clients make at most three attempts."""
LONGEST_S = 30.0
"""Longest wait for the storage after ``Storage.stop``, in seconds."""

_FLAT = ("s3", "gcs", "abfs")
"""Stores of objects, in which folders need not be made."""
_CHUNK = 16 * 1024 * 1024
"""Bytes written or read at a time."""
_WINDOW = 4 * _CHUNK
"""Bytes that an object store's client may hold back while it sends them."""


class Storage(Protocol):
    """A place for files in folders."""

    shown: str
    """Address for messages, without a password."""

    def folders(self) -> dict[str, set[str]]:
        """The folders that are there, and the names of the files in each; empty where nothing was ever written."""
        ...

    def put(self, path: str, pieces: Iterable[Piece]) -> None:
        """Write a file; it will survive a power cut when this returns."""
        ...

    def put_whole(self, path: str, data: bytes) -> None:
        """Write a file atomically: at each moment it is whole, or as it was before."""
        ...

    def get(self, path: str, most: int) -> Bytes:
        """The first ``most`` bytes of a file, or all that it has."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        ...

    def stop(self) -> None:
        """Refuse all from now on: what is under way in another thread fails as soon as it can."""
        ...


def open_storage(uri: str | None, default: Path, *below: str) -> Storage:
    """The storage at a URI or a local path, in the folder ``below`` it; without one, that at ``default``.

    Raises:
        ConfigError: it is no URI that pyarrow knows.
    """
    if uri is None:
        return LocalStorage(default.parent, default.name)
    if not is_uri(uri):
        return LocalStorage(Path(uri).expanduser().absolute(), *below)
    try:
        filesystem, root = FileSystem.from_uri(_bounded_uri(uri))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ConfigError(f"checkpoint.uri: {shown(uri)} cannot be used: {_without(uri, one_line(error))}") from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalStorage(Path(root), *below)
    if not root.strip("/"):
        raise ConfigError(f"checkpoint.uri: {shown(uri)} cannot be used: it names no bucket")
    address = shown(uri).partition("?")[0]
    place = "/".join(below)
    return RemoteStorage(_bounded(filesystem), f"{root.rstrip('/')}/{place}", f"{address.rstrip('/')}/{place}")


class _Stoppable:
    _stopped = False

    def stop(self) -> None:
        self._stopped = True

    def _go_on(self) -> None:
        if self._stopped:
            raise OSError("given up, as the run has ended")

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        self._go_on()
        try:
            yield
        except pa.ArrowException as error:
            raise OSError(one_line(error)) from None


class LocalStorage(_Stoppable):
    """A folder of this machine. Contents are on the disk (fsync) before a name refers to them for good."""

    def __init__(self, root: Path, *below: str) -> None:
        """``root`` is taken as it is; no folder ``below`` it, and nothing in them, is reached through a link."""
        self._folder = Folder(root, *below)
        self.shown = str(self._folder)

    def folders(self) -> dict[str, set[str]]:
        return self._folder.folders()

    def put(self, path: str, pieces: Iterable[Piece]) -> None:
        with self._folder.create(path) as file:
            for piece in _chunks(pieces):
                self._go_on()
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def put_whole(self, path: str, data: bytes) -> None:
        above, _, name = path.rpartition("/")
        partial = f"{above}/.{name}.partial"
        self.put(partial, [data])
        self._folder.sync(above)  # the names of the other files, before the one that vouches for them
        self._folder.rename(partial, path)
        for folder in (above, "."):
            self._folder.sync(folder)

    def get(self, path: str, most: int) -> Bytes:
        with self._folder.open(path) as file:
            return _filled(file, min(os.fstat(file.fileno()).st_size, most))

    def remove(self, path: str) -> None:
        self._folder.remove(path)

    def remove_folder(self, folder: str) -> None:
        self._folder.remove_folder(folder)


class RemoteStorage(_Stoppable):
    """A file system of pyarrow. On stores of objects a file appears when it was written to its end, whole."""

    def __init__(self, filesystem: FileSystem, root: str, shown: str, *, is_flat: bool | None = None) -> None:
        self._filesystem = filesystem
        self._root = root
        self._is_flat = filesystem.type_name in _FLAT if is_flat is None else is_flat
        self.shown = shown

    def folders(self) -> dict[str, set[str]]:
        with self._operation():
            infos = self._filesystem.get_file_info(FileSelector(self._root, allow_not_found=True, recursive=True))
        found: dict[str, set[str]] = {}
        for info in infos:
            folder, _, name = info.path.removeprefix(self._root).lstrip("/").partition("/")
            files = found.setdefault(folder, set())
            if info.type == FileType.File and name:
                files.add(name)
        return found

    def put(self, path: str, pieces: Iterable[Piece]) -> None:
        place = f"{self._root}/{path}"
        with self._operation():
            if not self._is_flat:
                self._filesystem.create_dir(place.rpartition("/")[0], recursive=True)
            with self._filesystem.open_output_stream(place, compression=None) as stream:
                pending = 0
                for piece in _chunks(pieces):
                    self._go_on()
                    stream.write(piece)
                    pending += len(piece)
                    if pending >= _WINDOW:
                        stream.flush()  # waits for what is being sent: else all of a file would be held in memory
                        pending = 0

    def put_whole(self, path: str, data: bytes) -> None:
        if self._is_flat:
            self.put(path, [data])
            return
        partial = f"{path}.partial"
        self.put(partial, [data])
        with self._operation():
            self._filesystem.move(f"{self._root}/{partial}", f"{self._root}/{path}")

    def get(self, path: str, most: int) -> Bytes:
        with self._operation(), self._filesystem.open_input_file(f"{self._root}/{path}") as file:
            return _filled(file, min(file.size(), most))

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._operation():
            self._filesystem.delete_file(f"{self._root}/{path}")

    def remove_folder(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._operation():
            self._filesystem.delete_dir(f"{self._root}/{folder}")


def one_line(error: BaseException) -> str:
    """Return a library's error message, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return printable(lines[0][:300])


def remove_files(storage: Storage, folder: str, files: Collection[str]) -> None:
    """Remove some files of a folder."""
    for name in sorted(files):
        storage.remove(f"{folder}/{name}")


# --- pyarrow ---------------------------------------------------------------------------------------------------------


def _bounded_uri(uri: str) -> str:
    """Google's client repeats for a quarter of an hour unless told otherwise, and is told so here."""
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={REQUEST_TIMEOUT_S:.0f}"
    return uri


def _bounded(filesystem: FileSystem) -> FileSystem:
    """Limit how long a file system waits; a URI has no place for the limits of S3."""
    if filesystem.type_name != "s3":
        return filesystem
    _, (options,) = cast("tuple[Any, tuple[dict[str, Any]]]", filesystem.__reduce__())
    limits = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    return type(filesystem)(**(options | limits))


def _without(uri: str, text: str) -> str:
    """A text in which a URI may have been quoted, without its password."""
    text = text.replace(uri, shown(uri))
    password = urlsplit(uri).password
    for secret in {password, unquote(password)} if password else ():
        text = text.replace(secret, "***")
    return text


# --- bytes -----------------------------------------------------------------------------------------------------------


def _chunks(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]


def _filled(file: Any, nbytes: int) -> Bytes:  # noqa: ANN401 - Python's files and pyarrow's have no type in common
    """The next ``nbytes`` of a file, or fewer if it ends."""
    data = np.empty(nbytes, dtype=np.uint8)
    view, done = data.data, 0
    while done < nbytes:
        count = file.readinto(view[done : done + _CHUNK])
        if not count:
            return data[:done]
        done += count
    return data
