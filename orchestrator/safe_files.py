"""Files of a folder that somebody else may have made: no link is followed out of it, and only regular files are opened.

A run directory may come from anywhere. A link in it would make whoever resumes the run write elsewhere, a FIFO would
make them wait for ever, and a sparse file take all of the memory. Paths are taken step by step from the folder on
(``openat`` with ``O_NOFOLLOW``), so that nobody can put a link in the way between a look and the opening.

Every failure is an ``OSError`` whose ``strerror`` can be shown.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_LINE_BYTES = 16 * 1024 * 1024
"""Bytes of a line at most, in a file that is read by lines."""

_BLOCK = 1024 * 1024
_ALWAYS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Folder:
    """A folder, and the files and folders below it.

    Args:
        root: taken as it is, whatever links lead there: whoever types it means it.
        below: folders below the root which are not to be links.
    """

    def __init__(self, root: Path, *below: str) -> None:
        self._root = root
        self._below = below

    def __str__(self) -> str:
        """Return the path of the folder."""
        return str(self._root.joinpath(*self._below))

    # --- reading -----------------------------------------------------------------------------------------------------

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, without a buffer of its own.

        Raises:
            OSError: it is not there, is reached through a link, or is no regular file.
        """
        with self._parent(path) as (folder, name):
            _require(folder, name, stat.S_IFREG)
            descriptor = _opened(folder, name, os.O_RDONLY)
        file = os.fdopen(descriptor, "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was exchanged just now
            file.close()
            raise OSError(errno.EINVAL, "is no regular file", path)
        return cast("BinaryIO", file)

    def read(self, path: str, most: int) -> bytes:
        """The content of a file.

        Raises:
            OSError: as ``open``; or it has more than ``most`` bytes.
        """
        with self.open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise OSError(errno.EFBIG, f"has {size} bytes, and at most {most} make sense", path)
            return b"".join(iter(lambda: file.read(_BLOCK), b""))

    def lines(self, path: str) -> Iterator[bytes]:
        """The lines of a file, each with its end; the last may have none.

        Raises:
            OSError: as ``open``; or a line has more than ``MOST_LINE_BYTES``.
        """
        with self.open(path) as file:
            begun = b""
            while block := file.read(_BLOCK):
                *whole, begun = (begun + block).split(b"\n")
                yield from (line + b"\n" for line in whole)
                if len(begun) > MOST_LINE_BYTES:
                    raise OSError(errno.EFBIG, f"a line of it has more than {MOST_LINE_BYTES} bytes", path)
            if begun:
                yield begun

    def exists(self, path: str) -> bool:
        """Whether something of this name is there, a file or not."""
        try:
            with self._parent(path) as (folder, name):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def refuse_link(self, path: str) -> None:
        """Check that neither ``path`` nor a folder on the way is a link; it need not be there.

        Raises:
            OSError: one is.
        """
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (folder, name):
            _refuse_link(os.stat(name, dir_fd=folder, follow_symlinks=False), name)

    def size(self, path: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            OSError: it is not there, or no file.
        """
        with self._parent(path) as (folder, name):
            return _require(folder, name, stat.S_IFREG).st_size

    def folders(self) -> dict[str, set[str]]:
        """The folders in it, and the names of what is in each; links are none. Empty if it is not there itself."""
        found: dict[str, set[str]] = {}
        try:
            with self._parent(".") as (top, _), os.scandir(top) as entries:
                for name in [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]:
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # somebody has just removed it
                        descriptor = _opened(top, name, os.O_RDONLY | os.O_DIRECTORY)
                        try:
                            found[name] = _names(descriptor)
                        finally:
                            os.close(descriptor)
        except FileNotFoundError:
            return {}
        return found

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self, path: str) -> BinaryIO:
        """A new file, in the place of what is there; its folders are made. A link is replaced, not followed."""
        with self._parent(path, make=True) as (folder, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            descriptor = _opened(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        return os.fdopen(descriptor, "wb")

    def append(self, path: str) -> BinaryIO:
        """A file that is appended to; its folders are made.

        One that is there under another name too (a backup of hard links, or somebody else's file) is copied first.

        Raises:
            OSError: it is a link, or no regular file.
        """
        with self._parent(path, make=True) as (folder, name):
            try:
                known = _require(folder, name, stat.S_IFREG)
            except FileNotFoundError:
                known = None
        if known is not None and known.st_nlink > 1:
            with self.open(path) as source, self.replacement(path) as target:
                while block := source.read(_BLOCK):
                    target.write(block)
        with self._parent(path) as (folder, name):
            descriptor = _opened(folder, name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        file = os.fdopen(descriptor, "ab")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "is no regular file", path)
        return file

    def append_text(self, path: str) -> IO[str]:
        """Open a text file at its end, as ``append`` does; make it if it is missing."""
        return io.TextIOWrapper(self.append(path), encoding="utf-8")

    @contextlib.contextmanager
    def replacement(self, path: str) -> Iterator[BinaryIO]:
        """A file to be written, which takes the place of ``path`` when that is done."""
        self._steps(path)
        above, _, name = path.rpartition("/")
        partial = f"{above}/.{name}.partial" if above else f".{name}.partial"
        try:
            with self.create(partial) as file:
                yield file
            self.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(partial)
            raise

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Write a file that is there whole, or as it was before."""
        with self.replacement(path) as file:
            file.write(data)

    def rename(self, path: str, to: str) -> None:
        """Give a file the name of another in the same folder, whose place it takes."""
        with self._parent(path) as (folder, name):
            os.replace(name, to.rpartition("/")[2], src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self, path: str) -> None:
        """Remove a file, or a link, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_folder(self, path: str) -> None:
        """Remove a folder and the files in it, if it is there; of a link the link alone."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (above, name):
            if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=above)
                return
            descriptor = _opened(above, name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for entry in _names(descriptor):
                    os.unlink(entry, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            os.rmdir(name, dir_fd=above)

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all below it, if it is there; of a link the link alone."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (above, name):
            if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=above)
            else:
                shutil.rmtree(name, dir_fd=above)  # which follows no link either

    def sync(self, path: str = ".") -> None:
        """Have the names in the folder ``path`` on the disk."""
        with self._parent(path) as (above, name):
            descriptor = _opened(above, name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _steps(self, path: str) -> tuple[list[str], str]:
        *folders, name = (*self._below, *path.split("/"))
        if any(one in ("", "..", ".") for one in folders) or name in ("", ".."):
            raise OSError(errno.EINVAL, "leads out of its folder", path)
        return folders, name

    # --- steps -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder in which ``path`` is, opened, and its name there."""
        folders, name = self._steps(path)
        if make:
            self._root.mkdir(parents=True, exist_ok=True)
        here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=here)
                _require(here, folder, stat.S_IFDIR)
                inner = _opened(here, folder, os.O_RDONLY | os.O_DIRECTORY)
                os.close(here)
                here = inner
            yield here, name
        finally:
            os.close(here)


def _require(folder: int, name: str, kind: int) -> os.stat_result:
    """Return the file status of a name, which must be of this kind."""
    known = os.stat(name, dir_fd=folder, follow_symlinks=False)
    found = stat.S_IFMT(known.st_mode)
    if found == kind:
        return known
    _refuse_link(known, name)
    if kind == stat.S_IFDIR:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    raise OSError(errno.EINVAL, f"is {_KINDS.get(found, 'something else')}, and no file", name)


def _refuse_link(known: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(known.st_mode):
        raise OSError(errno.EINVAL, "is a link, and nothing here is reached through links", name)


def _opened(folder: int, name: str, flags: int) -> int:
    return os.open(name, flags | _ALWAYS, 0o666, dir_fd=folder)


def _names(descriptor: int) -> set[str]:
    with os.scandir(descriptor) as entries:
        return {entry.name for entry in entries}
