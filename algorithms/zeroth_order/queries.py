"""Queries of an FZooS node: points and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Node

Queries: TypeAlias = "tuple[Tensor, Tensor]"
"""Queried points, shape (n, P), as the model's values, and what was found there, shape (n,), float64."""


class Local(NodeState):
    points: Tensor | None = None  # queried, shape (n, P); None: nothing was queried yet
    values: Tensor | None = None  # found there, shape (n,)
    surrogate: Tensor | None = None  # ν_i, shape (D,)


def known_to(node: Node) -> Queries:
    """Return the queries of ``node``; empty tensors if it is new."""
    local = Local(node.local)
    if local.points is None or local.values is None:
        none = node.parameters.new_empty((0, node.layout.num_values))
        return none, none.new_empty(0, dtype=torch.float64)
    return local.points, local.values


def around(x: Tensor, radius: float, count: int, rng: torch.Generator) -> Tensor:
    """Return points uniform in a cube around ``x``, shape (count, P)."""
    away = torch.rand(count, len(x), dtype=torch.float64, generator=rng) * 2 - 1
    return x + away.to(x.device) * radius


def nearest(known: Queries, x: Tensor, count: int) -> Queries:
    """Return those of the queries that are nearest to ``x``, in float64."""
    points, values = known
    pieces = (points[start : start + 128] for start in range(0, len(points), 128))
    order = torch.cat([(piece - x).square().sum(dim=1) for piece in pieces]).argsort(stable=True)[:count]
    return points[order].double(), values[order]


def scaled(values: Tensor) -> tuple[Tensor, float]:
    """Return values between 0 and 1, and the length of the range that they had."""
    extent = float(values.max() - values.min()) or 1.0
    return (values - values.min()) / extent, extent


def rebased(known: Queries) -> Queries:
    """Return the queries with all values but the last shifted, so that the nearest one agrees with it.

    The last one is of another batch, on which the loss is higher or lower everywhere: without the shift that would look
    like a steep slope between points that are near.
    """
    points, values = known
    if len(values) < 2:
        return known
    place = int((points[:-1] - points[-1]).square().sum(dim=1).argmin())
    earlier = values[:-1] + (values[-1] - values[place])
    kept = [one for one in range(len(points) - 1) if one != place or not torch.equal(points[place], points[-1])]
    return torch.cat([points[kept], points[-1:]]), torch.cat([earlier[kept], values[-1:]])
