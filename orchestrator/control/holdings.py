"""Books of the committed round that each node holds, and of state kept from nodes that have left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from starling.algorithms.api import NodeId


class Holdings:
    """Books of state, without state: pure data."""

    def __init__(self) -> None:
        self.new: set[NodeId] = set()
        """Have not committed a round yet: they began with nothing but the initial state."""
        self.loaded: set[NodeId] = set()
        """Were given the committed state, and have not committed a round since."""
        self.kept: dict[NodeId, int] = {}
        """The round of what was kept of nodes that have left, until their successors have committed one."""
        self._held: dict[NodeId, int] = {}
        """The round of what each node has: the one that it committed last, or whose state it was given."""

    def restored(self, node: NodeId) -> None:
        """``node`` has what was kept of it, and goes on as if it had never been away."""
        self.new.discard(node)
        self._held[node] = self.kept[node]

    def given(self, node: NodeId, number: int) -> None:
        """``node`` has been given the state of round ``number``."""
        self.loaded.add(node)
        self._held[node] = number

    def left(self, node: NodeId) -> None:
        """``node`` has left, and handed over what it held, unless that was the initial state."""
        if node not in self.new:
            # One that was cancelled in the last round has that of the round before.
            self.kept[node] = self._held.get(node, -1)

    def gone(self, node: NodeId) -> None:
        """The process of ``node`` is gone."""
        self.new.discard(node)
        self.loaded.discard(node)
        self._held.pop(node, None)

    def committed(self, number: int, nodes: Collection[NodeId]) -> list[NodeId]:
        """Book that ``nodes`` have committed round ``number``; return those of whom nothing has to be kept any more."""
        self.new.difference_update(nodes)
        self._held |= dict.fromkeys(nodes, number)
        self.loaded.clear()  # who has got state and has not committed since lacks a round
        released = [node for node in self.kept if node in nodes and node != SERVER]
        for node in released:
            del self.kept[node]
        return released

    def keeps(self, number: int | None, other_than: NodeId = SERVER) -> bool:
        """Whether state of a node other than ``other_than`` and the server is kept.

        It is that of round ``number``, or of any round if that is None.
        """
        return any(number in (None, kept) for node, kept in self.kept.items() if node not in (other_than, SERVER))

    @property
    def begun(self) -> set[NodeId]:
        """New nodes, with nothing kept of them, that were given a committed state and have not committed since."""
        return (self.new & self._held.keys()) - self.kept.keys()

    def to_save(self, there: Iterable[NodeId], begun: Collection[NodeId] = ()) -> list[NodeId]:
        """Return whose state a checkpoint needs: who is ``there`` with more than the initial one, and whose was kept.

        New nodes have no more than that, but for those that have ``begun`` with another's.
        """
        own = {node for node in there if node not in self.new or node in begun}
        return sorted((own | self.kept.keys()) - {SERVER})

    def kept_alone(self, down: Collection[NodeId], begun: Collection[NodeId] = ()) -> set[NodeId]:
        """Return whose state is only what was kept: of those ``down``, or whose successors have not got it yet."""
        return self.kept.keys() & self.new.union(down) - set(begun)

    def to_json(self) -> dict[str, Any]:
        """Return the books as plain data; who is being given state is given it anew."""
        return {
            "new": sorted(self.new),
            "kept": {str(node): number for node, number in self.kept.items()},
            "held": {str(node): number for node, number in self._held.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self.new = set(state["new"])
        self.kept = {int(node): number for node, number in state["kept"].items()}
        self._held = {int(node): number for node, number in state["held"].items()}
