"""Topologies: who exchanges with whom, and with what weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from algorithms.registry import Part


@dataclass(frozen=True)
class Mixing:
    """A mixing matrix W, row by row: node i mixes Σ_j w_ij x_j."""

    weights: Mapping[int, Mapping[int, float]]
    """``weights[i][j]`` is w_ij > 0, own weight included; nodes and entries sorted. Each row sums to 1."""

    def in_neighbors(self, node: int) -> tuple[int, ...]:
        """Whose values ``node`` needs, sorted, itself left out."""
        return tuple(other for other in self.weights[node] if other != node)


class Topology(Part, family="topology", catalog="algorithms.topologies"):
    """A graph over the members of a round, and the rule that makes mixing weights of it."""

    @abstractmethod
    def mixing(
        self, members: Sequence[int], round_number: int, seed: int, present: AbstractSet[int] | None = None
    ) -> Mixing:
        """The mixing matrix of a round.

        Args:
            members: of the view, sorted; the graph is drawn over them.
            round_number: for graphs that change over time.
            seed: the run's; for random graphs.
            present: members whose values are really in (default: all). Edges to others are gone, and the weights
                follow the rule on what is left.
        """
