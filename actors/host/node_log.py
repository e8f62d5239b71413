"""Logs of single nodes: the host's own lines, and everything that nodes print."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId


class NodeLogs:
    """Log lines of each node, until they are drained.

    Args:
        current: the node to which output goes until another node's turn.
    """

    def __init__(self, current: NodeId) -> None:
        self.current = current
        """The node whose code is running, or ran last."""
        self._lines: dict[NodeId, list[str]] = {}

    def turn_to(self, node: NodeId) -> None:
        """Note that code of ``node`` runs from now on."""
        self.current = node

    def add(self, node: NodeId, line: str) -> None:
        """Add a line to a node's log."""
        self._lines.setdefault(node, []).append(line)

    def drain(self) -> dict[NodeId, list[str]]:
        """Return the lines since the last call, and forget them."""
        lines, self._lines = self._lines, {}
        return lines


class Tee(io.TextIOBase):
    """A text stream that copies complete lines to the log of the node whose code is running."""

    def __init__(self, stream: Any, logs: NodeLogs) -> None:  # noqa: ANN401 - any text stream
        self._stream = stream
        self._logs = logs
        self._line = ""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk, say: printing fails no program
            self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._logs.add(self._logs.current, line)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
