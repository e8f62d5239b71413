"""Graphs with weights of their own: checked, and without some of their nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from starling.algorithms.topologies.mixing import STOCHASTIC_TOLERANCE
from starling.algorithms.topologies.networks import reached

Arcs: TypeAlias = Mapping[int, Mapping[int, float]]
"""Mixing weights by node and in-neighbour, without the node's own."""


@dataclass(frozen=True)
class Graph:
    """A strongly connected graph over the nodes 0 … N−1."""

    arcs: Arcs
    weighed_by_rule: bool
    """Undirected and without weights: those in ``arcs`` are all 1 and mean nothing."""

    @property
    def num_nodes(self) -> int:
        """Return N."""
        return len(self.arcs)

    def columns_off(self) -> tuple[int, float] | None:
        """Return the first column of the weights that does not sum to 1, and its sum."""
        if self.weighed_by_rule:
            return None
        totals = {node: 1.0 - math.fsum(row.values()) for node, row in self.arcs.items()}
        for row in self.arcs.values():
            for sender, weight in row.items():
                totals[sender] += weight
        off = ((node, total) for node, total in totals.items() if abs(total - 1.0) > STOCHASTIC_TOLERANCE)
        return next(off, None)


def check_connected(path: Path, arcs: Arcs) -> None:
    """Refuse a graph in which some cannot reach all.

    Raises:
        ValueError: names one of them.
    """
    forth = [(sender, receiver) for receiver, row in arcs.items() for sender in row]
    back = [(receiver, sender) for sender, receiver in forth]
    for edges, way in ((forth, "from node 0 to node {}"), (back, "from node {} to node 0")):
        if cut_off := arcs.keys() - reached(0, edges):
            raise ValueError(f"{path}: the graph is not connected: no path leads {way.format(min(cut_off))}")


def check_own_weights(path: Path, arcs: Arcs, own: Mapping[int, float]) -> None:
    """Refuse weights that leave a node nothing for its own value, or not what ``own`` says.

    Raises:
        ValueError: names the node.
    """
    for node, row in arcs.items():
        others = math.fsum(row.values())
        if others > 1 - STOCHASTIC_TOLERANCE:
            raise ValueError(
                f"{path}: the weights that node {node} gives to others' values sum to {others:.6g}; "
                f"it must be less than 1, for the rest is the weight of its own"
            )
        if abs(others + own.get(node, 1 - others) - 1) > STOCHASTIC_TOLERANCE:
            raise ValueError(
                f"{path}: the weights of node {node} sum to {others + own[node]:.6g}, and not to 1; "
                f"without a line {node} {node} it keeps {1 - others:.6g} for itself"
            )


def cycles_without(arcs: Arcs, missing: AbstractSet[int]) -> Arcs:
    """Return doubly stochastic weights without some nodes: still doubly stochastic, and none larger than before.

    The weights into a node equal the weights out of it. Such a flow is a sum of cycles; symmetric weights are made of
    cycles there and back alone. A cycle in which a member is missing is left out.

    >>> cycles_without({0: {1: 0.5}, 1: {2: 0.5}, 2: {0: 0.5, 3: 0.2}, 3: {2: 0.2}}, {3})
    {0: {1: 0.5}, 1: {2: 0.5}, 2: {0: 0.5}, 3: {}}
    """
    left = {node: dict(sorted(row.items())) for node, row in sorted(arcs.items())}
    kept: dict[int, dict[int, float]] = {node: {} for node in left}
    for start in left:
        walk = [start]
        while left[walk[-1]] or len(walk) > 1:
            options = left[walk[-1]]
            if not options:  # only what rounding leaves ends somewhere
                end = walk.pop()
                del left[walk[-1]][end]
                continue
            following = walk[-2] if len(walk) > 1 and walk[-2] in options else next(iter(options))
            if following not in walk:
                walk.append(following)
                continue
            cycle = walk[walk.index(following) :]
            walk = walk[: walk.index(following) + 1]
            hops = list(zip(cycle, (*cycle[1:], cycle[0]), strict=True))
            weight = min(left[i][j] for i, j in hops)
            for i, j in hops:
                left[i][j] -= weight
                if left[i][j] <= STOCHASTIC_TOLERANCE:
                    del left[i][j]
                if missing.isdisjoint(cycle):
                    kept[i][j] = kept[i].get(j, 0.0) + weight
    return kept
