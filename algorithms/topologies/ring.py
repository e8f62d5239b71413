"""Ring: each exchanges with the two beside it.

    w_ij = 1/3          ρ = (1 + 2 cos(2π/N)) / 3    (N ≥ 4)

Two nodes are one edge with weights ½, three are complete.
Elasticity: who leaves the view is closed over. A member missing in one round leaves a chain for that round, with
Metropolis–Hastings weights.
Cost: 2·N messages a round.
"""

from __future__ import annotations

from collections.abc import Collection

from starling.algorithms.topologies.networks import Edge
from starling.algorithms.topologies.undirected import UndirectedTopology


class Ring(UndirectedTopology, name="ring"):
    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        return ring_edges(range(num_nodes))


def ring_edges(places: range) -> set[Edge]:
    """Return the edges of a ring of ``places``: two places have one edge, one place none.

    >>> sorted(ring_edges(range(3)))
    [(0, 1), (0, 2), (1, 2)]
    """
    pairs = zip(places, (*places[1:], *places[:1]), strict=True)
    return {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
