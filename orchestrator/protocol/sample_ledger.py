"""The data ledger: who is to draw which samples, so that each is committed exactly once per epoch, whoever is away.

Without IO and deterministic, as the rendezvous is. It is told who is there when a round begins and how far those are
that commit, and answers with what nodes are to draw from then on.

Part m is drawn by node m while that is there. When the present nodes have finished an epoch, the rest of an absent
node's epoch goes to a pool. The pool is handed out in equal shares to the present nodes. So does what was handed to a
node that is away itself. A node that comes back goes on after what was handed out: nothing moves back. Nodes beyond the
number of parts have no part of their own. Whenever such a node has less than a round's samples left, it is handed the
last half of the longest range still to be drawn.

A part is drawn epoch by epoch, so that samples of different parts may be in different epochs at one moment: parts have
different sizes, and nodes different speeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.data.plans import Place, Segment
from starling.actors.data.samplers import Position

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from starling.algorithms.api import NodeId


class DataLedger:
    """See the module's docstring.

    Args:
        sizes: samples of each part, all at least 1; part m is that of node m.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._positions: dict[NodeId, Position] = {}
        """Positions of nodes with committed draws or handed-over ranges.

        A position's ``extra`` counts from the start of ``_extras``.
        """
        self._extras: dict[NodeId, list[Segment]] = {}
        """Ranges that nodes were handed; of all nodes whose plan was ever changed."""
        self._pool: list[Segment] = []
        """Ranges to be handed out."""
        self._changed: set[NodeId] = set()
        """Nodes whose ranges have changed since they were last told their plan."""
        self._stale: set[NodeId] = set()
        """Nodes whose present process has not been told their plan."""
        self._most = 1
        """Samples that a node has committed in one round."""

    # --- what happens ------------------------------------------------------------------------------------------------

    def committed(self, positions: Mapping[NodeId, Position]) -> None:
        """Nodes have committed their draws up to ``positions``.

        Raises:
            ValueError: one is behind what it had committed before, or ahead of what it was handed.
        """
        nowhere = Position()
        for node, position in positions.items():
            before = self._positions.get(node, nowhere)
            count = self._drawn(node, position) - self._drawn(node, before)
            handed = sum(one.size for one in self._extras[node]) if node in self._extras else 0
            is_ahead = position.extra > handed or (position.extra < handed and position[:2] != before[:2])
            if count < 0 or position.extra < before.extra or is_ahead:
                raise ValueError(f"node {node} cannot be at {position}: it was at {before}, and is handed {handed}")
            self._positions[node] = position
            self._most = max(self._most, count)

    def set_back(self, node: NodeId) -> None:
        """The process of ``node`` is a new one, or was given state: it does not know what ``node`` was handed since.

        What it had not committed is not drawn.
        """
        if node in self._extras:
            self._stale.add(node)

    def begin(
        self, nodes: Iterable[NodeId], present: Collection[NodeId], *, again: bool = False
    ) -> dict[NodeId, Place]:
        """Return the changed plans of ``nodes``, which begin a round from their last commit.

        Args:
            nodes: of ``present``.
            present: all that are there; some may be in the middle of a round.
            again: these begin a round that they had begun, and draw in it what they drew then.
        """
        nodes, there = sorted(nodes), frozenset(present)
        if not again:
            self._collect(there)
            self._hand_out(nodes, there)
            self._feed(nodes, there)
        told: dict[NodeId, Place] = {}
        for node in nodes:
            if node in self._changed:
                self._trim(node)
            if node in self._changed or node in self._stale:
                told[node] = Place(tuple(self._extras[node]), self._positions[node])
        self._changed.difference_update(told)
        self._stale.difference_update(told)
        return told

    def impose(self, places: Mapping[NodeId, Place]) -> None:
        """Nodes are to draw what a log says."""
        for node, place in places.items():
            self._extras[node], self._positions[node] = list(place.extras), place.position

    # --- who draws what ----------------------------------------------------------------------------------------------

    def _collect(self, there: frozenset[NodeId]) -> None:
        """Put into the pool what is due of those that are away."""
        away = [part for part in range(len(self._sizes)) if part not in there]
        holders = sorted(node for node, extras in self._extras.items() if extras and node not in there)
        if not away and not holders:
            return
        begun = [self.position(part).epoch for part in range(len(self._sizes)) if part in there]
        # Where only nodes without a part are there, an epoch is due when they have drawn what they were handed.
        alone = min((self.position(part).epoch for part in away), default=0) + any(map(self._lacks, there))
        due = max(begun, default=alone)
        for node in holders:
            self._trim(node)
            kept = [one for one in self._extras[node] if one.epoch >= due]
            if len(kept) < len(self._extras[node]):
                self._pool += [one for one in self._extras[node] if one.epoch < due]
                self._extras[node] = kept
                self._changed.add(node)
        for part in away:
            position = self.position(part)
            while position.epoch < due:
                self._pool.append(Segment(part, position.epoch, position.offset, self._sizes[part]))
                self._touch(part)
                position = self._positions[part] = Position(position.epoch + 1, 0, position.extra)

    def _hand_out(self, nodes: Sequence[NodeId], there: frozenset[NodeId]) -> None:
        """Give ``nodes`` their shares of the pool: so much that all have as much to draw besides their own part."""
        self._pool.sort()
        left = sum(one.size for one in self._pool)
        if not left or not there:  # a server goes on while all workers are away
            return
        loads = {node: sum(one.size for one in self.rest(node)) for node in there}
        # Who has more than that already is given nothing.
        sharing = sorted(there, key=lambda node: (loads[node], node))
        while loads[sharing[-1]] * len(sharing) > left + sum(loads[node] for node in sharing):
            sharing.pop()
        total = left + sum(loads[node] for node in sharing)
        for place, node in enumerate(sorted(sharing, key=lambda node: (node not in nodes, node))):
            level = -(-total // (len(sharing) - place))
            if node not in nodes:
                return  # it will have its share when it begins
            total -= level
            self._touch(node)
            self._take(node, min(left, level - loads[node]))
            left -= min(left, level - loads[node])

    def _take(self, node: NodeId, count: int) -> None:
        """Give ``node`` the first ``count`` samples of the pool."""
        while count:
            first = self._pool.pop(0)
            given = first._replace(stop=min(first.stop, first.start + count))
            if given.stop < first.stop:
                self._pool.insert(0, first._replace(start=given.stop))
            self._give(node, given)
            count -= given.size

    def _feed(self, nodes: Sequence[NodeId], there: frozenset[NodeId]) -> None:
        """Let nodes without a part of their own have something to draw."""
        partless = sorted(node for node in there if node >= len(self._sizes) and self._lacks(node))
        if min(there, default=0) >= len(self._sizes):
            return  # nobody has a part: they have shared what is due
        # Who is in the middle of a round may have drawn what is still its own here.
        taken = there.difference(nodes) if partless else frozenset[int]()
        givers = [part for part in range(len(self._sizes)) if part not in taken] if partless else []
        for node in partless:
            ranges = [(one, giver) for giver in givers for one in (*self.rest(giver), self._own_rest(giver))]
            longest, giver = max(ranges, key=lambda pair: (pair[0].size, pair[0]), default=(Segment(0, 0, 0, 0), 0))
            if longest.size < 2:
                return
            self._cut(giver, longest)
            half = longest._replace(start=longest.stop - longest.size // 2)
            self._touch(node)
            self._give(node, half)

    def _cut(self, giver: NodeId, whole: Segment) -> None:
        """Leave ``giver`` but the first half of one of its ranges."""
        self._touch(giver)
        self._trim(giver)
        extras = self._extras[giver]
        if whole not in extras:  # of its own part: it becomes a range like others, and its own goes on after it
            extras.append(whole)
            self._positions[giver] = Position(whole.epoch + 1)
        extras[extras.index(whole)] = whole._replace(stop=whole.stop - whole.size // 2)

    def _give(self, node: NodeId, segment: Segment) -> None:
        extras = self._extras[node]
        last = extras[-1] if extras else None
        if last is not None and last[:2] == segment[:2] and last.stop == segment.start:
            extras[-1] = last._replace(stop=segment.stop)
        else:
            extras.append(segment)

    def _touch(self, node: NodeId) -> None:
        self._positions.setdefault(node, Position())
        self._extras.setdefault(node, [])
        self._changed.add(node)

    def _trim(self, node: NodeId) -> None:
        """Forget what ``node`` has committed of what it was handed; it is to be told, as it counts anew."""
        position = self._positions[node]
        self._extras[node] = self.rest(node)
        self._positions[node] = position._replace(extra=0)

    def _lacks(self, node: NodeId) -> bool:
        """Whether a node without a part of its own has less to draw than a round may take."""
        return sum(one.size for one in self.rest(node)) < self._most

    # --- what is known -----------------------------------------------------------------------------------------------

    def position(self, node: NodeId) -> Position:
        """Return how far ``node`` has committed."""
        return self._positions.get(node, Position())

    def rest(self, node: NodeId) -> list[Segment]:
        """Return the ranges that ``node`` was handed and has not committed."""
        skipped, found = self.position(node).extra, list[Segment]()
        for one in self._extras.get(node, ()):
            if skipped < one.size:
                found.append(one._replace(start=one.start + skipped))
            skipped = max(0, skipped - one.size)
        return found

    def _own_rest(self, part: int) -> Segment:
        epoch, offset, _ = self.position(part)
        return Segment(part, epoch, offset, self._sizes[part])

    def _drawn(self, node: NodeId, position: Position) -> int:
        epoch, offset, extra = position
        size = self._sizes[node] if node < len(self._sizes) else 0
        return epoch * size + offset + extra

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as plain data."""
        return {
            "sizes": list(self._sizes),
            "positions": {str(node): list(position) for node, position in sorted(self._positions.items())},
            "extras": {str(node): [list(one) for one in extras] for node, extras in sorted(self._extras.items())},
            "pool": [list(one) for one in self._pool],
            "changed": sorted(self._changed),
            "stale": sorted(self._stale),
            "most": self._most,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], *, same_processes: bool = False) -> DataLedger:
        """Return the ledger that ``to_json`` wrote; without ``same_processes`` every node is sent its plan anew."""
        ledger = DataLedger(data["sizes"])
        ledger._positions = {int(node): Position(*position) for node, position in data["positions"].items()}
        ledger._extras = {int(node): [Segment(*one) for one in extras] for node, extras in data["extras"].items()}
        ledger._pool = [Segment(*one) for one in data["pool"]]
        ledger._most, ledger._changed = data["most"], set(data["changed"])
        if same_processes:
            ledger._stale = set(data["stale"])
            return ledger
        for node in ledger._positions:
            ledger._extras.setdefault(node, [])
        ledger._stale = set(ledger._extras)
        return ledger
