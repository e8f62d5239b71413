"""Files: a path of the configuration becomes a file system and the files on it; local, s3, gcs, hdfs by pyarrow."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starling.actors.data import folders
from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager

    from pyarrow.fs import FileSystem

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or a role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME, and az login or a managed identity",
}
_REFUSALS = (
    "ACCESS_DENIED",
    "Forbidden",
    "403",
    "401",
    "credential",
    "Credential",
    "INVALID_ACCESS_KEY_ID",
    "Unauthorized",
)
_WILDCARDS = re.compile(r"[*?\[]")
_SKIPPED = re.compile(r"(^|/)(\.[^/]*|__pycache__)(/|$)")
_SKIPPED_TABLES = re.compile(r"(^|/)(\.[^/]*|_[^/=]*)(/|$)")
"""Spark, Delta and Hive keep what is no data beside the data; ``_a=1`` is a folder of a partition."""
_TABLES = frozenset({".parquet", ".pq"})
_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
"""Folders whose tables say in a log which of their files are valid."""
_LOG = logging.getLogger("starling")


@dataclass(frozen=True)
class Listing:
    """Files that a path names, in the order of their paths."""

    filesystem: FileSystem
    files: tuple[str, ...]
    """Paths on the file system."""
    sizes: tuple[int, ...]
    """Size of each file, in bytes."""
    stamps: tuple[int, ...]
    """Modification time of each file, in nanoseconds."""
    root: str
    """Directory that relative paths start from."""

    def open(self, path: str) -> AbstractContextManager[object]:
        """A file's bytes, as a stream."""
        return self.filesystem.open_input_stream(path)

    def relative(self, path: str) -> str:
        """A file's path below the root."""
        return path.removeprefix(self.root).lstrip("/") or path.rpartition("/")[2]


def shown(path: str) -> str:
    """A path without the key that may be in it.

    >>> shown("s3://AKIA:secret@bucket/part.parquet")
    's3://AKIA:***@bucket/part.parquet'
    """
    return re.sub(r"^([^:/]+://[^:@/]*):[^@]*@", r"\1:***@", path)


_F = TypeVar("_F", bound="Callable[..., Any]")
_forget: list[Callable[[], None]] = []


def remembered(function: _F) -> _F:
    """Keep what a function has found out about files, until a run begins anew in this process (``forget``)."""
    cached = functools.lru_cache(maxsize=8)(function)
    _forget.append(cached.cache_clear)
    return cast("_F", cached)


def forget() -> None:
    """Look at files again: they may have been written anew since the last run of this process."""
    _said.clear()
    for clear in _forget:
        clear()


_said: set[str] = set()


def say_once(topic: str, text: str) -> None:
    """Warn of one ``topic`` once in a run: files are listed several times, and faults come in thousands."""
    if topic not in _said:
        _said.add(topic)
        _LOG.warning("%s", text)


_NODE = "{node}"
"""Stands for a node's number in a path of ``data.source: federated``."""


def is_per_node(path: str | None) -> bool:
    """Whether a path is another one on each node."""
    return path is not None and _NODE in path


def of_node(path: str, node: int) -> str:
    """The path of one node.

    >>> of_node("/data/site-{node}.parquet", 3)
    '/data/site-3.parquet'
    """
    return path.replace(_NODE, str(node))


def refuse_per_node(key: str, path: str | None) -> None:
    """Refuse to take a path that is another one on each node for that of all.

    Raises:
        DataError: it is.
    """
    if is_per_node(path):
        raise DataError(f"{key}: {path} has {_NODE} in it: each node has data of its own; set data.source: federated")


def require_common(key: str, path: str | None) -> str:
    """The path of what all nodes can read.

    Raises:
        DataError: there is none.
    """
    if path is None or is_per_node(path):
        raise DataError(
            f"{key}: name data that all nodes can read; with {_NODE} in the path of the others none are common"
        )
    return path


def is_uri(path: str) -> bool:
    """Whether a path names a file system of its own."""
    return "://" in path


