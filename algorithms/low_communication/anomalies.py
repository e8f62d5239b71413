"""The penalty of EDiT: whose norms are far above what their history lets expect, and what weights norms give."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from algorithms.api import NodeId, State

History: TypeAlias = "dict[str, State]"


class Detector(BaseModel):
    """EWMA z-scores of several numbers at once, each with a history of its own.

    With α = ``decay`` an accepted G moves the mean μ and the spread M, and its score z joins the last W = ``window``:

        z = (G - μ) / √M          d = G - μ          μ ← μ + α d          M ← (1 - α) (M + α d (G - μ))

    where the last μ is the new one. After ``warmup`` accepted ones G is an outlier if z > ``threshold`` · max(1, σ), σ
    the standard deviation of the last scores. Before that z counts as 0 and nothing is an outlier: μ begins at 0, and
    takes about 1/α numbers to arrive. Small numbers never are outliers.

    Reference: the code of EDiT (arXiv:2412.07210) in atorch, whose version for data-parallel groups learns from
    accepted numbers alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    decay: float = Field(default=0.02, gt=0, lt=1)  # α
    warmup: PositiveInt = 120  # accepted numbers before there are outliers
    threshold: PositiveFloat = 3.0  # in standard deviations
    window: PositiveInt = 100  # W, scores that the threshold adapts to; not in the paper

    def fresh(self, size: int) -> History:
        """No history, of ``size`` numbers."""
        zeros = torch.zeros(size, dtype=torch.float64)
        scores = torch.zeros(size, self.window, dtype=torch.float64)
        return {"mean": zeros, "spread": zeros, "scores": scores, "count": torch.zeros(size, dtype=torch.int64)}

    def outliers(self, history: History, values: Tensor) -> Tensor:
        """Which of ``values``, float64 of shape (n,), are outliers; shape (n,), bool."""
        scores, count = _tensor(history, "scores"), _tensor(history, "count")
        known = torch.arange(self.window) >= self.window - count.unsqueeze(1)
        number = known.sum(dim=1).clamp(min=1)
        mean = torch.where(known, scores, 0.0).sum(dim=1) / number
        spread = (torch.where(known, scores - mean.unsqueeze(1), 0.0).square().sum(dim=1) / number).sqrt()
        return (count >= self.warmup) & (self._scores(history, values) > self.threshold * spread.clamp(min=1.0))

    def updated(self, history: History, values: Tensor, accepted: Tensor) -> History:
        """The history with those of ``values`` that are ``accepted``, both of shape (n,)."""
        before, spread = _tensor(history, "mean"), _tensor(history, "spread")
        scores, count = _tensor(history, "scores"), _tensor(history, "count")
        off = values - before
        mean = before + self.decay * off
        moved = (1 - self.decay) * (spread + self.decay * off * (values - mean))
        pushed = torch.cat([scores[:, 1:], self._scores(history, values).unsqueeze(1)], dim=1)
        return {
            "mean": torch.where(accepted, mean, before),
            "spread": torch.where(accepted, moved, spread),
            "scores": torch.where(accepted.unsqueeze(1), pushed, scores),
            "count": count + accepted,
        }

    def _scores(self, history: History, values: Tensor) -> Tensor:
        spread = _tensor(history, "spread")
        scores = (values - _tensor(history, "mean")) / spread.where(spread > 0, 1.0).sqrt()
        return torch.where((_tensor(history, "count") >= self.warmup) & (spread > 0), scores, 0.0)


def _tensor(history: History, key: str) -> Tensor:
    return cast("Tensor", history[key])


def weights_of(
    norms: Mapping[NodeId, Tensor], temperature: float, shares: Mapping[NodeId, float]
) -> dict[NodeId, list[float]]:
    """softmax(-G / T) over the nodes, for each of the numbers in ``norms``; infinite ones weigh nothing.

    Args:
        norms: G by node, each of shape (n,).
        temperature: T.
        shares: of the weights, that nodes have for something else; the softmax gets what they leave of 1.

    >>> weights_of({0: torch.tensor([1.0]), 1: torch.tensor([1.0]), 2: torch.tensor([torch.inf])}, 1.0, {})
    {0: [0.5], 1: [0.5], 2: [0.0]}
    """
    nodes = sorted(norms)
    told = torch.stack([norms[node].double().cpu() for node in nodes])
    weights = torch.softmax(-told / temperature, dim=0).nan_to_num(0.0)  # no number, if all are infinite
    if shares:
        weights = (1 - sum(shares.values())) * weights + torch.tensor([[shares.get(node, 0.0)] for node in nodes])
        weights = torch.where(told.isinf(), 0.0, weights)
    return {node: [float(weight) for weight in row] for node, row in zip(nodes, weights, strict=True)}


def norm_of(values: Tensor) -> float:
    """‖x‖₂ in single precision; in which order the squares were added up does not show in that."""
    return float(values.double().square().sum().sqrt().float())
