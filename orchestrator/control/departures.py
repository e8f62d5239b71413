"""Nodes that were told to leave: by when each stops in mid-round, and when it hands over its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.holdings import Holdings
    from starling.orchestrator.runtimes.interface import Runtime

_WITHDRAW_FRACTION = 0.2
"""Share of the time until a node must leave that is kept for handing over its state."""


class Departures:
    """Follows nodes from their notice until they are gone.

    Args:
        runtime: lets nodes leave.
        holdings: knows which nodes have nothing but the initial state.
    """

    def __init__(self, runtime: Runtime, holdings: Holdings) -> None:
        self._runtime = runtime
        self._holdings = holdings
        self.leaving: dict[NodeId, float] = {}
        """Told to leave, and by when it has to be handing over what it holds."""
        self._withdrawn: set[NodeId] = set()
        self._retiring: set[NodeId] = set()

    @property
    def is_retiring(self) -> bool:
        """Whether any node is handing over its state."""
        return bool(self._retiring)

    @property
    def handing_over(self) -> set[NodeId]:
        """The nodes that are handing over their state, and have more than the initial one."""
        return self._retiring - self._holdings.new

    def noticed(self, node: NodeId, deadline: float) -> None:
        """``node`` has to be gone by ``deadline``."""
        self.leaving[node] = deadline - _WITHDRAW_FRACTION * max(0.0, deadline - self._runtime.now)

    def withdraw(self) -> list[NodeId]:
        """Return nodes that have to leave now, in mid-round: the first one, and each is named once."""
        now = self._runtime.now
        due = [node for node, until in self.leaving.items() if until <= now and node not in self._withdrawn][:1]
        self._withdrawn.update(due)
        return due

    def next_withdrawal(self) -> float | None:
        """Return when ``withdraw`` has one to name."""
        return min((until for node, until in self.leaving.items() if node not in self._withdrawn), default=None)

    def stands_still(self, node: NodeId) -> None:
        """Let ``node``, which was cancelled, leave if it had to."""
        if node in self._withdrawn:
            self.retire([node])

    def retire(self, nodes: Iterable[NodeId]) -> None:
        """Let nodes leave that stand still, and are committed as far as they will be.

        A node that has not committed a round hands over nothing: its state is initial, or others have it too. The state
        that its predecessor handed over is kept for the next successor.
        """
        due = [node for node in nodes if node not in self._retiring]
        if due:
            self._retiring.update(due)
            self._runtime.retire(due, empty=self._holdings.new.intersection(due))

    def gone(self, node: NodeId) -> None:
        """The process of ``node`` is gone."""
        self.leaving.pop(node, None)
        self._retiring.discard(node)
        self._withdrawn.discard(node)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "leaving": {str(node): until for node, until in self.leaving.items()},
            "withdrawn": sorted(self._withdrawn),
            "retiring": sorted(self._retiring),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self.leaving = {int(node): until for node, until in state["leaving"].items()}
        self._withdrawn, self._retiring = set(state["withdrawn"]), set(state["retiring"])
