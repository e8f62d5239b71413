"""The proximal term: a pull towards an anchor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.algorithms.rules.base import DataBatch, GradientFunction, LocalProblem, Rule

if TYPE_CHECKING:
    from torch import Tensor


class Proximal(Rule):
    """Steps on f(y) + μ/2 ‖y − a‖²: g ← ∇f(y) + μ (y − a).

    Args:
        mu: μ ≥ 0; 0 gives the bits of no rule.
        anchor: a, shape (P,); not written to.

    Reference: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127, (2).
    """

    def __init__(self, mu: float, anchor: Tensor) -> None:
        self.mu = mu
        self.anchor = anchor

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            own, loss = problem.gradient(parameters, batch)
            return own.add_(parameters - self.anchor, alpha=self.mu), loss

        # Without a term rather than with a zero one: 0 · (y − a) is NaN once y is infinite.
        return gradient if self.mu else problem.gradient
