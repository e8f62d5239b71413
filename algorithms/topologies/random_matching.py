"""Random matchings: each node meets so many others, one at a time, and other ones in each round.

The nodes are shuffled, and paired as in a tournament in which everybody meets everybody once; the graph is its first
k = ``matchings`` rounds. All have k neighbours if N is even; if it is odd, one is left over in each of the k:

    w_ij = 1/(k+1)          E ‖W x - x̄‖² = ½ ‖x - x̄‖² (N-2)/(N-1)    (N even, k = 1, where ρ = 1)

Elasticity: drawn over the members of each round. One that is missing takes its edges along, and the others keep theirs.
Cost: k·N messages a round, k·(N-1) if N is odd; of no more than N-1 matchings (N, if it is odd) each adds some.
Reference: Boyd et al., "Randomized Gossip Algorithms", IEEE Transactions on Information Theory 52(6), 2006, for pairs.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from pydantic import PositiveInt

from starling.algorithms.seeds import derive_seed
from starling.algorithms.topologies.networks import Edge
from starling.algorithms.topologies.undirected import UndirectedTopology


class RandomMatching(UndirectedTopology, name="random_matching"):
    matchings: PositiveInt = 1  # k, neighbours of each

    def draw(self, num_nodes: int, round_number: int, seed: int) -> int:
        return derive_seed("random_matching", seed, round_number)

    def period(self, num_nodes: int) -> int | None:
        return 1 if num_nodes <= 2 else None

    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        order = [int(place) for place in np.random.default_rng(draw).permutation(num_nodes)]
        return [(order[i], order[j]) for i, j in _tournament(num_nodes, self.matchings)]


def _tournament(num_nodes: int, num_rounds: int) -> list[Edge]:
    """Return the pairs of a round-robin tournament's first rounds: the last place stands still, the others rotate.

    >>> _tournament(4, 2)
    [(3, 0), (1, 2), (3, 1), (2, 0)]
    >>> _tournament(3, 3)
    [(1, 2), (2, 0), (0, 1)]
    """
    # Of an odd number the last place is nobody's, and who meets it is left over.
    circle = num_nodes - 1 + num_nodes % 2
    pairs: list[Edge] = []
    for number in range(min(num_rounds, circle)):
        if circle < num_nodes:
            pairs.append((circle, number))
        pairs += [((number + step) % circle, (number - step) % circle) for step in range(1, (circle + 1) // 2)]
    return pairs
