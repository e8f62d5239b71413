"""Cleans up after a process that started a Ray of its own and was killed before it could end it. Run as a script.

It waits until its standard input ends, which only that process holds open. Then it kills every process that still runs
for the given folder, and removes the folder. It imports the standard library alone, and is up in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_TIMEOUT_S = 30.0
_PAUSE_S = 0.2
_DISMISS_S = 5.0
_TITLE = b"ray::"


def watch(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start a watcher; return None if it cannot be started: then the next Ray that is started here cleans up."""
    with contextlib.suppress(OSError):
        return subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-I", "-S", __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # what is sent to all processes of a terminal is not meant for it
        )
    return None


def dismiss(watcher: subprocess.Popen[bytes]) -> None:
    """End a watcher whose folder is gone, in bounded time."""
    if watcher.stdin is not None:
        with contextlib.suppress(OSError):
            watcher.stdin.close()
    try:
        watcher.wait(_DISMISS_S)
    except subprocess.TimeoutExpired:
        watcher.kill()
        watcher.wait()


def clean(folder: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Kill Ray's processes of a folder and remove it, again and again until nothing is left or the time is over."""
    deadline = time.monotonic() + timeout_s
    while folder.exists() and time.monotonic() < deadline:
        for number in processes_of(folder):
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(_PAUSE_S)


def processes_of(folder: Path) -> list[int]:
    """Return the ids of the servers, agents and workers of the Ray whose files are in the folder.

    Servers were started with a path in it. Agents and workers show a title in place of their arguments, which also
    overwrites their variables, but write logs there. So may what others have started with such a log for its output.
    """
    name, found = os.fsencode(folder) + b"/", []
    with contextlib.suppress(OSError):  # not every system has it
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                    title = (entry / "cmdline").read_bytes()
                    if name in title or (title.startswith(_TITLE) and _has_open(entry, folder.resolve())):
                        found.append(int(entry.name))
    return found


def _has_open(process: Path, folder: Path) -> bool:
    for number in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if number.readlink().is_relative_to(folder):
                return True
    return False


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]))
