"""Torus: a grid whose ends are joined; each exchanges with its four neighbours.

    w_ij = 1/5          ρ = max_{(k,l)≠0} |1 + 2 cos(2πk/a) + 2 cos(2πl/b)| / 5    (a = rows, b = cols ≥ 3; 4×4: 0.6)

The places are filled row by row. A side of 2 joins its two ends once; weights then follow Metropolis–Hastings.
Elasticity: if the given sides do not fit the number of members (somebody joined or left), the sides nearest to a square
are taken. A prime number of members is a ring. Neighbours change then all over the grid. A member missing in one round
leaves the others their edges.
Cost: 4·N messages a round.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from pydantic import PositiveInt

from starling.algorithms.errors import SettingsError
from starling.algorithms.topologies.networks import Edge
from starling.algorithms.topologies.ring import ring_edges
from starling.algorithms.topologies.undirected import UndirectedTopology


class Torus(UndirectedTopology, name="torus"):
    rows: PositiveInt | None = None  # a; null: as cols leaves it, or nearest to a square
    cols: PositiveInt | None = None  # b; null: as rows leaves it, or nearest to a square

    def edges(self, num_nodes: int, draw: int) -> Collection[Edge]:
        rows, cols = self.sides(num_nodes)
        edges: set[Edge] = set()
        for row in range(rows):
            edges |= ring_edges(range(row * cols, (row + 1) * cols))
        for col in range(cols):
            edges |= ring_edges(range(col, num_nodes, cols))
        return edges

    def sides(self, num_nodes: int) -> tuple[int, int]:
        """Return the rows and columns."""
        return self._given_sides(num_nodes) or _nearest_to_square(num_nodes)

    def validate_for(self, num_nodes: int) -> None:
        sides = self._given_sides(num_nodes)
        if sides is None:
            given = " × ".join(f"{name} {side}" for name, side in (("rows", self.rows), ("cols", self.cols)) if side)
            nearest = " × ".join(str(side) for side in _nearest_to_square(num_nodes))
            raise SettingsError(
                f"topology torus: {num_nodes} nodes are no grid of {given}; {nearest} is one, or leave both sides out"
            )
        if self.rows is None and self.cols is None and sides[0] == 1 and num_nodes > 3:
            raise SettingsError(
                f"topology torus: {num_nodes} nodes are no grid, for {num_nodes} is prime; "
                f"take {num_nodes - 1} or {num_nodes + 1} nodes, or topology ring"
            )

    def _given_sides(self, num_nodes: int) -> tuple[int, int] | None:
        """Rows and columns; ``None`` if what is set does not fit."""
        if self.rows is None and self.cols is None:
            return _nearest_to_square(num_nodes)
        rows = self.rows or num_nodes // (self.cols or 1)
        cols = self.cols or num_nodes // rows
        return (rows, cols) if rows * cols == num_nodes else None


def _nearest_to_square(num_nodes: int) -> tuple[int, int]:
    """The most equal factors.

    >>> [_nearest_to_square(n) for n in (1, 7, 12, 16)]
    [(1, 1), (1, 7), (3, 4), (4, 4)]
    """
    rows = next(side for side in range(math.isqrt(num_nodes), 0, -1) if num_nodes % side == 0)
    return rows, num_nodes // rows
