"""Standard input, output and error that cannot end a process: closed, full, broken off, or with few characters.

The output of a run is not the run. A write to a stream succeeds whatever its other end does, and text that cannot be
shown is lost. Characters that the stream does not have are replaced by plainer ones.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

_PLAINER = "starling.plainer"
"""Python's name for our way with characters that a stream does not have."""

_ASCII = {"…": "...", "·": "*", "×": "x", "→": "->", "–": "-", "−": "-", "≤": "<=", "≥": ">=", "∞": "inf", "—": "-"}

_FULL_S = 1.0
"""Seconds to wait for a non-blocking stream whose reader is slow."""

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)
"""Error numbers of a stream without a reader: `| head -1`, a closed terminal, a closed stream."""


def secure() -> None:
    """Make this process's standard streams such that nothing that is printed can fail. Idempotent.

    A stream that was closed when the process began is opened on nothing, before a file of a run gets its number, and
    with it what others write there.
    """
    codecs.register_error(_PLAINER, _plainer)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]  # of shells whose terminal has not told them: rich would show nothing
    stderr = _secured(sys.stderr, 2, lambda _: None)
    sys.stdout = _secured(sys.stdout, 1, lambda reason: print(_lost(reason), file=stderr))
    sys.stderr = stderr


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print as it is, at once; to stderr if it is an error."""
    print(text, file=sys.stderr if err else sys.stdout, end=end, flush=True)


def _lost(reason: str) -> str:
    return f"warning: standard output cannot be written ({reason}); what would be shown there is lost"


def _secured(stream: TextIO | None, number: int, on_failure: Callable[[str], None]) -> TextIO:
    if stream is not None and isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Unfailing):
        return stream
    if stream is not None:
        try:
            if stream.fileno() != number:
                return stream  # somebody's own
            stream.flush()
        except (OSError, ValueError):
            pass
    raw = _Unfailing(number, on_failure)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    by_line = raw.isatty() or number == 2
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=_PLAINER, line_buffering=by_line)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


class _Unfailing(io.RawIOBase):
    """A file descriptor to which every write succeeds.

    Args:
        number: of the file.
        on_failure: told why, the first time that something could not be written although somebody may be reading.
    """

    def __init__(self, number: int, on_failure: Callable[[str], None]) -> None:
        super().__init__()
        self._number = number
        self._on_failure = on_failure
        self._told = False

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        with contextlib.suppress(OSError):
            return os.isatty(self._number)
        return False

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        try:
            return os.write(self._number, view)
        except BlockingIOError:
            return self._write_later(view)
        except OSError as error:
            self._fail(error)
            return len(view)

    def _write_later(self, view: memoryview) -> int:
        try:
            if select.select([], [self._number], [], _FULL_S)[1]:
                return os.write(self._number, view)
        except (OSError, ValueError):  # ValueError: a number that is too great for select
            pass
        return len(view)

    def _fail(self, error: OSError) -> None:
        if not self._told and error.errno not in _GONE:
            self._told = True
            self._on_failure(error.strerror or str(error))
