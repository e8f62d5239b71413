"""The mean of several nodes' models, with which a run without replicas is evaluated and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def mean_model(models: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the mean of parameters, shape (P,), and of floating-point buffers, shape (B,), added in the order given.

    One model at a time is held besides the sum; a sum of float32 values is a float32.
    """
    total: tuple[Tensor, Tensor] | None = None
    count = 0
    for parameters, buffers in models:
        count += 1
        if total is None:
            total = parameters.clone(), buffers.clone()
        else:
            total[0].add_(parameters)
            total[1].add_(buffers)
    assert total is not None, "there is at least one node"
    return torch.div(total[0], count), torch.div(total[1], count)
