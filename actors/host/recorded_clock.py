"""What programs see of time: recorded on a cluster where results may depend on it, and seen again in a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from starling.algorithms.api import NodeId, TrainReport


class Times:
    """Readings of the clock and durations of ``Train``, in the order in which a node's programs saw them."""

    def __init__(self) -> None:
        self._recorded: dict[NodeId, list[float]] | None = None
        self._foreseen: dict[NodeId, Iterator[float]] = {}
        self.is_replay = False
        """Whether all that is shown was recorded."""

    def record(self) -> None:
        """Keep what is seen from now on, for ``drain``."""
        self._recorded = {}

    def replay(self, seen: Mapping[NodeId, Iterable[float]]) -> None:
        """Show what was recorded; when that is used up, what is."""
        self._foreseen = {node: iter(values) for node, values in seen.items()}
        self.is_replay = True

    def again(self, node: NodeId, values: Sequence[float]) -> None:
        """A round of ``node`` begins, again if it has seen ``values`` in it before: these are shown first.

        What it had sent is not sent again, and so it must come to the same.
        """
        if self.is_replay:
            return
        self._foreseen.pop(node, None)
        if values:
            self._foreseen[node] = iter(values)

    def drain(self) -> dict[NodeId, list[float]]:
        """Take what was recorded since the last call."""
        recorded = self._recorded
        if not recorded:
            return {}
        self._recorded = {}
        return recorded

    def watched(self, node: NodeId, clock: Callable[[], float]) -> Callable[[], float]:
        """The clock as ``node``'s programs see it."""
        return lambda: self._seen(node, clock())

    def timed(self, node: NodeId, report: TrainReport) -> TrainReport:
        """The report with the seconds that ``node``'s program is to see."""
        if not self._foreseen and self._recorded is None:
            return report
        seconds = self._seen(node, report.seconds)
        return report if seconds == report.seconds else report._replace(seconds=seconds)

    def _seen(self, node: NodeId, value: float) -> float:
        value = next(self._foreseen.get(node, iter(())), value)
        if self._recorded is not None:
            self._recorded.setdefault(node, []).append(value)
        return value
