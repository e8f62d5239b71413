"""One-peer exponential graph: the offsets of the exponential graph one by one, one message per node and round.

With τ = ⌈log₂ N⌉, place i has in round t the in-neighbour i + 2^(t mod τ) mod N:

    w_ij = ½          ρ = 1 in some rounds; the product of τ consecutive rounds is J = 11ᵀ/N    (N = 2^τ)

Elasticity: who leaves the view is closed over. A member missing in one round is left out of its cycle. The place before
takes the values of the place behind it, and all others mix on, with weights that preserve their mean.
Cost: N messages a round.
Reference: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021,
arXiv:2110.13363.
"""

from __future__ import annotations

from collections.abc import Sequence

from starling.algorithms.topologies.circulant import CirculantTopology, powers_of_two


class OnePeerExponential(CirculantTopology, name="one_peer_exponential"):
    def draw(self, num_nodes: int, round_number: int, seed: int) -> int:
        return round_number % self.period(num_nodes)

    def offsets(self, num_nodes: int, draw: int) -> Sequence[int]:
        return powers_of_two(num_nodes)[draw : draw + 1]

    def period(self, num_nodes: int) -> int:
        return max(1, len(powers_of_two(num_nodes)))
