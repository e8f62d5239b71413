"""From a file: a graph, or weights, that somebody else made.

A line for each edge: ``i j``, or ``i j w`` with its weight; blanks or commas between them; ``#`` begins a comment. A
file ``….json`` holds the same as a list: ``[[0, 1], [1, 2]]``. Nodes are numbered from 0; all edges have a weight, or
none has.

* Undirected (the default): each edge once. Without weights the rule is Metropolis–Hastings; given ones are w_ij = w_ji.
* Directed: ``i j`` says that i sends to j, and ``i j w`` that j mixes it with w_ji = w. Without weights all that a node
  mixes, its own value included, counts alike.

Given weights are used as they are. A node keeps what they leave of 1, which must be above 0; a line ``i i w`` may say
it. They must be doubly stochastic, or else the mean drifts: ``allow_row_stochastic`` accepts that.

Elasticity: members sit at the place of their own number; others take the places that are free, in order, and whoever
finds none keeps to itself. The weight of a missing member's edges is added to both ends' own weight. On a directed
graph the weights are flows in cycles, and a cycle with a gap falls out as a whole, so that doubly stochastic weights
stay so.
Cost: one message a round for each directed edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Self

from pydantic import PrivateAttr, model_validator

from starling.algorithms.errors import SettingsError
from starling.algorithms.topologies.base import GraphTopology
from starling.algorithms.topologies.edge_list import read_graph
from starling.algorithms.topologies.given import Graph, cycles_without
from starling.algorithms.topologies.mixing import Rows, with_own_weight
from starling.algorithms.topologies.undirected import metropolis_hastings


class File(GraphTopology, name="file"):
    path: str  # of the edge list; relative to the current folder
    directed: bool = False  # edges lead from the first node of a line to the second
    allow_row_stochastic: bool = False  # accept weights that do not preserve the mean

    # Read once, where the configuration is: nodes on other machines receive the graph, and need no file.
    _graph: Graph = PrivateAttr()

    @model_validator(mode="after")
    def _read(self) -> Self:
        self._graph = read_graph(Path(self.path).expanduser(), directed=self.directed)
        columns = self._graph.columns_off()
        if columns and not self.allow_row_stochastic:
            node, total = columns
            raise ValueError(
                f"{self.path}: the weights with which node {node}'s values are mixed sum to {total:.6g}, not to 1, and "
                f"the mean would drift; correct them, or set allow_row_stochastic: true"
            )
        return self

    @property
    def symmetric(self) -> bool:
        return not self.directed

    @property
    def doubly_stochastic(self) -> bool:
        return self._graph.columns_off() is None

    def validate_for(self, num_nodes: int) -> None:
        if num_nodes != self._graph.num_nodes:
            raise SettingsError(
                f"topology file: {self.path} is a graph of {self._graph.num_nodes} nodes, and there are {num_nodes}; "
                f"take as many nodes, or another graph"
            )

    def weigh(self, members: tuple[int, ...], present: AbstractSet[int], draw: int) -> Rows:
        places = self._places(members)
        sitting = {place: node for node, place in places.items() if node in present}
        arcs = self._graph.arcs
        if self._graph.weighed_by_rule:
            pairs = ((i, j) for i, row in arcs.items() for j in row if i < j)
            edges = ((sitting[i], sitting[j]) for i, j in pairs if i in sitting and j in sitting)
            return metropolis_hastings(members, edges)
        if self.directed and len(sitting) < len(arcs) and self.doubly_stochastic:
            arcs = cycles_without(arcs, arcs.keys() - sitting.keys())
        rows: Rows = {node: {node: 1.0} for node in members}
        for place, node in sitting.items():
            others = {sitting[j]: weight for j, weight in arcs[place].items() if j in sitting}
            rows[node] = with_own_weight(node, others)
        return rows

    def _places(self, members: Sequence[int]) -> dict[int, int]:
        """Return the place of each member in the graph, without members that find none free."""
        all_places = range(self._graph.num_nodes)
        free = (place for place in all_places if place not in members)
        strangers = (node for node in members if node not in all_places)
        return {node: node for node in members if node in all_places} | dict(zip(strangers, free, strict=False))
