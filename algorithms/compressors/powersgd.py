"""PowerSGD: matrices as products of two thin ones, found by one step of the power method on the mean of all nodes.

Each parameter of two or more dimensions is a matrix M of shape (n, m), n its first dimension, to which the error e of
the last time is added. With Q of shape (m, r), r = ``rank``, from the last time, at first random:

    M_i ← g_i + e_i          P = orthonormal(mean_i M_i Q)          Q ← mean_i M_iᵀ P
    mean_i g_i ≈ P Qᵀ          e_i ← M_i - P Qᵀ

Both products are linear in M, so the result is that of the mean, and so the errors sum up to what the mean lacks. All
else, and matrices for which r (n + m) ≥ n·m, is sent as it is.

Deviations: the columns are made orthonormal by a QR decomposition. It compresses from the first step on (torch's hook
begins after 1000, the authors' code after 100), and at any gain (both: at twofold or more). The first Q is the same in
all runs, whatever their seed.
Elasticity: Q is shared state, and a joiner receives it; e is its node's own: it survives the loss of others, and is
lost with its node.
Cost: two exchanges, of 4·r·n and the uncompressed values and then of 4·r·m bytes. State: r·m shared values, P own ones.
Reference: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS
2019, arXiv:1905.13727, Algorithms 1 and 2.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from pydantic import PositiveInt

from starling.algorithms.api import AllReduce, Reduced, all_reduce_bytes
from starling.algorithms.compressors.base import Compressor
from starling.algorithms.seeds import generator
from starling.algorithms.state import NodeState, field

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node


@dataclass(frozen=True)
class _Matrix:
    """Offset of a matrix in the flat parameters, and the matrix's shape."""

    start: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the matrix as a view of the parameters, shape (n, m)."""
        return flat[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns that span the space of ``columns``."""
    return cast("Tensor", torch.linalg.qr(columns)[0])  # pyright: ignore[reportUnknownMemberType]


class Shared(NodeState):
    right: Tensor = field("powersgd")  # Q of all matrices, flat


class Local(NodeState):
    error: Tensor | None = field("powersgd", default=None)  # e, shape (P,); None: 0, before the first exchange


class PowerSGD(Compressor, name="powersgd"):
    """Low-rank gradients with error feedback; see the module's docstring."""

    rank: PositiveInt = 4  # r, columns of the two factors

    def matrices(self, layout: Layout) -> list[_Matrix]:
        """Return the parameters that are compressed: matrices whose factors are smaller."""
        shaped = [
            _Matrix(entry.start, entry.shape[0], math.prod(entry.shape[1:]))
            for entry in layout.entries
            if len(entry.shape) > 1
        ]
        return [one for one in shaped if self.rank * (one.rows + one.columns) < one.rows * one.columns]

    def init(self, node: Node) -> None:
        starts = [
            torch.randn(one.columns, self.rank, generator=generator("powersgd", place)).view(-1)
            for place, one in enumerate(self.matrices(node.layout))
        ]
        Shared(node.shared).right = torch.cat([*starts, torch.empty(0)]).to(node.parameters)

    def _split(self, flat: Tensor, sides: list[int]) -> list[Tensor]:
        """Return the factors that lie one after another in ``flat``, each of shape (side, r)."""
        places = zip(sides, itertools.accumulate(sides), strict=True)
        return [flat[self.rank * (stop - side) : self.rank * stop].view(side, self.rank) for side, stop in places]

    async def all_reduce(self, node: Node, gradient: Tensor) -> Reduced[Tensor]:
        matrices = self.matrices(node.layout)
        shared, local = Shared(node.shared), Local(node.local)
        whole = gradient.clone() if local.error is None else gradient + local.error
        rest = torch.ones(len(whole), dtype=torch.bool)
        for one in matrices:
            one.of(rest).fill_(value=False)
        rest = rest.to(whole.device)
        tall, wide = [one.rows for one in matrices], [one.columns for one in matrices]
        guesses = self._split(shared.right, wide)
        thin = [(one.of(whole) @ guess).view(-1) for one, guess in zip(matrices, guesses, strict=True)]
        first = await AllReduce({"left": torch.cat([*thin, whole[:0]]), "rest": whole[rest]})
        left = [_orthonormal(part) for part in self._split(first.value["left"], tall)]
        thin = [(one.of(whole).T @ part).reshape(-1) for one, part in zip(matrices, left, strict=True)]
        second = await AllReduce(torch.cat([*thin, whole[:0]]))
        shared.right = second.value
        mean = torch.empty_like(whole)
        mean[rest] = first.value["rest"]
        for one, p, q in zip(matrices, left, self._split(second.value, wide), strict=True):
            one.of(mean).copy_(p @ q.T)
        local.error = torch.where(rest, 0.0, whole - mean)
        return Reduced(mean, second.members, second.weight)

    def unsent(self, node: Node) -> float:
        error = Local(node.local).error
        return 0.0 if error is None else math.sqrt(float(torch.dot(error, error)))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        matrices, size = self.matrices(layout), layout.dtype.itemsize
        rest = layout.num_values - sum(one.rows * one.columns for one in matrices)
        left = self.rank * sum(one.rows for one in matrices)
        right = self.rank * sum(one.columns for one in matrices)
        return all_reduce_bytes(size * (left + rest), num_nodes) + all_reduce_bytes(size * right, num_nodes)
