"""Directed graphs in which place i mixes the values of places i + offset mod N, with equal weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from starling.algorithms.topologies.base import GraphTopology
from starling.algorithms.topologies.mixing import Rows, with_own_weight

_REACH = 8
"""Members that are missing one behind another on a cycle, and whose gap is closed, are fewer."""


class CirculantTopology(GraphTopology):
    """W is the mean of the identity and of one permutation per offset, and so doubly stochastic, but not symmetric.

    A missing member is left out of each of its cycles, and the member before takes the values of the member behind. The
    rest is a permutation of the present members. A cycle with ``_REACH`` missing in a row is left out for the round: if
    only those beside the gap were, some values would count twice and the mean would drift.
    """

    @abstractmethod
    def offsets(self, num_nodes: int, draw: int) -> Sequence[int]:
        """Return distinct offsets from 1 to N−1; none for one node."""

    @property
    def symmetric(self) -> bool:
        return False

    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        offsets = self.offsets(len(members), draw)
        weight = 1 / (1 + len(offsets))
        others: dict[int, dict[int, float]] = {node: {} for node in members}
        for offset in offsets:
            # The cycles of an offset o are the residue classes of gcd(N, o).
            cycles = math.gcd(len(members), offset)
            sources = {
                place: next((node for node in chain if node in present), None)
                for place, chain in enumerate(_chains(members, offset))
                if members[place] in present
            }
            broken = {place % cycles for place, source in sources.items() if source is None}
            for place, source in sources.items():
                node = members[place]
                if source is not None and source != node and place % cycles not in broken:
                    others[node][source] = others[node].get(source, 0.0) + weight
        return {node: with_own_weight(node, row) for node, row in others.items()}

    def substitutes(self, members: tuple[int, ...], draw: int) -> Mapping[int, Collection[tuple[int, ...]]]:
        chains = [_chains(members, offset) for offset in self.offsets(len(members), draw)]
        rows = zip(members, zip(*chains, strict=True), strict=True) if chains else ()
        return {node: [tuple(one for one in chain if one != node) for chain in row] for node, row in rows}


def _chains(members: tuple[int, ...], offset: int) -> list[tuple[int, ...]]:
    """Return for each place the members whose values it takes: successors on its cycle in order, its own member last.

    >>> _chains((0, 1, 2, 3), 2)
    [(2, 0), (3, 1), (0, 2), (1, 3)]
    """
    length = len(members) // math.gcd(len(members), offset)
    steps = range(offset, offset * min(length, _REACH) + 1, offset)
    return [tuple(members[(place + step) % len(members)] for step in steps) for place in range(len(members))]


def powers_of_two(num_nodes: int) -> Sequence[int]:
    """Return 2^k for k < ⌈log₂ N⌉.

    >>> [list(powers_of_two(n)) for n in (1, 2, 3, 8, 9)]
    [[], [1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]
    """
    return [1 << k for k in range((num_nodes - 1).bit_length())]
