"""The penalty of EDiT: norms far above their history are outliers, and the others give softmax weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.algorithms.api import NodeId


AGAIN = 10
"""Rounds in a row in which a module is rolled back, before the node's log says so."""


class History(TypedDict):
    """The detector's knowledge of n numbers, in tensors of n rows."""

    mean: Tensor
    """μ, shape (n,), float64."""
    spread: Tensor
    """M, shape (n,), float64."""
    scores: Tensor
    """The last ``warmup`` scores of each, shape (n, warmup), float64."""
    count: Tensor
    """Numbers learned from, shape (n,), int64."""


class Detector(BaseModel):
    """EWMA z-scores of several numbers at once, each with a history of its own.

    A number G is an outlier if z(G) > ``threshold`` · max(1, σ), σ the unbiased standard deviation of the last
    ``warmup`` scores. With α = ``decay`` every finite G, outlier or not, then moves the mean μ and the spread M, and
    its score by the *new* μ and M joins the scores:

        z(G) = (G - μ) / √M          d = G - μ          μ ← μ + α d          M ← (1 - α) (M + α d (G - μ))

    where the last μ is the new one. Before ``warmup`` numbers z is 0 and no finite number is an outlier: μ begins at 0,
    and takes about 1/α numbers to arrive. Small numbers never are outliers; what is not finite always is.

    As outliers are learned from, norms that rise for good are accepted again after some rounds; one very large norm
    widens M, and hides smaller outliers for some 1/α rounds.

    Reference: ``OnlineDynamicEWMA`` in atorch, and its use for sharded models (FSDP), which learns from all numbers.
    Its use for data-parallel groups learns from accepted ones alone, and may lock a node out for good.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    decay: float = Field(default=0.02, gt=0, lt=1)  # α; atorch
    warmup: PositiveInt = 120  # numbers before there are outliers, and scores that the threshold adapts to; atorch
    threshold: PositiveFloat = 3.0  # in standard deviations; atorch (its megatron arguments: 4)

    def fresh(self, size: int) -> History:
        """Return an empty history of ``size`` numbers."""
        zeros = torch.zeros(size, dtype=torch.float64)
        scores = torch.zeros(size, self.warmup, dtype=torch.float64)
        return {"mean": zeros, "spread": zeros, "scores": scores, "count": torch.zeros(size, dtype=torch.int64)}

    def outliers(self, history: History, values: Tensor) -> Tensor:
        """Return a mask of the outliers among ``values``, float64 of shape (n,); shape (n,), bool."""
        z = _scores(values, history["mean"], history["spread"])
        # Once there may be outliers, ``warmup`` scores are known.
        deviation = history["scores"].std(dim=1, correction=min(1, self.warmup - 1))
        return ~values.isfinite() | (
            (history["count"] >= self.warmup) & (z > self.threshold * deviation.clamp(min=1.0))
        )

    def updated(self, history: History, values: Tensor) -> History:
        """Return the history with ``values``, shape (n,), learned from; with those that are finite."""
        before, spread, scores, count = history["mean"], history["spread"], history["scores"], history["count"]
        learned = values.isfinite()
        off = values - before
        mean = before + self.decay * off
        moved = (1 - self.decay) * (spread + self.decay * off * (values - mean))
        z = torch.where(count + 1 >= self.warmup, _scores(values, mean, moved), 0.0)
        return {
            "mean": torch.where(learned, mean, before),
            "spread": torch.where(learned, moved, spread),
            "scores": torch.where(learned.unsqueeze(1), torch.cat([scores[:, 1:], z.unsqueeze(1)], dim=1), scores),
            "count": count + learned,
        }


def _scores(values: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return torch.where(spread > 0, (values - mean) / spread.where(spread > 0, 1.0).sqrt(), 0.0)


def weights_of(
    norms: Mapping[NodeId, Tensor], temperature: float, shares: Mapping[NodeId, float]
) -> dict[NodeId, list[float]]:
    """Return softmax(-G / T) over the nodes, for each of the numbers in ``norms``; infinite ones weigh nothing.

    The weights of a number sum to 1, or are all 0 if all are infinite.

    Args:
        norms: G by node, each of shape (n,).
        temperature: T.
        shares: of the weights, that nodes have for something else; the softmax gets what they leave of 1. Shares of
            nodes that weigh nothing go to the others.

    >>> weights_of({0: torch.tensor([1.0]), 1: torch.tensor([1.0]), 2: torch.tensor([torch.inf])}, 1.0, {})
    {0: [0.5], 1: [0.5], 2: [0.0]}
    """
    nodes = sorted(norms)
    told = torch.stack([norms[node].double().cpu() for node in nodes])
    weights = torch.softmax(-told / temperature, dim=0).nan_to_num(0.0)  # no number, if all are infinite
    if shares:
        given = torch.tensor([[shares.get(node, 0.0)] for node in nodes], dtype=torch.float64)
        left = torch.where(told.isinf(), 0.0, given)
        whole = given.sum()
        left = left * torch.where(told.isinf().any(dim=0) & (left.sum(dim=0) > 0), whole / left.sum(dim=0), 1.0)
        weights = torch.where(left.sum(dim=0) > 0, (1 - whole) * weights + left, weights)
    return {node: [float(weight) for weight in row] for node, row in zip(nodes, weights, strict=True)}


def rolled_back(before: Sequence[int], weights: Mapping[NodeId, Sequence[float]]) -> list[int]:
    """Return, for each number, the rounds in a row without weight on any node; ``before`` counts earlier ones.

    >>> rolled_back([3, 3], {0: [0.0, 1.0], 1: [0.0, 0.0]})
    [4, 0]
    """
    columns = zip(*weights.values(), strict=True)
    return [0 if any(column) else count + 1 for count, column in zip(before, columns, strict=True)]


def norm_of(values: Tensor) -> float:
    """Return ‖x‖₂ in single precision, in which the order of summation does not show."""
    return float(values.double().square().sum().sqrt().float())
