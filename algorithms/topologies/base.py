"""The topology interface: a mixing matrix for every round."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import Part
from starling.algorithms.topologies.mixing import Mixing, Rows


class Topology(Part, family="topology", catalog="starling.algorithms.topologies"):
    """A graph over the members of a round, and the rule that makes mixing weights of it."""

    @abstractmethod
    def mixing(
        self, members: Sequence[int], round_number: int, seed: int, present: AbstractSet[int] | None = None
    ) -> Mixing:
        """Return the mixing matrix of a round, with a row for every member.

        Args:
            members: of the view, sorted; the graph is drawn over them.
            round_number: for graphs that change over time.
            seed: the run's; for random graphs.
            present: members whose values are really in (default: all). Edges to others are gone, and the weights
                follow the rule on what is left. The row of a member that is not in is {itself: 1}.
        """

    @property
    def symmetric(self) -> bool:
        """Say whether w_ij = w_ji in every round, whichever members are missing."""
        return True

    @property
    def doubly_stochastic(self) -> bool:
        """Say whether mixing preserves the mean, whichever members are missing."""
        return True

    def period(self, num_nodes: int) -> int | None:
        """Return the number of rounds after which matrices repeat for unchanged members; ``None``: they never do."""
        del num_nodes
        return 1

    def validate_for(self, num_nodes: int) -> None:
        """Check that this graph exists for ``num_nodes`` nodes.

        A run that shrinks or grows to another number does not fail: ``mixing`` then takes the nearest graph that
        exists, as each topology says.

        Raises:
            SettingsError: it does not; says what would be right.
        """

    def num_messages(self, num_nodes: int, round_number: int = 0, seed: int = 0) -> int:
        """Return the directed edges of a round, that is the payloads sent, when all members are present.

        With Erdős–Rényi graphs it depends on the seed: p·N·(N−1) on average.
        """
        return self.mixing(tuple(range(num_nodes)), round_number, seed).num_messages

    def require_symmetric(self, needed_by: str) -> None:
        """Refuse weights that are not symmetric, on behalf of ``needed_by`` (an algorithm's name).

        Raises:
            SettingsError: they are not.
        """
        if not self.symmetric:
            raise SettingsError(
                f"{needed_by} needs symmetric weights, and topology {self.name} has a directed graph; "
                f"use an undirected one, such as ring, torus or random_regular"
            )

    def require_doubly_stochastic(self, needed_by: str) -> None:
        """Refuse weights that do not preserve the mean, on behalf of ``needed_by`` (an algorithm's name).

        Raises:
            SettingsError: they do not.
        """
        if not self.doubly_stochastic:
            raise SettingsError(
                f"{needed_by} needs doubly stochastic weights, and those of topology {self.name} are row-stochastic: "
                f"they do not preserve the mean; use weights whose rows and columns sum to 1"
            )


class GraphTopology(Topology):
    """A topology of which a draw decides all: what is built for one is kept."""

    def mixing(
        self, members: Sequence[int], round_number: int, seed: int, present: AbstractSet[int] | None = None
    ) -> Mixing:
        members = tuple(members)
        there = None if present is None else frozenset(present)
        if there is not None and there.issuperset(members):
            there = None
        draw = self.draw(len(members), round_number, seed)
        return _built(self, members, draw, there)  # pyright: ignore[reportArgumentType] - frozen models are hashable

    def draw(self, num_nodes: int, round_number: int, seed: int) -> int:
        """Return a number that names the round's graph: equal draws mean equal graphs."""
        del num_nodes, round_number, seed
        return 0

    @abstractmethod
    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        """Return the weights among ``members`` when only those in ``present`` take part."""

    def substitutes(self, members: tuple[int, ...], draw: int) -> Mapping[int, Collection[tuple[int, ...]]]:
        """Return ``Mixing.substitutes``: none, if who is missing only takes edges away."""
        del members, draw
        return {}


# Rounds of a time-varying topology come again; the cache is bounded because those of a redrawn one, or with other
# members missing, do not.
@functools.lru_cache(maxsize=32)
def _built(topology: GraphTopology, members: tuple[int, ...], draw: int, present: frozenset[int] | None) -> Mixing:
    there = frozenset(members) if present is None else present
    return Mixing(topology.weigh(members, there, draw), topology.substitutes(members, draw))
