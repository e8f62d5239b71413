"""Writes checkpoints in a background thread, beside training."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starling.orchestrator.checkpoints.filesystems import LONGEST_S
from starling.orchestrator.errors import CheckpointError, NodeGoneError, StarlingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.store import CheckpointStore

PAUSES_S = (1.0, 5.0, 25.0)
"""Pauses in seconds before each retry of a refused write; after the last retry the checkpoint is given up."""

_AT_EXIT_S = 10.0
_LOG = logging.getLogger("starling")


@dataclass
class _Job:
    number: int
    controller: Mapping[str, Any]
    nodes: _Kept


class CheckpointWriter:
    """Writes checkpoints one after the other, in a thread of its own.

    Args:
        store: where to; used by nobody else for writing.
        say: told at once of ``checkpoint_retry`` (with ``error``, ``pause_s``, ``is_first``), ``checkpoint_failed`` and
            ``checkpoint_written`` (with what ``take`` gives); called in the thread.
        pauses_s: before each repetition.
    """

    def __init__(
        self,
        store: CheckpointStore,
        say: Callable[[str, Mapping[str, Any]], None],
        *,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._store = store
        self._say = say
        self._pauses_s = tuple(pauses_s)
        self._changed = threading.Condition()
        """Guards all of what follows."""
        self._waiting: deque[_Job] = deque()
        self._is_writing = False
        self._is_closing = False
        self._is_hasty = False
        self._num_given_up = 0
        """Checkpoints given up since the last written one: a storage that is known to fail is asked once each time."""
        self._outcomes: list[Mapping[str, Any]] = []
        self._thread: threading.Thread | None = None
        self.num_written = 0
        self.num_failed = 0
        self.num_retries = 0
        self.seconds_writing = 0.0

    def submit(self, number: int, controller: Mapping[str, Any], nodes: Iterable[tuple[NodeId, StateExport]]) -> None:
        """Write a checkpoint as soon as those before it are done; returns at once.

        Args:
            number: of the round after which it is made.
            controller: plain JSON; not to be changed any more.
            nodes: consumed in the thread, once, and may block there. If it raises, the checkpoint is given up. What it
                yields is kept until the checkpoint is written or given up, and must not change meanwhile.

        Raises:
            RuntimeError: the writer is closed.
        """
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the writer of checkpoints is closed")
            self._waiting.append(_Job(number, controller, _Kept(nodes)))
            if self._thread is None:
                # After pyarrow has registered the end of its S3 client, and so called before it.
                atexit.register(self._end)
                self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        with self._changed:
            return self._has_work()

    def join(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is written or given up; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._has_work(), timeout_s)

    def hasten(self) -> None:
        """Repeat nothing from now on: somebody waits."""
        with self._changed:
            self._is_hasty = True
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Write what was submitted, once, and repeat nothing; give up what is being written after ``timeout_s``.

        Returns:
            Whether the thread has ended. If not, the process's end waits for it, ``storage.LONGEST_S`` at most.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._store.stop()
            return False
        atexit.unregister(self._end)
        return True

    def _end(self) -> None:
        # A thread that is within pyarrow's S3 client when the interpreter goes takes the process with it (SIGABRT).
        if not self.close(_AT_EXIT_S) and self._thread is not None:
            self._thread.join(LONGEST_S)

    def take(self) -> list[Mapping[str, Any]]:
        """Return the outcomes of checkpoints since the last call.

        Each outcome has these keys:

        * ``round``, ``nbytes``, and ``seconds`` and ``cpu_seconds`` of this thread in all attempts, without pauses;
        * ``error``: ``None``, or why the checkpoint was not written;
        * ``is_gone``: a node died that was to give its state; the next commit can be saved;
        * ``retries``, and ``untidy``: why old checkpoints could not be removed;
        * ``given_up``: how many checkpoints in a row the storage did not take, up to this one or just before it.
        """
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
            return outcomes

    def _has_work(self) -> bool:
        return self._is_writing or bool(self._waiting)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                # Without a limit: nobody waits for this thread to wait less.
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._is_writing = True
            outcome = self._carry_out(job)
            del job  # what it refers to is as large as the run's state
            self._tell("checkpoint_failed" if outcome["error"] else "checkpoint_written", outcome)
            with self._changed:
                self._outcomes.append(outcome)
                self.num_written += outcome["error"] is None
                self.num_failed += outcome["error"] is not None
                self.seconds_writing += outcome["seconds"]
                self._is_writing = False
                self._changed.notify_all()

    def _carry_out(self, job: _Job) -> dict[str, Any]:
        nbytes, retries, seconds, cpu_seconds, is_gone = 0, 0, 0.0, 0.0, False
        # Also when the run has ended meanwhile: what was due is saved, however fast its rounds were.
        while True:
            began, cpu_began = time.monotonic(), time.thread_time()
            error: str | None = None
            again = False
            try:
                nbytes = self._store.write(job.number, job.controller, job.nodes)
            except CheckpointError as problem:
                error = str(problem)
                again = retries < len(self._pauses_s) and not self._num_given_up and not self._is_hasty
            except _SourceError as problem:
                error = f"checkpoint of round {job.number}: its data are not there: {problem}"
                is_gone = problem.is_gone
            except Exception as problem:  # noqa: BLE001 - whatever it is, training goes on
                error = f"checkpoint of round {job.number}: {type(problem).__name__}: {problem} (a bug in Starling)"
            seconds += time.monotonic() - began
            cpu_seconds += time.thread_time() - cpu_began
            if not again or not self._pause(job.number, error, retries):
                break
            retries += 1
        before = self._num_given_up
        self._num_given_up = before + 1 if error and not is_gone else 0 if error is None else before
        return {
            "round": job.number,
            "nbytes": nbytes,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "error": error,
            "is_gone": is_gone,
            "retries": retries,
            "untidy": None if error else self._store.untidy,
            "given_up": self._num_given_up if error else before,
        }

    def _pause(self, number: int, error: str | None, retries: int) -> bool:
        """Wait before the next attempt; return whether there is one."""
        if self._is_closing or self._is_hasty:
            return False
        pause_s = self._pauses_s[retries]
        self._tell("checkpoint_retry", {"round": number, "error": error, "pause_s": pause_s, "is_first": not retries})
        with self._changed:
            if self._changed.wait_for(lambda: self._is_closing or self._is_hasty, pause_s):
                return False
            self.num_retries += 1
            return True

    def _tell(self, what: str, facts: Mapping[str, Any]) -> None:
        try:
            self._say(what, facts)
        except Exception as error:  # noqa: BLE001 - the thread must go on
            _LOG.warning("%s could not be reported: %s: %s", what, type(error).__name__, error)


class _SourceError(Exception):
    """The data of a checkpoint cannot be had.

    Args:
        message: why.
        is_gone: a node died that was to give them; others can, next time.
    """

    def __init__(self, message: str, *, is_gone: bool) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class _Kept:
    """Replay an iterable any number of times; it is consumed once, and lazily."""

    def __init__(self, nodes: Iterable[tuple[NodeId, StateExport]]) -> None:
        self._rest = iter(nodes)
        self._have: list[tuple[NodeId, StateExport]] = []

    def __iter__(self) -> Iterator[tuple[NodeId, StateExport]]:
        yield from self._have
        while True:
            try:
                one = next(self._rest)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - of a node, of its machine, of Ray
                text = str(error) if isinstance(error, StarlingError | RuntimeError) else ""
                message = text or f"{type(error).__name__}: {error}"
                raise _SourceError(message, is_gone=isinstance(error, NodeGoneError)) from None
            self._have.append(one)
            yield one
