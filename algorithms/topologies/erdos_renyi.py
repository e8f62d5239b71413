"""Erdős–Rényi graph: every pair is joined with the same probability; drawn until it is connected.

Each pair of nodes is an edge with probability p = ``probability``; weights are w_ij = 1 / (1 + max(d_i, d_j)), after
Metropolis and Hastings. From about p = ln(N)/N on such a graph is likely to be connected.

Elasticity: drawn anew over all members when their number changes. If none of 100 draws is connected (``validate_for``
refuses a p that is too small for the configured number of nodes), the pieces of the last are joined to a chain.
A member missing in one round leaves the others their edges.
Cost: p·N·(N−1) messages a round on average.
Reference: Gilbert, "Random Graphs", Annals of Mathematical Statistics 30, 1959, for G(N, p); Erdős and Rényi, "On
Random Graphs I", Publicationes Mathematicae 6, 1959.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

from pydantic import Field

from starling.algorithms.errors import SettingsError
from starling.algorithms.seeds import derive_seed
from starling.algorithms.topologies.networks import Edge, binomial, pieces
from starling.algorithms.topologies.undirected import RandomTopology

_DRAWS = 100


class ErdosRenyi(RandomTopology, name="erdos_renyi"):
    probability: float = Field(default=0.3, gt=0, le=1)  # p, of each edge

    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        edges, ends = self._drawn(num_nodes, draw)
        return [*edges, *itertools.pairwise(ends)]

    def validate_for(self, num_nodes: int) -> None:
        if len(self._drawn(num_nodes, 0)[1]) > 1:
            enough = min(1.0, (math.log(num_nodes) + 1) / num_nodes)
            raise SettingsError(
                f"topology erdos_renyi: of {_DRAWS} graphs of {num_nodes} nodes with probability {self.probability:g} "
                f"none is connected; set it to {enough:.2g} or more"
            )

    def _drawn(self, num_nodes: int, draw: int) -> tuple[list[Edge], list[int]]:
        """A graph, and one place of each of its pieces."""
        edges: list[Edge] = []
        parts: list[list[int]] = []
        for attempt in range(_DRAWS):
            seed = derive_seed("erdos_renyi", draw, attempt)
            edges = binomial(num_nodes, self.probability, seed)
            parts = pieces(num_nodes, edges)
            if len(parts) == 1:
                break
        return edges, [part[0] for part in parts]
