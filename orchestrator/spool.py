"""The spool: what is to be recorded of a run, in a file of its directory, until a tracker has taken it.

Whoever trains appends lines to ``tracking.jsonl`` and waits for nobody; whoever sends them to the tracker (one thread,
for one run or for all runs of a sweep) notes in ``mlflow.json`` how far it has come. So a tracker that goes away
delays nothing, one that comes back misses nothing, and what is left when the process dies is sent another time.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.records import finite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPOOL, STATE = "tracking.jsonl", "mlflow.json"

_READ_BYTES = 4_000_000
"""At a time."""


class Spool:
    """Appends what is to be recorded; of one run, by one process.

    Args:
        folder: the run's directory.
        on_append: called after each line, in the thread of who appends.
    """

    def __init__(self, folder: Path, on_append: Callable[[], None] = lambda: None) -> None:
        self._path = folder / SPOOL
        self._on_append = on_append
        self._lock = threading.Lock()

    def append(self, operation: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        """Add an operation.

        Raises:
            OSError: the disk is full, say.
        """
        line = json.dumps(finite({"op": operation, **facts}), ensure_ascii=False) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._on_append()


@dataclass
class State:
    """How far a run's spool has been sent."""

    offset: int = 0
    """Bytes."""
    run_id: str | None = None
    """The tracker's name for the run."""
    tried: bool = False
    """The tracker was asked to make the run, and may have done so."""
    ended: bool = False


class Outbox:
    """The other side of a spool: reads operations, and notes which of them are sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = State()
        with contextlib.suppress(OSError, ValueError, TypeError):  # nothing was sent yet
            self.state = State(**json.loads((folder / STATE).read_text(encoding="utf-8")))

    @property
    def is_empty(self) -> bool:
        """Whether all that is there has been sent."""
        try:
            return (self.folder / SPOOL).stat().st_size <= self.state.offset
        except OSError:
            return True

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Operations that are not sent yet, and the offset after each; a line that is still written is left out."""
        try:
            with (self.folder / SPOOL).open("rb") as file:
                file.seek(self.state.offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return [], []
        operations, offsets, offset = [], [], self.state.offset
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            try:
                operations.append(json.loads(line))
            except ValueError:
                continue  # cut off by the death of who wrote it, and gone on with after that
            offsets.append(offset)
        return operations, offsets

    def note(self, **changes: Any) -> None:  # noqa: ANN401 - fields of State
        """Remember a change of the state, on disk."""
        for name, value in changes.items():
            setattr(self.state, name, value)
        partial = self.folder / f".{STATE}.partial"
        partial.write_text(json.dumps(vars(self.state)), encoding="utf-8")
        partial.replace(self.folder / STATE)

    def forget(self) -> None:
        """All is sent, and the run is over: the spool is not needed any more; who the run is, stays."""
        if self.is_empty and self.state.ended:
            (self.folder / SPOOL).unlink(missing_ok=True)
            self.note(offset=0)
