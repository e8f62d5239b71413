"""Complete: everybody exchanges with everybody, and holds the mean after one round.

    w_ij = 1/N          ρ = 0

Elasticity: with members missing it is complete on those that are there.
Cost: N·(N−1) messages a round.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from starling.algorithms.topologies.base import GraphTopology
from starling.algorithms.topologies.mixing import Rows


class Complete(GraphTopology, name="complete"):
    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        there = [node for node in members if node in present]
        # One row for all: N of them would be N² entries, 40 MB for 1000 nodes.
        row = dict.fromkeys(there, 1 / max(1, len(there)))
        return {node: row if node in present else {node: 1.0} for node in members}
