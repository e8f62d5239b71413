"""Static exponential graph: each mixes the values of the nodes 1, 2, 4, … places on; directed.

With τ = ⌈log₂ N⌉, place i has the in-neighbours i + 2^k mod N, k < τ:

    w_ij = 1/(τ+1)          ρ = 1 − 2/(τ+1)    (N = 2^τ)

Elasticity: who leaves the view is closed over. A member missing in one round is left out of its cycles. The place
before takes the values of the place behind it, and all others mix on, with weights that preserve their mean.
Cost: τ·N messages a round.
Reference: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021,
arXiv:2110.13363.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.algorithms.topologies.circulant import CirculantTopology, powers_of_two


class Exponential(CirculantTopology, name="exponential"):
    def offsets(self, num_nodes: int, draw: int) -> Sequence[int]:
        return powers_of_two(num_nodes)
