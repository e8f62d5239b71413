"""What nodes print, in the process's output and in their own logs."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.actors.host.host import Host


class Tee(io.TextIOBase):
    """A text stream that also goes to the log of whichever node's code is running, line by line."""

    def __init__(self, stream: Any, host: Host) -> None:  # noqa: ANN401 - any text stream
        self._stream = stream
        self._host = host
        self._line = ""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk, say: printing fails no program
            self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._host.log(self._host.current, line)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
