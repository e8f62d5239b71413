"""The lease: of all controllers that may think that a run is theirs, one decides.

It is a file in the run directory. The controller that made it last holds it, and checks its ownership before each
commit. So a controller that was taken for dead (stopped, cut off, on a machine that hung) and comes back commits
nothing. Taking it over is possible when its holder is dead: its process is gone or, on another machine, has not renewed
it for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from starling.orchestrator.errors import ConfigError, LeaseError, LeaseLostError
from starling.orchestrator.process_identity import started_at
from starling.orchestrator.records import run_files
from starling.orchestrator.records.run_files import LeaseFile
from starling.orchestrator.safe_files import Folder

_NAME = "lease.json"
_LEASE = TypeAdapter(LeaseFile)
_RENEW_S = 5.0
_POLL_S = 0.1
_EXPIRED_S = 30.0
"""Seconds without renewal after which a holder on another machine is taken for dead."""
_SKEW_S = 86400.0
"""Most seconds by which another machine's clock may be ahead; a lease from later than that is invalid."""


class Lease:
    """Held from here until ``release``.

    Args:
        run_dir: of the run.
        wait_s: for a holder who is ending.

    Raises:
        LeaseError: another controller holds it and is alive, or the file cannot be written.
    """

    def __init__(self, run_dir: Path, *, wait_s: float = 0.0) -> None:
        self._path = run_dir / _NAME
        limit = time.monotonic() + wait_s
        while (holder := _holder(run_dir)) is not None and holder.problem is not None:
            if time.monotonic() >= limit:
                raise LeaseError(holder.problem)
            time.sleep(_POLL_S)
        self._facts = {
            "owner": secrets.token_hex(8),
            "token": (0 if holder is None else holder.token) + 1,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": started_at(os.getpid()),
        }
        self._lock = threading.Lock()
        self._inode = -1
        try:
            self._write(first=holder is None)
        except FileExistsError:
            raise LeaseError(
                f"run directory {run_dir}: another controller has just begun to drive this run; "
                "wait until it has ended, or end it"
            ) from None
        except OSError as error:
            raise LeaseError(f"{self._path} cannot be written: {error.strerror}") from None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="starling-lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> int:
        """Grows with each holder."""
        return self._facts["token"]

    def check(self) -> None:
        """Look whether the lease is still held; a few microseconds.

        Raises:
            LeaseLostError: another controller has taken it over.
        """
        with self._lock:
            if not self._is_ours():
                raise LeaseLostError(
                    f"{self._path}: another controller has taken this run over, taking this one for dead; "
                    "this one commits nothing more"
                )

    def release(self) -> None:
        """Hold it no longer. Never raises."""
        self._over.set()
        self._thread.join(timeout=_RENEW_S)
        with self._lock, contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _renew(self) -> None:
        while not self._over.wait(_RENEW_S):
            with self._lock, contextlib.suppress(OSError):
                if not self._is_ours():
                    return
                self._write()

    def _is_ours(self) -> bool:
        try:
            return self._path.stat(follow_symlinks=False).st_ino == self._inode
        except OSError:
            return False

    def _write(self, *, first: bool = False) -> None:
        """Put a new file in the place of what is there; its inode names us."""
        partial = self._path.with_name(f".{_NAME}.{self._facts['owner']}")
        try:
            with partial.open("x", encoding="utf-8") as file:
                json.dump(self._facts | {"renewed": time.time()}, file)
                inode = os.fstat(file.fileno()).st_ino
            if first:
                os.link(partial, self._path)  # of two that begin at the same time one fails
            else:
                partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._inode = inode


@dataclass(frozen=True)
class _Holder:
    """Holder of a lease, present or past."""

    token: int
    problem: str | None
    """Why it cannot be taken over now."""


def _holder(run_dir: Path) -> _Holder | None:
    """Read the holder of a run's lease; return None if there is no lease."""
    try:
        facts = run_files.read(Folder(run_dir), _NAME, _LEASE)
    except ConfigError as error:
        return _Holder(0, _damage(run_dir / _NAME, error))
    if facts is None:
        return None
    who = f"the controller with pid {facts.pid} on {facts.host} drives this run; wait until it has ended, or end it"
    return _Holder(facts.token, f"run directory {run_dir}: {who}" if _is_alive(facts) else None)


def _damage(path: Path, error: ConfigError) -> str | None:
    """Why a lease that cannot be read is not taken over: whoever holds it writes it anew every few seconds."""
    try:
        written = path.stat(follow_symlinks=False).st_mtime
    except OSError as other:
        return str(error) if not isinstance(other, FileNotFoundError) else None
    if abs(time.time() - written) >= _EXPIRED_S:
        return None
    return (
        f"{error}; it was written less than {_EXPIRED_S:.0f} s ago, and somebody may drive the run: try again in "
        f"{_EXPIRED_S:.0f} s"
    )


def _is_alive(facts: LeaseFile) -> bool:
    """Whether the holder of a lease still drives its run."""
    if facts.host != platform.node():
        return -_SKEW_S < time.time() - facts.renewed < _EXPIRED_S
    # A number may be another process's by now.
    return facts.started is not None and facts.started == started_at(facts.pid)
