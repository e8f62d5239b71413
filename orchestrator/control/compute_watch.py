"""Finds nodes that compute for too long without a word, in a run without a barrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.algorithms.api import SERVER
from starling.orchestrator.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.context import RunContext

_MAX_LATE = 10
"""Number of times that a node may be late in one round while the run makes no progress."""


class ComputeWatch:
    """Start time of each node's computation, for nodes that do not wait for a message."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._limit_s = run.config.cluster.round_deadline_s
        self._since: dict[NodeId, float] = {}
        self._late: dict[NodeId, tuple[int, int]] = {}
        """Nodes that were late: how often, since the run had done so many rounds."""

    @property
    def any_computes(self) -> bool:
        """Whether any node computes."""
        return bool(self._since)

    def computes(self, node: NodeId, since: float) -> None:
        """``node`` computes since that moment, or sleeps until then."""
        self._since[node] = since

    def rests(self, node: NodeId) -> None:
        """``node`` waits for a message, stands still or is gone."""
        self._since.pop(node, None)

    def committed(self, node: NodeId) -> None:
        """``node`` has finished its round, however often it was late at it."""
        self._since.pop(node, None)
        self._late.pop(node, None)

    def next_due(self) -> float | None:
        """Return when the first of those that compute is late; None if nobody computes."""
        return min(self._since.values()) + self._limit_s if self._since else None

    def late(self, numbers: Mapping[NodeId, int], committed: int) -> list[NodeId]:
        """Return the nodes that have computed for too long, sorted, and record that they have.

        Args:
            numbers: the open round of each node.
            committed: the run's last round.

        Raises:
            RunError: one is late at one round again and again, and nobody else takes the run any further.
        """
        now = self._run.runtime.now
        late = sorted(node for node, since in self._since.items() if since + self._limit_s <= now)
        for node in late:
            self._run.record("late", node=node, round=numbers[node], reason="it has not been heard of")
            self._count(node, numbers[node], committed)
        return late

    def _count(self, node: NodeId, number: int, committed: int) -> None:
        times, since = self._late.get(node, (0, committed))
        times = times + 1 if since == committed else 1
        self._late[node] = times, committed
        if times == _MAX_LATE:
            who = f"{'the server' if node == SERVER else f'node {node}'} cannot finish its round {number}"
            raise RunError(
                f"{who}: it computes for longer than {self._limit_s:g} s without a word, tried {times} times; "
                "raise cluster.round_deadline_s if it is only slow"
            )
