"""MeZO: fine-tuning with forward passes alone, in the memory of inference.

Each step takes one direction z ~ N(0, I_P) and the loss of one batch on either side (ε = ``eps``, η = ``lr``):

    ĝ = (L(θ + ε z) - L(θ - ε z)) / 2ε
    θ ← θ - η (λ θ + ĝ z)

It is meant for one node, whose log of ĝ is then the whole training in some bytes a step. On several it is the mean
of their steps, with ĝ in four bytes.
Deviations: θ is not perturbed in place, as adding ε z, taking 2 ε z away and adding ε z again does not give back θ.
Probes use the committed copy of θ, which the runtime has in any case. ``perturb: on_use`` needs no copy, and perturbs
each tensor as an operation of the model takes it. ĝ is rounded to float32. λ leaves out tensors of less than two
dimensions, such as biases and norms; the authors' code goes by their names.
Elasticity: as ``just_one_byte``.
Cost: 4·K·N·(N-1) bytes a round, none on one node; the log has 31 bytes a round and 4 + 4·K for each node. State: P
values, and the committed copy (``on_use``: none); no gradient, no moments.
Reference: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333.
"""

from __future__ import annotations

from typing import ClassVar

from starling.algorithms.zeroth_order.codes import ScalarCode, Single
from starling.algorithms.zeroth_order.spsa import SPSA


class MeZO(SPSA, name="mezo"):
    """Memory-efficient zeroth-order SGD; see the module's docstring."""

    least_lr: ClassVar[float] = 1e-5  # the authors' script, for language models

    code: ScalarCode = Single()  # of ĝ, where there are several nodes, and in the log
