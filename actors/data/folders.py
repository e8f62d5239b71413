"""Local folders: all files below one, each once, however many links and names lead to it.

Pyarrow follows a link that leads back into its folder some forty times, until the system refuses.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Walk:
    """The files below a folder."""

    files: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, bytes, and when it was written in nanoseconds; of several names of one file the first that is no link."""
    repeated: list[tuple[str, str]] = field(default_factory=list)
    """Names of files and folders that are there already, and where; names of folders end with a slash."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """Links that cannot be followed, and what they name."""


def walk(base: str) -> Walk:
    """Find all files below ``base``; links are followed, also out of it.

    A file or folder below the root is known by its own name, not by a link's. So links are followed after all else, and
    links behind links later still.

    Raises:
        OSError: a folder cannot be read.
    """
    found, seen = Walk(), dict[object, str]()
    waiting, links = deque([base]), list[str]()
    while waiting or links:
        if not waiting:
            for link in sorted(links):
                if os.path.isdir(link):  # noqa: PTH112 - paths are texts here, thousands of them
                    waiting.append(link)
                else:
                    _add(link, found, seen)
            links.clear()
            continue
        folder = waiting.popleft()
        if _is_there(folder, os.stat(folder), found, seen):  # noqa: PTH116
            continue
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            path = f"{folder.rstrip('/')}/{entry.name}"
            if entry.is_symlink():
                links.append(path)
            elif entry.is_dir():
                waiting.append(path)
            else:
                _add(path, found, seen)
    return found


def _add(path: str, found: Walk, seen: dict[object, str]) -> None:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        target = os.readlink(path) if os.path.islink(path) else "?"  # noqa: PTH114, PTH115
        found.broken.append((path, target))
        return
    if stat.S_ISREG(status.st_mode) and not _is_there(path, status, found, seen):
        found.files.append((path, status.st_size, status.st_mtime_ns))


def _is_there(path: str, status: os.stat_result, found: Walk, seen: dict[object, str]) -> bool:
    # Some file systems of networks number nothing.
    identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    if identity in seen:
        found.repeated.append((path + "/" * stat.S_ISDIR(status.st_mode), seen[identity]))
        return True
    seen[identity] = path
    return False
