"""FedProx: FedAvg with a proximal term that pulls local steps towards the shared model.

A node of the cohort S minimises its own loss and a proximal term with coefficient μ = ``mu``, from the shared model x;
the rest is FedAvg (w_i by ``weighting``, γ = ``outer.lr``):

    h_i(y) = f_i(y) + μ/2 ‖y - x‖²          y ← y - η (g_i(y) + μ (y - x))
    x ← x - γ Σ_{i∈S} w_i (x - y_i)

Deviations: a node does a fixed amount of work, ``epochs`` or ``steps``; how exactly it has minimised h_i is not
measured. For the rest see ``fedavg``.
Elasticity: as FedAvg: x is all there is, and nodes keep nothing.
Cost: as FedAvg; one more pass over the parameters in a step.
Reference: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127, Algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from starling.algorithms.federated.fedavg import FedAvg
from starling.algorithms.rules.proximal import Proximal

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.rules import Rule


class FedProx(FedAvg, name="fedprox"):
    """Federated averaging with a proximal term; see the module's docstring."""

    mu: NonNegativeFloat = 0.01  # μ, to be tuned, between 0.001 and 1 as a rule; 0: FedAvg, to the last bit

    def rule(self, model: Tensor) -> Rule | None:
        return Proximal(self.mu, model) if self.mu else None
