"""Losses and metrics of tasks that predict a class or a number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits, shape (b, classes), and classes, shape (b,)."""
    return F.cross_entropy(outputs, labels)


def classification_metrics(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss, and the share of labels that are likeliest."""
    accuracy = (outputs.argmax(dim=1) == labels).double().mean()
    return {"loss": F.cross_entropy(outputs, labels), "accuracy": accuracy}


def regression_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of outputs, shape (b, 1), and targets, shape (b,)."""
    return F.mse_loss(outputs.squeeze(1), targets)


def regression_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss, and the mean absolute error."""
    return {"loss": regression_loss(outputs, targets), "mae": (outputs.squeeze(1) - targets).abs().mean()}


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits, shape (b, t, vocabulary), and tokens, shape (b, t)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def next_token_metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss, and the share of tokens that are predicted."""
    accuracy = (logits.argmax(dim=-1) == targets).double().mean()
    return {"loss": next_token_loss(logits, targets), "accuracy": accuracy}


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """Add e to the loss."""
    return means | {"perplexity": float(torch.tensor(means["loss"], dtype=torch.float64).exp())}
