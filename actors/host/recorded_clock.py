"""Recorded time: readings of the clock that programs saw, kept on a cluster and shown again in a replay."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from starling.algorithms.api import NodeId, TrainReport


class Times:
    """Readings of the clock and durations of ``Train``, in the order in which a node's programs saw them.

    Args:
        clock: the runtime's, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recorded: dict[NodeId, list[float]] | None = None
        self._foreseen: dict[NodeId, Iterator[float]] = {}
        self.is_replay = False
        """Whether all that is shown was recorded."""

    def record(self) -> None:
        """Record readings from now on, for ``drain``."""
        self._recorded = {}

    def replay(self, seen: Mapping[NodeId, Iterable[float]]) -> None:
        """Show recorded readings; when they are used up, the clock's own."""
        self._foreseen = {node: iter(values) for node, values in seen.items()}
        self.is_replay = True

    def again(self, node: NodeId, values: Sequence[float]) -> None:
        """Begin a round of ``node``, and show it first the ``values`` of an earlier attempt at the round.

        Messages of that attempt are not sent again, so the round must come to them again.
        """
        if self.is_replay:
            return
        self._foreseen.pop(node, None)
        if values:
            self._foreseen[node] = iter(values)

    def drain(self) -> dict[NodeId, list[float]]:
        """Return the readings recorded since the last call, and forget them."""
        recorded = self._recorded
        if not recorded:
            return {}
        self._recorded = {}
        return recorded

    def clock_of(self, node: NodeId) -> Callable[[], float]:
        """Return the clock as ``node``'s programs see it."""
        return lambda: self._seen(node, self._clock())

    def timed(self, node: NodeId, report: TrainReport) -> TrainReport:
        """Return the report with the seconds that ``node``'s program is to see."""
        if not self._foreseen and self._recorded is None:
            return report
        seconds = self._seen(node, report.seconds)
        return report if seconds == report.seconds else report._replace(seconds=seconds)

    def _seen(self, node: NodeId, value: float) -> float:
        value = next(self._foreseen.get(node, iter(())), value)
        if self._recorded is not None:
            self._recorded.setdefault(node, []).append(value)
        return value
