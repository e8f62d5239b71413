"""Outer optimizers: turn an averaged outer gradient into a step.

Each is a pair of pure functions: ``init(parameters)`` makes a state, ``update(gradient, state)`` returns the step to
*add* to the parameters and the next state. Nothing is written in place, so a state may be staged, shared and rolled
back. An outer gradient is old minus new (``anchor - parameters``), so steps go against it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, TypeAlias

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from starling.algorithms.node import State

OuterState: TypeAlias = "dict[str, State]"

_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OuterOptimizer(Part, family="outer optimizer", catalog="starling.algorithms.outer"):
    """A rule that turns averaged outer gradients into steps."""

    lr: PositiveFloat = 1.0  # η

    @abstractmethod
    def init(self, parameters: Tensor) -> OuterState:
        """Make the state for parameters of shape (P,)."""

    @abstractmethod
    def update(self, gradient: Tensor, state: OuterState) -> tuple[Tensor, OuterState]:
        """Return the step to add, shape (P,), and the next state; neither argument is changed."""


class SGD(OuterOptimizer, name="sgd"):
    """Gradient descent, with heavy-ball momentum if asked: v ← β v + Δ; step −η v (step −η Δ when β = 0).

    With ``lr: 1`` and no momentum the outer step is plain averaging, as in FedAvg.
    """

    momentum: float = Field(default=0.0, ge=0, lt=1)  # β

    def init(self, parameters: Tensor) -> OuterState:
        return {"velocity": torch.zeros_like(parameters)} if self.momentum else {}

    def update(self, gradient: Tensor, state: OuterState) -> tuple[Tensor, OuterState]:
        if not self.momentum:
            return gradient * -self.lr, state
        velocity = (tensor_in(state, "velocity") * self.momentum).add_(gradient)
        return velocity * -self.lr, {"velocity": velocity}


class Nesterov(OuterOptimizer, name="nesterov"):
    """Nesterov momentum in the convention of torch and optax: v ← β v + Δ; step −η (Δ + β v), with the new v.

    A constant Δ = 1 moves θ = 0 to −η(1+β) in the first step, and by η/(1−β) a step in the limit.
    """

    lr: PositiveFloat = 0.7  # η; DiLoCo, section 3
    momentum: float = Field(default=0.9, ge=0, lt=1)  # β; DiLoCo, section 3

    def init(self, parameters: Tensor) -> OuterState:
        return {"velocity": torch.zeros_like(parameters)}

    def update(self, gradient: Tensor, state: OuterState) -> tuple[Tensor, OuterState]:
        # Fresh results are written in place: a model-sized temporary less for each.
        velocity = (tensor_in(state, "velocity") * self.momentum).add_(gradient)
        return (velocity * self.momentum).add_(gradient).mul_(-self.lr), {"velocity": velocity}


class Adam(OuterOptimizer, name="adam"):
    """Adam with bias correction, as in torch.optim.Adam, on outer gradients."""

    lr: PositiveFloat = 0.01  # η; ours, as an outer step is one of a round, and 0.001 a round gets nowhere
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)  # β₁, β₂
    eps: PositiveFloat = 1e-8  # ε, added to the root

    def init(self, parameters: Tensor) -> OuterState:
        return {"first": torch.zeros_like(parameters), "second": torch.zeros_like(parameters), "step": 0}

    def update(self, gradient: Tensor, state: OuterState) -> tuple[Tensor, OuterState]:
        beta1, beta2 = self.betas
        before = state["step"]
        assert isinstance(before, int)
        step = before + 1
        first = torch.lerp(tensor_in(state, "first"), gradient, 1 - beta1)
        second = tensor_in(state, "second") * beta2 + gradient.square() * (1 - beta2)
        root = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(self.eps)
        return first / root * (-self.lr / (1 - beta1**step)), {"first": first, "second": second, "step": step}


def tensor_in(state: OuterState, key: str) -> Tensor:
    """Return the tensor ``key`` of an outer optimizer's state."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value
