"""The control variate: a constant added to every gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.algorithms.rules.base import DataBatch, GradientFunction, LocalProblem, Rule

if TYPE_CHECKING:
    from torch import Tensor


class ControlVariate(Rule):
    """Steps on u = g + d with the correction d, and keeps the mean of the task's own gradients g.

    SCAFFOLD's correction is d = c − c_i, its new control variate of the node the mean of g over the K steps.

    Args:
        correction: d, shape (P,); not written to.

    Reference: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
    arXiv:1910.06378, Algorithm 1.
    """

    def __init__(self, correction: Tensor) -> None:
        self.correction = correction
        self.num_gradients = 0
        """Over how many the mean is."""
        self._sum: Tensor | None = None

    @property
    def mean_gradient(self) -> Tensor:
        """Return (1/K) Σ_k g_k over all steps so far, shape (P,); zeros before the first."""
        if self._sum is None:
            return self.correction.new_zeros(self.correction.shape)
        return self._sum / self.num_gradients

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            own, loss = problem.gradient(parameters, batch)
            self._sum = own.clone() if self._sum is None else self._sum.add_(own)
            self.num_gradients += 1
            return own.add_(self.correction), loss

        return gradient
