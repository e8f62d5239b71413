"""Undirected graphs, whose weights follow the Metropolis–Hastings rule, and the random ones among them."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet

from pydantic import NonNegativeInt

from starling.algorithms.seeds import derive_seed
from starling.algorithms.topologies.base import GraphTopology
from starling.algorithms.topologies.mixing import Rows, with_own_weight
from starling.algorithms.topologies.networks import Edge


class UndirectedTopology(GraphTopology):
    """An undirected graph over the places 0 … N−1, which the members take in sorted order.

    With members missing, the rule holds on the induced subgraph: still symmetric and doubly stochastic.
    """

    @abstractmethod
    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        """Return each edge once, as two different places."""

    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        drawn = _edges(self, len(members), draw)  # pyright: ignore[reportArgumentType] - frozen models are hashable
        edges = ((members[i], members[j]) for i, j in drawn)
        return metropolis_hastings(members, ((i, j) for i, j in edges if i in present and j in present))


class RandomTopology(UndirectedTopology):
    """A graph drawn from (seed, round // redraw_every); all of it is drawn anew when the number of members changes."""

    redraw_every: NonNegativeInt = 0  # rounds with one graph; 0: the same for the whole run

    def draw(self, num_nodes: int, round_number: int, seed: int) -> int:
        return derive_seed("topology", seed, round_number // self.redraw_every if self.redraw_every else 0)

    def period(self, num_nodes: int) -> int | None:
        return None if self.redraw_every else 1


# Drawing takes longer than weighing, and members may be missing in one round and back in the next.
@functools.lru_cache(maxsize=32)
def _edges(topology: UndirectedTopology, num_nodes: int, draw: int) -> Collection[Edge]:
    return topology.edges(num_nodes, draw)


def metropolis_hastings(nodes: Iterable[int], edges: Iterable[Edge]) -> Rows:
    """Return w_ij = 1 / (1 + max(d_i, d_j)) on edges, and as w_ii the rest of 1, which is above 0.

    >>> metropolis_hastings([0, 1, 2], [(0, 1)])
    {0: {0: 0.5, 1: 0.5}, 1: {0: 0.5, 1: 0.5}, 2: {2: 1.0}}
    """
    neighbors: Mapping[int, list[int]] = {node: [] for node in nodes}
    for i, j in edges:
        neighbors[i].append(j)
        neighbors[j].append(i)
    return {
        node: with_own_weight(node, {other: 1 / (1 + max(len(others), len(neighbors[other]))) for other in others})
        for node, others in neighbors.items()
    }
