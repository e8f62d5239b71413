"""Barabási–Albert graph: newcomers prefer those who know many; a few hubs, many of low degree.

It begins as a clique of m+1 nodes, m = ``num_edges``; each further one is joined to m different ones, chosen with
probability proportional to their degree. Weights are w_ij = 1 / (1 + max(d_i, d_j)), after Metropolis and Hastings.
Places are filled in sorted order, so that the hubs are among the lowest node ids.

Elasticity: drawn anew over all members when their number changes; up to m+1 are a clique. A member missing in one round
leaves the others their edges; a missing hub may leave them in pieces.
Cost: m·(2·N − m − 1) messages a round.
Reference: Barabási and Albert, "Emergence of Scaling in Random Networks", Science 286, 1999, arXiv:cond-mat/9910332.
"""

from __future__ import annotations

from collections.abc import Collection

from pydantic import PositiveInt

from starling.algorithms.errors import SettingsError
from starling.algorithms.topologies.networks import Edge, preferential
from starling.algorithms.topologies.undirected import RandomTopology


class BarabasiAlbert(RandomTopology, name="barabasi_albert"):
    num_edges: PositiveInt = 2  # m, that a newcomer brings

    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        brought = min(self.num_edges, num_nodes - 1)
        return preferential(num_nodes, brought, draw) if brought > 0 else []

    def validate_for(self, num_nodes: int) -> None:
        if num_nodes <= self.num_edges:
            raise SettingsError(
                f"topology barabasi_albert: num_edges {self.num_edges} needs at least {self.num_edges + 1} nodes, and "
                f"there are {num_nodes}; lower it, or take more nodes"
            )
