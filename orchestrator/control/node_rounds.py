"""Books of a run without a barrier: participants, the rounds that each has committed, the view that each saw last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER, View

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from starling.algorithms.api import NodeId


class NodeRounds:
    """Books of nodes that each have rounds of their own.

    Args:
        nodes: those that the run begins with, the server too if there is one.
        has_server: the server alone has the model.
    """

    def __init__(self, nodes: Collection[NodeId], *, has_server: bool) -> None:
        self._has_server = has_server
        self.entered = set(nodes)
        """Participants, the server included."""
        self.present = self.entered - {SERVER}
        """Participants without the server."""
        self.numbers: dict[NodeId, int] = dict.fromkeys(nodes, 0)
        """The open round of each node, or its next one: as many as it has committed."""
        self._view_number = 0
        self._seen: dict[NodeId, tuple[NodeId, ...]] = {}
        """The members of the last view of each node."""

    @property
    def donors(self) -> tuple[NodeId, ...]:
        """The nodes that have a model that was trained: the server alone, if there is one."""
        if self._has_server:
            return (SERVER,) if SERVER in self.entered else ()
        return tuple(node for node in sorted(self.present) if self.numbers[node])

    def needs_state(self, node: NodeId) -> bool:
        """Whether anything has been committed that ``node`` must have when it enters."""
        if node == SERVER or self._has_server:
            return self.numbers[SERVER] > 0
        return self.any_committed

    @property
    def any_committed(self) -> bool:
        """Whether any node has ever committed a round."""
        return any(self.numbers.values())

    def enter(self, node: NodeId, number: int | None = None) -> None:
        """``node`` takes part from now on, with round ``number`` if it is given."""
        self.entered.add(node)
        if number is not None:
            self.numbers[node] = number
        if node != SERVER:
            self.present.add(node)
            self._view_number += 1

    def gone(self, node: NodeId) -> bool:
        """Take ``node`` out; return whether it had been present. The server is waited for, and stays in views."""
        self.entered.discard(node)
        if node not in self.present:
            return False
        self.present.discard(node)
        self._view_number += 1
        return True

    def view_of(self, node: NodeId) -> View:
        """Return the view in which ``node`` does its next round; changes count against the last one that it saw."""
        members = tuple(sorted(self.present))
        seen = self._seen.get(node, members if self._view_number else ())
        joined = tuple(sorted(set(members).difference(seen)))
        left = tuple(sorted(set(seen).difference(members)))
        return View(self._view_number, members, joined, left)

    def see(self, node: NodeId, view: View) -> tuple[NodeId, ...] | None:
        """Book that ``node`` begins a round with ``view``; return the members of its last view, None if it had none."""
        seen = self._seen.get(node)
        self._seen[node] = view.members
        return seen

    def last_of(self, nodes: Iterable[NodeId]) -> dict[NodeId, int]:
        """Return the last committed round of each of ``nodes``."""
        return {node: self.numbers[node] - 1 for node in nodes}

    def to_json(self) -> dict[str, Any]:
        """Return the books as plain data."""
        return {
            "view": self._view_number,
            "present": sorted(self.present),
            "rounds": {str(node): number for node, number in self.numbers.items()},
            "seen": {str(node): members for node, members in self._seen.items()},
            "entered": sorted(self.entered),
        }

    def restore(self, state: Mapping[str, Any], entered: Collection[NodeId]) -> None:
        """Go on from what ``to_json`` gave, with the nodes that have ``entered`` now."""
        self.entered = set(entered)
        self.present = self.entered - {SERVER}
        self._view_number = state["view"] + (self.present != set(state["present"]))
        self.numbers = {int(node): number for node, number in state["rounds"].items()}
        self._seen = {int(node): tuple(members) for node, members in state["seen"].items()}
