"""The spool: what is to be recorded of a run, in a file of its directory, until a tracker has taken it.

The training side appends lines to ``tracking.jsonl`` and waits for nobody. One thread, for one run or for all runs of a
sweep, sends them to the tracker and notes its progress in ``mlflow.json``. So a tracker that goes away delays nothing,
one that comes back misses nothing, and what is left when the process dies is sent another time.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.observers import finite
from starling.orchestrator.records.run_files import SentFile
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPOOL, STATE = "tracking.jsonl", "mlflow.json"
TRIALS_OF = "tracking"
"""The folder of a sweep that has a folder with the spool of each trial."""

_READ_BYTES = 4_000_000
"""Bytes read at a time."""


class _Operation(BaseModel):
    """A line; which of the fields there are depends on ``op``, and who carries it out says so if one is missing."""

    model_config = ConfigDict(extra="ignore", strict=True)

    op: str
    at: Annotated[int, Field(ge=0, lt=2**62)] = 0
    step: Annotated[int, Field(ge=0, lt=2**62)] = 0
    values: dict[str, str | int | float | bool | None] = {}
    tags: dict[str, str] = {}
    name: str = ""
    key: str = ""
    parent: str | None = None
    text: str = ""
    path: str = ""
    run_dir: str = ""
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"


_STATE, _OPERATION = TypeAdapter(SentFile), TypeAdapter(_Operation)


class Spool:
    """Appends what is to be recorded; of one run, by one process.

    Args:
        folder: the run's directory.
        on_append: called after each line, in the thread of who appends.
    """

    def __init__(self, folder: Path, on_append: Callable[[], None] = lambda: None) -> None:
        self._folder = Folder(folder)
        self._on_append = on_append
        self._lock = threading.Lock()

    def append(self, operation: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        """Add an operation.

        Raises:
            OSError: the disk is full, say.
        """
        line = json.dumps(finite({"op": operation, **facts}), ensure_ascii=False) + "\n"
        with self._lock, self._folder.append(SPOOL) as file:
            file.write(line.encode())
        self._on_append()


class SpoolReader:
    """Reads the operations of a spool, and notes which of them are sent.

    Never raises when it is made: what is wrong with its files is its ``problem``, and then nothing is sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = SentFile()
        self.problem: str | None = None
        self._files = Folder(folder)
        try:
            self.state = run_files.read(self._files, STATE, _STATE) or self.state  # nothing was sent yet
            size = self._size()
            if size is None or (self.state.ended and size < self.state.offset):
                self.state = self.state.model_copy(update={"offset": 0})  # all was sent, and it begins anew
            elif size < self.state.offset:
                self.problem = f"{folder / STATE}: offset is {self.state.offset}, and {SPOOL} has {size} bytes"
        except ConfigError as error:
            self.problem = str(error)

    def _size(self) -> int | None:
        try:
            return self._files.size(SPOOL)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.folder / SPOOL}: {run_files.reason(error)}") from None

    @property
    def is_empty(self) -> bool:
        """Tell whether all that is there has been sent."""
        try:
            return self._files.size(SPOOL) <= self.state.offset
        except OSError:
            return True

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Operations that are not sent yet, and the offset after each; a line that is still written is left out.

        Raises:
            ConfigError: a line is none of an operation, or has no end.
        """
        try:
            with self._files.open(SPOOL) as file:
                file.seek(self.state.offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return [], []
        where = f"{self.folder / SPOOL}, byte"
        if len(data) == _READ_BYTES and b"\n" not in data:
            raise ConfigError(f"{where} {self.state.offset}: a line of it has more than {_READ_BYTES} bytes")
        operations, offsets, offset = [], [], self.state.offset
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            begin, offset = offset, offset + len(line)
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut off by the death of who wrote it, and gone on with after that
            operations.append(run_files.checked(_OPERATION, line, f"{where} {begin}").model_dump())
            offsets.append(offset)
        return operations, offsets

    def note(self, **changes: Any) -> None:  # noqa: ANN401 - fields of SentFile
        """Remember a change of the state, on disk."""
        self.state = self.state.model_copy(update=changes)
        self._files.write(STATE, self.state.model_dump_json().encode())

    def forget(self) -> None:
        """Remove the spool of a run that is over and sent; keep the file that says which of MLflow's runs it is."""
        if self.is_empty and self.state.ended:
            self._files.remove(SPOOL)
            self.note(offset=0)