def find(key: str, path: str, suffixes: Collection[str] = ()) -> Listing:
    """The files that ``path`` names: itself, those in a folder at any depth, or those that match a pattern.

    Args:
        key: of the configuration, for errors.
        path: a local path or a URI; may hold ``*``, ``?``, ``[…]`` and, for folders at any depth, ``**``.
        suffixes: what files of a folder end with, lower case; without any all are taken.

    Raises:
        DataError: there are none, or they cannot be reached.
    """
    from pyarrow.fs import FileType

    filesystem, place = _resolve(key, path)
    pattern = _WILDCARDS.search(place)
    try:
        # A path that is there is no pattern, whatever characters it has.
        if pattern and not is_uri(path) and filesystem.get_file_info(place).type != FileType.NotFound:
            pattern = None
        base = place[: pattern.start()].rpartition("/")[0] if pattern else place
        info = filesystem.get_file_info(base or "/")
        if info.type == FileType.File and not pattern:
            return Listing(filesystem, (place,), (info.size or 0,), (info.mtime_ns or 0,), place.rpartition("/")[0])
        if info.type == FileType.NotFound:
            raise DataError(f"{key}: {shown(path)} does not exist here; name a file, a folder or a pattern")
        if info.type != FileType.Directory:
            raise DataError(f"{key}: {shown(path)} is neither a file nor a folder")
        walk = _below(filesystem, base or "/")
    except OSError as error:
        raise DataError(unreachable(key, path, error)) from None
    matches = re.compile(_translated(place)).fullmatch if pattern else None
    shows_hidden = pattern is not None and re.search(r"/[._]", place[len(base) :]) is not None

    def is_hidden(file: str) -> bool:
        skipped = _SKIPPED_TABLES if _suffix(file) in _TABLES else _SKIPPED
        return not shows_hidden and skipped.search(file.removeprefix(base)) is not None

    def is_meant(file: str) -> bool:
        named = matches(file) is not None if matches else not suffixes or _suffix(file) in suffixes
        return named and not is_hidden(file)

    kept = [one for one in walk.files if is_meant(one[0])]
    _say(key, path, base, walk, is_meant)
    if not kept:
        what = f"matches no file in {base}" if pattern else f"has no {' or '.join(sorted(suffixes)) or 'files'} files"
        hidden = "; names that begin with . or _ are left out" if any(is_hidden(one[0]) for one in walk.files) else ""
        raise DataError(f"{key}: {shown(path)} {what}{hidden}")
    kept.sort(key=lambda one: one[0].removeprefix(base))
    paths, sizes, stamps = zip(*kept, strict=True)
    return Listing(filesystem, paths, sizes, stamps, base)


def _below(filesystem: FileSystem, base: str) -> folders.Walk:
    """All files of a folder, at any depth, each once."""
    from pyarrow.fs import FileSelector, FileType

    if filesystem.type_name == "local":
        return folders.walk(base)
    found = filesystem.get_file_info(FileSelector(base, recursive=True))
    return folders.Walk([(one.path, one.size or 0, one.mtime_ns or 0) for one in found if one.type == FileType.File])


def _say(key: str, path: str, base: str, walk: folders.Walk, is_meant: Callable[[str], bool]) -> None:
    """Say what is read otherwise than one may think.

    Raises:
        DataError: what is meant cannot be reached.
    """
    for link, target in walk.broken:
        if is_meant(link):
            raise DataError(f"{key}: {link} is a link to {target}, which cannot be read; mend or remove it")
    for file, _, _ in walk.files:
        if is_meant(file) and not _is_text(file):
            raise DataError(f"{key}: the name of {file.encode(errors='surrogateescape')!r} is no UTF-8; rename it")
    # Of a folder that is not looked into nobody knows what it has.
    again = [
        one
        for one in walk.repeated
        if (not _SKIPPED.search(one[0].removeprefix(base)) if one[0].endswith("/") else is_meant(one[0]))
    ]
    for one, first in again[:_MANY]:
        say_once(f"{one} {first}", f"{key}: {one} leads to {first}, which is read already; left out")
    if len(again) > _MANY:
        say_once(f"repeated {base}", f"{key}: {base} has {len(again) - _MANY} more such names; left out")
    for folder, form in _FORMATS.items():
        if any(f"/{folder}/" in file.removeprefix(base) for file, _, _ in walk.files):
            what = f"{key}: {shown(path)} is a {form} table"
            say_once(f"{form} {path}", f"{what}: all Parquet files in it are read, whatever its log says of them")


_MANY = 3
"""Names that are said one by one."""


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve(key: str, path: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(path):
        return LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise DataError(unreachable(key, path, error)) from None


def unreachable(key: str, path: str, error: BaseException) -> str:
    """Return a file system's error as one line, with a hint about missing credentials."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    scheme = path.partition("://")[0].lower()
    hint = ""
    if scheme in _CREDENTIALS and any(word in str(error) for word in _REFUSALS):
        hint = (
            f"; the process needs credentials: {_CREDENTIALS[scheme]} (cluster.runtime_env.env_vars reaches all nodes)"
        )
    return f"{key}: {shown(path)} cannot be read: {printable(lines[0][:300])}{hint}"


def printable(text: str) -> str:
    """A text without control characters, which damaged files bring into error messages."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _translated(pattern: str) -> str:
    return "".join(_pieces(pattern))


def _pieces(pattern: str) -> Iterator[str]:
    """A shell pattern as a regular expression."""
    tokens = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if token in tokens:
            yield tokens[token]
        elif token.startswith("[") and len(token) > 1:
            yield f"[{token[1:-1].replace('!', '^', 1) if token[1] == '!' else token[1:-1]}]"
        else:
            yield re.escape(token)
