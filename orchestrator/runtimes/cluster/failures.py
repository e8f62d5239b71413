"""One-line reasons why a Ray of our own does not start, or has ended: from its output, its files, and the machine."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import deque
from typing import TYPE_CHECKING

from starling.orchestrator.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LEAST_FREE = 64 * 1024 * 1024
"""Bytes that a disk must have free for Ray's logs."""

_MOST = 200
"""Longest reason, in characters."""
_LAST_LINES = 200

_FATAL = re.compile(r"^\[.*? C \d+ \d+\] (?:\([^)]*\) )?(?:\S+:\d+: )?\s*(?P<text>.*)")
"""Last words of Ray's C++ processes before they abort."""
_WORDY = re.compile(r".*Check failed:\s*(?:\w+\.has_value\(\)\s*)?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")

_SERVERS = ("gcs_server", "raylet", "dashboard", "dashboard_agent", "runtime_env_agent")


class TimedOutError(ClusterError):
    """A Ray of our own has not come up within the time that it gives itself."""


def not_writable(folder: Path | str, error: OSError) -> ClusterError:
    """Return the error for a folder to which Ray's files cannot be written."""
    return ClusterError(
        f"cluster.address local: Ray does not start: its files cannot be written to {folder} "
        f"({error.strerror or error}); make room there, or set TMPDIR to a folder with a short path (20 characters)"
    )


def not_started(error: Exception, logs: Path) -> ClusterError:
    """Return the error to raise for an exception of Ray's start; its processes' files are in ``logs``."""
    if isinstance(error, ClusterError):
        return error
    if isinstance(error, OSError) and error.strerror and error.filename:
        return not_writable(error.filename, error)
    reason = _without_paths(_first_line(error))
    told = said_last(logs)
    if told:
        reason += f"; {_without_paths(told)}"
    kind = TimedOutError if "timed out" in str(error).lower() else ClusterError
    return kind(f"cluster.address local: Ray does not start: {reason}; {_advice(logs)}")


def said_last(logs: Path, servers: Sequence[str] = _SERVERS) -> str | None:
    """Return the last words of the first of Ray's servers that gave up; None if none did."""
    for server in servers:
        for suffix in ("err", "out", "log"):
            text = _last_words(logs / f"{server}.{suffix}")
            if text:
                return f"{server} said: {text}"
    return None


def _last_words(path: Path) -> str | None:
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in reversed(deque(file, _LAST_LINES)):
            found = _FATAL.match(line)
            text = _WORDY.sub("", found["text"]) if found else line if _EXCEPTION.match(line) else ""
            if text.strip():
                return text.strip()[:_MOST]
    return None


def _advice(folder: Path) -> str:
    with contextlib.suppress(OSError):
        place = next(one for one in (folder, *folder.parents) if one.exists())
        if shutil.disk_usage(place).free < _LEAST_FREE:
            return "the disk of its temporary folder is full: make room there, or set TMPDIR"
    return "a machine that is busy or short of memory may need another try; starling simulate needs no Ray"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _without_paths(text: str) -> str:
    """Remove paths of the temporary folder, which is gone by the time they are read."""
    return re.sub(r"\s*\(?\S*/starling-\S*", "", text)[:_MOST]
