"""Steps of plain SGD and Adam on the rows of one tensor: the bits of torch's, many nodes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

if TYPE_CHECKING:
    from collections.abc import Callable


Update: TypeAlias = "Callable[[Tensor, Tensor, dict[str, Tensor], int, float], None]"
"""``(values, gradient, moments, age, rate)``: one step in place, of values of any shape, after ``age`` others."""


def update_of(name: str, options: dict[str, Any]) -> Update | None:
    """The update of an optimizer as torch computes it, without the object around it; ``None``: it takes the object.

    Args:
        name: lower case, without underscores.
        options: those that are set.
    """
    make, known = _UPDATES.get(name, (None, frozenset[str]()))
    return make(options) if make is not None and options.keys() <= known else None


def _sgd(options: dict[str, Any]) -> Update:
    settings = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False} | options

    def update(values: Tensor, gradient: Tensor, moments: dict[str, Tensor], age: int, rate: float) -> None:
        del age
        buffers = [moments.get("momentum_buffer")]
        sgd([values], [gradient], buffers, foreach=False, fused=False, lr=rate, **settings)
        if buffers[0] is not None:
            moments["momentum_buffer"] = buffers[0]

    return update


def _adam(options: dict[str, Any], *, decoupled: bool) -> Update:
    default = {"eps": 1e-8, "weight_decay": 1e-2 if decoupled else 0.0, "amsgrad": False, "maximize": False}
    settings: dict[str, Any] = default | {"decoupled_weight_decay": decoupled} | options
    beta1, beta2 = settings.pop("betas", (0.9, 0.999))
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if settings["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def update(values: Tensor, gradient: Tensor, moments: dict[str, Tensor], age: int, rate: float) -> None:
        for moment in names:
            if moment not in moments:
                moments[moment] = torch.zeros_like(values)
        adam(
            [values],
            [gradient],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [moments["max_exp_avg_sq"]] if settings["amsgrad"] else [],
            [torch.tensor(float(age))],
            foreach=False,
            fused=False,
            beta1=beta1,
            beta2=beta2,
            lr=rate,
            **settings,
        )

    return update


_ADAM_OPTIONS = frozenset({"betas", "eps", "weight_decay", "amsgrad", "maximize"})


_UPDATES: dict[str, tuple[Callable[[dict[str, Any]], Update], frozenset[str]]] = {
    "sgd": (_sgd, frozenset({"weight_decay", "momentum", "dampening", "nesterov", "maximize"})),
    "adam": (lambda options: _adam(options, decoupled=False), _ADAM_OPTIONS),
    "adamw": (lambda options: _adam(options, decoupled=True), _ADAM_OPTIONS),
}
"""Batched update by optimizer name, with the option names that the batched update implements."""
