"""Watches the processes of a Ray of our own that a run cannot do without, and reports one that ends or is stopped.

A stopped process (SIGSTOP, a debugger, a machine that swaps) may block the controller inside a call of Ray's, where no
signal reaches it. So that every wait ends, it is killed after a while, as a node that hangs is: that call fails then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LOG = logging.getLogger("starling")
_PERIOD_S = 0.5
_STOPPED, _GONE = "Tt", "ZX"


class Vitals:
    """Watches processes in a thread of its own.

    Args:
        processes: ids by name.
        patience_s: how long one may stand still before it is ended.
        on_end: called in the thread, once, with the name of one that has ended.
    """

    def __init__(self, processes: Mapping[str, int], patience_s: float, on_end: Callable[[str], None]) -> None:
        self._processes = dict(processes)
        self._patience_s = patience_s
        self._on_end = on_end
        self._stopped: dict[str, float] = {}
        """Time at which each process was first seen stopped, by name."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starling-vitals", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_PERIOD_S):
            for name, pid in self._processes.items():
                state = state_of(pid)
                if state is None or state in _GONE:
                    self._on_end(name)
                    return
                self._look(name, pid, is_stopped=state in _STOPPED)

    def _look(self, name: str, pid: int, *, is_stopped: bool) -> None:
        now, since = time.monotonic(), self._stopped.get(name)
        if not is_stopped:
            if self._stopped.pop(name, None) is not None:
                _LOG.warning("Ray's %s (process %d) goes on", name, pid)
        elif since is None:
            self._stopped[name] = now
            _LOG.warning(
                "Ray's %s (process %d) is stopped: little goes on without it; it is ended in %g s, and the run with it",
                name,
                pid,
                self._patience_s,
            )
        elif now - since >= self._patience_s:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def hasten(self) -> None:
        """Kill stopped processes at once from now on."""
        self._patience_s = 0.0

    def stop(self) -> None:
        """Stop watching. Never raises."""
        self._over.set()
        self._thread.join(timeout=2 * _PERIOD_S)


def state_of(pid: int) -> str | None:
    """Return the system's letter for a process's state; None without such a process, ``"?"`` if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else "?"
    except (OSError, IndexError):
        return "?"
