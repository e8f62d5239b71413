"""The rule interface: wrap a node's gradient function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from starling.algorithms.layout import Layout


@dataclass(frozen=True)
class DataBatch:
    """Samples of a node's task."""

    tensors: tuple[Tensor, ...]
    num_samples: int


GradientFunction: TypeAlias = "Callable[[Tensor, DataBatch], tuple[Tensor, Tensor]]"
"""``(parameters, batch) -> (mean gradient, mean loss)``; the gradient, shape (P,), is overwritten by the next call."""


@dataclass(frozen=True)
class LocalProblem:
    """The node's problem, which a rule builds upon."""

    gradient: GradientFunction
    """The task's own."""
    module: nn.Module
    """The model; its parameters are views of ``node.parameters``."""
    loss: Callable[[nn.Module, DataBatch], Tensor]
    """The task's mean loss, to be differentiated."""
    layout: Layout
    num_samples: int
    """Training samples that the node owns."""
    batch_size: int
    """Samples of one optimizer step."""
    rng: torch.Generator
    """Random generator of the rule, derived from (run seed, round, node, step)."""


class BatchSampler(Protocol):
    """Chooses the samples of each step."""

    def next(self, size: int) -> Tensor:
        """Return about ``size`` places among the node's own samples, int64 in [0, num_samples)."""
        ...


class Rule:
    """Wraps a node's gradient function for one ``Train``: a proximal term, a control variate, clipping and noise.

    A rule is an ordinary object that the program makes in its round, from tensors of its state if need be. The program
    reads the rule's gathered values after the ``Train``.
    """

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        """Return the gradient function of the steps. It may be called at other points than the current one."""
        return problem.gradient

    def sampler(self, problem: LocalProblem) -> BatchSampler | None:
        """Return a sampler for this ``Train``; ``None`` keeps the node's own."""
        del problem
        return None

    def finish(self) -> None:
        """Release what ``wrap`` has taken, such as hooks on the module; runs once, also where the ``Train`` fails."""
