"""Random regular graph: all have the same number of neighbours, chosen at random; connected.

d = ``degree`` neighbours each:

    w_ij = 1/(d+1)          ρ → (1 + 2 √(d−1)) / (d+1)    (N → ∞)

Elasticity: drawn anew over all members when their number changes. Where d·N is then odd, or d ≥ N, the next lower
degree that exists is taken. A member missing in one round leaves the others their edges.
Cost: d·N messages a round.
Reference: Friedman, "A Proof of Alon's Second Eigenvalue Conjecture", Memoirs of the AMS 195, 2008, for ρ.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np
from pydantic import PositiveInt

from starling.algorithms.errors import SettingsError
from starling.algorithms.seeds import derive_seed
from starling.algorithms.topologies.networks import Edge, pieces, regular
from starling.algorithms.topologies.undirected import RandomTopology

_DRAWS = 100
"""Most attempts to draw a connected graph.

One or two suffice from degree 3 on: of 19355 graphs of 8 nodes and degree 3 only 35 are not connected.
"""


class RandomRegular(RandomTopology, name="random_regular"):
    degree: PositiveInt = 4  # d, neighbours of each

    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        degree = _possible(self.degree, num_nodes)
        if degree <= 2:
            # Most 2-regular graphs fall apart; the connected ones are the rings.
            order = [int(place) for place in np.random.default_rng(draw).permutation(num_nodes)]
            return [*itertools.pairwise(order), *([(order[-1], order[0])] if num_nodes > 2 else [])]
        for attempt in range(_DRAWS):
            edges = regular(num_nodes, degree, derive_seed("random_regular", draw, attempt))
            if len(pieces(num_nodes, edges)) == 1:
                return edges
        raise SettingsError(
            f"topology random_regular: none of {_DRAWS} graphs of {num_nodes} nodes with degree {degree} is connected; "
            f"take a higher degree"
        )

    def validate_for(self, num_nodes: int) -> None:
        possible = _possible(self.degree, num_nodes)
        if self.degree == possible:
            return
        if self.degree >= num_nodes:
            reason = "it must be less than N"
        elif self.degree == 1:
            reason = "pairs are not connected"
        else:
            reason = f"{self.degree} × {num_nodes} is odd, and every edge has two ends"
        right = f"take degree {possible}" if possible else "take more nodes"
        raise SettingsError(
            f"topology random_regular: degree {self.degree} is impossible for N = {num_nodes}: {reason}; {right}"
        )


def _possible(degree: int, num_nodes: int) -> int:
    """The degree of a connected regular graph: ``degree``, or what is nearest to it.

    >>> [_possible(4, n) for n in (1, 2, 3, 9)], _possible(3, 9), _possible(1, 9)
    ([0, 1, 2, 4], 2, 2)
    """
    nearest = min(max(degree, 2), num_nodes - 1)
    return nearest - nearest * num_nodes % 2
