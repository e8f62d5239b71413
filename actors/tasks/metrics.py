"""Metrics that any task with predictions can report besides its own: ``task.extra_metrics``."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.tasks.base import Metric


class TopKAccuracy(Metric, name="top_k"):
    """The share of samples whose class is among the ``k`` that the model finds likeliest."""

    k: PositiveInt = 5

    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the metric of logits, shape (r, classes), and classes, shape (r,)."""
        best = outputs.topk(min(self.k, outputs.shape[1]), dim=1).indices
        return (best == targets.unsqueeze(1)).any(dim=1).double().mean()

    @property
    def label(self) -> str:
        return f"top_{self.k}"


class Brier(Metric, name="brier"):
    """The mean squared distance of predicted probabilities from the class that is the case, 0 to 2: calibration."""

    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the metric of logits, shape (r, classes), and classes, shape (r,)."""
        truth = nn.functional.one_hot(targets, outputs.shape[1])
        return (outputs.double().softmax(dim=1) - truth).square().sum(dim=1).mean()
