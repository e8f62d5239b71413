"""Alternating: several topologies used in turn, a round each.

Round t is round ⌊t/k⌋ of topology t mod k, for k topologies. Each counts its own rounds, so that a time-varying one
among them goes through all of its graphs; random ones draw from streams of their own.

    topology: {name: alternating, topologies: [ring, ring, ring, complete]}

Elasticity: as each of them.
Cost: that of the round's topology.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from pydantic import field_validator

from starling.algorithms.seeds import derive_seed
from starling.algorithms.topologies.base import Topology
from starling.algorithms.topologies.mixing import Mixing


class Alternating(Topology, name="alternating"):
    topologies: tuple[Topology, ...]  # used in turn, a round each

    @field_validator("topologies")
    @classmethod
    def _not_empty(cls, topologies: tuple[Topology, ...]) -> tuple[Topology, ...]:
        if not topologies:
            raise ValueError("must name one topology at least")
        return topologies

    @property
    def symmetric(self) -> bool:
        return all(topology.symmetric for topology in self.topologies)

    @property
    def doubly_stochastic(self) -> bool:
        return all(topology.doubly_stochastic for topology in self.topologies)

    def mixing(
        self, members: Sequence[int], round_number: int, seed: int, present: AbstractSet[int] | None = None
    ) -> Mixing:
        turn, index = divmod(round_number, len(self.topologies))
        return self.topologies[index].mixing(members, turn, derive_seed("alternating", seed, index), present)

    def period(self, num_nodes: int) -> int | None:
        periods = [topology.period(num_nodes) for topology in self.topologies]
        known = [period for period in periods if period is not None]
        return len(periods) * math.lcm(*known) if len(known) == len(periods) else None

    def validate_for(self, num_nodes: int) -> None:
        for topology in self.topologies:
            topology.validate_for(num_nodes)
