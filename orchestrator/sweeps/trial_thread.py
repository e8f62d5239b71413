"""One run of a sweep, in a thread, seen from outside: ask for its next report, or stop it. Knows no Ray."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.orchestrator.errors import StarlingError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.observers import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starling.orchestrator.records.observers import RoundRecord, Started, Summary

_POLL_S = 0.25
_STOP_TIMEOUT_S = 30.0
"""Seconds that a stopped run may take to close."""
_SPARSE_S = 0.5
"""Seconds between two reports on which no scheduler decides."""


class StoppedError(KeyboardInterrupt):
    """Raised in the run's thread: the run is to end as if it were interrupted."""


class TrialRun:
    """A run in a thread of its own.

    Args:
        train: trains to the end, telling the observer that it is given; its summary.
        last_round: the run's number of rounds.
        stepwise: whether the run waits after each report until it is asked for the next one.
        stop_file: when it is there, the run is to stop.
    """

    def __init__(
        self, train: Callable[[Observer], Summary], last_round: int, *, stepwise: bool, stop_file: Path
    ) -> None:
        self._reporter = _Reporter(last_round, stepwise=stepwise)
        self._stop_file = stop_file
        self._stopped = False
        self._train = train
        self._thread = threading.Thread(target=self._work, name="starling-trial", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """Let the run go on to its next report; the last one has ``done``, ``end``, ``summary`` and ``error``."""
        self._reporter.go.set()
        while True:
            try:
                return self._reporter.reports.get(timeout=_POLL_S)
            except queue.Empty:
                if self._stop_file.exists():
                    self.stop()

    def stop(self) -> None:
        """End the run, wherever it is, and wait until it has closed; bounded. Idempotent."""
        if not self._stopped and self._thread.is_alive():
            self._stopped = True
            if not self._reporter.stop():
                # It computes, or waits for nodes, for a second at most.
                number = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(StoppedError))
        self._thread.join(_STOP_TIMEOUT_S)

    def _work(self) -> None:
        end, summary, error = "finished", None, None
        try:
            summary = self._train(self._reporter)
        except KeyboardInterrupt:
            end = "interrupted"
        except StarlingError as problem:
            end, error = "failed", str(problem).partition("\n")[0]
        except Exception as problem:  # noqa: BLE001 - a mistake of ours or of a task's; one trial of many
            end, error = "failed", f"{type(problem).__name__}: {problem}"
        summary = summary or self._reporter.summary
        self._reporter.reports.put(
            self._reporter.last
            | {"done": True, "end": end, "error": error, "summary": summary.to_json() if summary else None}
        )


class _Reporter(Observer):
    """Observer in the run's thread: makes reports of rounds, and waits where a scheduler decides."""

    def __init__(self, last_round: int, *, stepwise: bool) -> None:
        self.reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.go = threading.Event()
        self.last: dict[str, Any] = {}
        self.summary: Summary | None = None
        self._last_round = last_round
        self._stepwise = stepwise
        self._stopped = False
        self._lock = threading.Lock()
        self._waiting = False
        self._bytes = 0
        self._seconds = 0.0
        self._reported_at = time.monotonic()
        self._metrics: dict[str, float] = {}

    def on_start(self, started: Started) -> None:
        if started.resumed_after is not None:
            for record in recorded(Path(started.run_dir)):
                self.take(record)

    def take(self, record: RoundRecord) -> None:
        """Count a round in."""
        self._bytes += record.payload_bytes
        self._seconds += record.seconds
        self._metrics = record.metrics or self._metrics
        self.last = {
            "rounds": record.round + 1,
            **self._metrics,
            **({} if record.loss is None else {"train_loss": record.loss}),
            "bytes": self._bytes,
            "seconds": self._seconds,
        }
        self.last["reported"] = list(self.last)

    def on_round(self, record: RoundRecord) -> None:
        self.take(record)
        if record.metrics is None or record.round + 1 == self._last_round:
            return
        now = time.monotonic()
        if self._stepwise or now - self._reported_at > _SPARSE_S:
            self._reported_at = now
            self.go.clear()
            self.reports.put(self.last)
            if self._stepwise:
                self._wait()

    def _wait(self) -> None:
        with self._lock:
            self._waiting = True
        # As long as the scheduler takes, which may be hours: a trial that is to stop is told so, and one whose
        # sweep is gone is ended with its process.
        while not self.go.wait(_POLL_S):
            pass
        with self._lock:
            self._waiting = False
            if self._stopped:
                raise StoppedError

    def stop(self) -> bool:
        """Stop the run if it waits here; say whether it does."""
        with self._lock:
            self._stopped = self._waiting
            if self._waiting:
                self.go.set()
            return self._waiting

    def on_end(self, summary: Summary) -> None:
        self.summary = summary


def recorded(run_dir: Path) -> Iterator[RoundRecord]:
    """Read the rounds of a run from its directory."""
    return run_files.rounds(run_dir)


def reports_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the report of each evaluated round of a run, also of those that Tune did not take.

    Raises:
        OSError: its records cannot be read.
        ConfigError: they are damaged.
    """
    reporter = _Reporter(0, stepwise=False)
    found: list[dict[str, Any]] = []
    for record in recorded(run_dir):
        reporter.take(record)
        if record.metrics is not None:
            found.append(reporter.last)
    return found
