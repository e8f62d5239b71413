"""Directed graphs in which place i mixes the values of places i + offset mod N, with equal weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from algorithms.topologies.base import GraphTopology
from algorithms.topologies.mixing import Rows, with_own_weight


class CirculantTopology(GraphTopology):
    """W is the mean of the identity and of one permutation per offset, and so doubly stochastic, but not symmetric.

    With members missing a permutation still holds on its unbroken cycles. Whoever is on a broken one keeps its own
    value instead: if only the two beside the gap did so, some values would count twice and the mean would drift.
    """

    @abstractmethod
    def offsets(self, num_nodes: int, draw: int) -> Sequence[int]:
        """Different ones, from 1 to N−1; none for one node."""

    @property
    def symmetric(self) -> bool:
        return False

    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        offsets = self.offsets(len(members), draw)
        missing = [place for place, node in enumerate(members) if node not in present]
        # The cycles of an offset o are the residue classes of gcd(N, o).
        strides = {offset: math.gcd(len(members), offset) for offset in offsets}
        broken = {offset: {place % stride for place in missing} for offset, stride in strides.items()}
        weight = 1 / (1 + len(offsets))
        rows: Rows = {}
        for place, node in enumerate(members):
            intact = [offset for offset in offsets if place % strides[offset] not in broken[offset]]
            others = dict.fromkeys((members[(place + offset) % len(members)] for offset in intact), weight)
            rows[node] = with_own_weight(node, others)
        return rows


def powers_of_two(num_nodes: int) -> Sequence[int]:
    """2^k for k < ⌈log₂ N⌉.

    >>> [list(powers_of_two(n)) for n in (1, 2, 3, 8, 9)]
    [[], [1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]
    """
    return [1 << k for k in range((num_nodes - 1).bit_length())]
