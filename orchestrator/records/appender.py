"""Appends records to a file; a full disk ends no run: records wait until there is room."""

from __future__ import annotations

from contextlib import suppress
from os import write
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from starling.orchestrator.safe_files import Folder

MOST_PENDING = 64 * 1024 * 1024
"""Bytes that wait at most; what comes then is lost."""
_BLOCK = 1024 * 1024


class Appender:
    """Appends to a file, in order, as much as is taken; never raises.

    Args:
        folder: of the run.
        name: of the file.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file: BinaryIO | None = None
        self._pending = bytearray()
        self.num_lost = 0
        """Pieces that nobody will write."""

    @property
    def size(self) -> int:
        """Size of the file and of the records that wait."""
        written = 0
        with suppress(OSError):
            written = self._folder.size(self._name)
        return written + len(self._pending)

    @property
    def num_pending(self) -> int:
        """Bytes that wait."""
        return len(self._pending)

    def append(self, piece: bytes) -> OSError | None:
        """Write a piece after those before it; return why that cannot be done now."""
        if len(self._pending) + len(piece) > MOST_PENDING:
            self.num_lost += 1
        else:
            self._pending += piece
        return self.flush()

    def flush(self) -> OSError | None:
        """Write what waits; return why that cannot be done now."""
        try:
            if self._file is None:
                self._file = self._folder.append(self._name)
            while self._pending:
                # Of a piece that is taken in part, the rest comes next.
                written = write(self._file.fileno(), self._pending[:_BLOCK])
                del self._pending[:written]
        except OSError as error:
            return error
        return None

    def close(self) -> OSError | None:
        """Write what waits, if that can be done by now, and close."""
        problem = self.flush() if self._pending else None
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        return problem
