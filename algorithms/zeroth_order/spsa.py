"""Simultaneous perturbation: estimates are exchanged as codes, and every node takes the same step from them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from starling.algorithms.api import Algorithm, AllGather, Layout, Node, NodeId
from starling.algorithms.errors import ProgramError
from starling.algorithms.noise import Distribution
from starling.algorithms.state import NodeState
from starling.algorithms.zeroth_order import records
from starling.algorithms.zeroth_order.codes import Log8, ScalarCode
from starling.algorithms.zeroth_order.estimates import Probes, direction_key
from starling.algorithms.zeroth_order.steps import Moved, Normalizer, PerturbationStep, layers_of, matrices_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


_MOST_LR = 0.05
"""Learning rate of a small model at most: above 2 n / tr H, for n directions and the Hessian H, SPSA diverges."""

_LR_TIMES_VALUES = 200.0
"""tr H grows with the model: between the bounds a learning rate is this by P."""


class Shared(NodeState):
    codes: dict[str, Tensor]  # of the last round, by contributor
    parameters: str = ""  # digest of θ, in rounds in which all nodes' are compared


class SPSA(Algorithm):
    """Stochastic gradients from two losses each; a node sends the one number that they give."""

    uses_optimizer: ClassVar[bool] = False
    least_lr: ClassVar[float] = 1e-3
    """Learning rate of a large model, if ``lr`` is null."""

    lr: PositiveFloat | None = None  # η; null: 200 / P, at most 0.05, and at least ``least_lr``
    eps: PositiveFloat = 1e-3  # ε, how far a probe is from the model, in units of the direction; MeZO's default
    samples: PositiveInt = 1  # K, directions of a node in a round, each with a batch of its own
    distribution: Distribution = "gaussian"  # of the values of a direction; rademacher: −1 or 1
    one_sided: bool = False  # L(θ) instead of L(θ − εz); the round's samples then share one batch
    normalizer: Normalizer = "mean"  # c: the number of estimates in a round, or its root
    code: ScalarCode = Log8()  # what an estimate looks like as bytes; fp16, fp32
    clip: PositiveFloat | None = None  # largest size of an estimate; null: none
    weight_decay: NonNegativeFloat = 0.0  # λ, of tensors with two dimensions or more: not of biases and norms
    layerwise: bool = False  # an estimate for each layer, of its values alone, instead of one for all
    perturb: Literal["copy", "on_use"] = "copy"  # on_use: tensor by tensor, as the model takes them; no copy is kept
    verify_every: NonNegativeInt = 64  # rounds between two comparisons of all nodes' parameters; 0: never

    def init(self, node: Node) -> None:
        Shared(node.shared).codes = {}

    async def round(self, node: Node) -> None:
        estimates = await self._estimates(node)
        codes = self.code.encode(estimates, node.rng("rounding"))
        sealed = await AllGather(codes)
        step = self._step(node, sealed, self.rate(node.layout, len(sealed)))
        if not self.steps_at_commit:
            step.apply(node.parameters)
        dropped = sum(math.isnan(value) for value in estimates)
        if dropped:
            words = f"{dropped} of {len(estimates)} estimates were not finite, and are dropped"
            print(f"round {node.round}: {words}")  # noqa: T201 - to the node's log

    async def _estimates(self, node: Node) -> list[float]:
        """Return ĝ of each sample and, if ``layerwise``, of each layer in it."""
        on_use = self.perturb == "on_use"
        probes = Probes(self.eps, self.samples, self.distribution, self.one_sided, on_use, self.clip)
        return await probes.estimates(node, self._spans(node.layout))

    def _spans(self, layout: Layout) -> list[tuple[int, int]]:
        """Return the ranges of the parameters that have an estimate of their own: all of them as one, or the layers."""
        return layers_of(layout) if self.layerwise else [(0, layout.num_values)]

    @property
    def steps_at_commit(self) -> bool:
        return self.perturb == "on_use"

    def rate(self, layout: Layout, num_nodes: int) -> float:
        """Return η of a round with estimates of ``num_nodes`` nodes: ``lr``, or a default for the model's size."""
        if self.lr is not None:
            return self.lr
        rate = min(max(_LR_TIMES_VALUES / layout.num_values, self.least_lr), _MOST_LR)
        return rate / math.sqrt(num_nodes * self.samples) if self.normalizer == "sqrt" else rate

    def _step(self, node: Node, sealed: Mapping[NodeId, Tensor], lr: float) -> PerturbationStep:
        """Return the step that all nodes' codes give, in the order of (node, sample); share the codes."""
        spans, size = self._spans(node.layout), self._num_bytes(node.layout)
        found = [
            (direction_key(node, member, number // len(spans), self.samples), number % len(spans), value)
            for member, codes in sealed.items()
            for number, value in enumerate(self.code.decode(records.checked(member, codes, size)))
        ]
        moved = [
            Moved.by(span, [(key, value) for key, place, value in found if place == here], lr, self.normalizer)
            for here, span in enumerate(spans)
        ]
        decayed = matrices_of(node.layout) if self.weight_decay else []
        step = PerturbationStep(moved, decayed, 1 - lr * self.weight_decay, self.distribution)
        shared = Shared(node.shared)
        shared.codes = {str(member): codes for member, codes in sealed.items()}
        del shared.parameters  # of an earlier round, which a joiner need not have done
        if self._verifies(node):
            shared.parameters = step.digest(node.parameters)
        return step

    def _num_bytes(self, layout: Layout) -> int:
        """Return the bytes of codes that a node sends to each other node."""
        return self.samples * len(self._spans(layout)) * self.code.nbytes

    def sealed(self, node: Node) -> bytes:
        shared = Shared(node.shared)
        codes = {int(member): one for member, one in shared.codes.items()}
        return records.pack(self.rate(node.layout, len(codes)), self.eps, codes, shared.parameters)

    def replay(self, node: Node, record: bytes) -> None:
        size = self._num_bytes(node.layout)
        found = records.unpack(record, size, with_digest=self._verifies(node))
        if found is None:
            what = f"{len(record)} bytes, and not those of codes of {size} bytes"
            raise ProgramError(f"round {node.round} cannot be replayed: its record has {what}")
        step = self._step(node, found.codes, found.lr)
        if (digest := Shared(node.shared).parameters) != found.digest:
            message = f"it gives parameters with digest {digest}, the run had {found.digest}"
            raise ProgramError(f"round {node.round} cannot be replayed: {message}")
        step.apply(node.parameters)

    def _verifies(self, node: Node) -> bool:
        """Say whether all nodes' parameters are compared at the end of this round."""
        return self.verify_every > 0 and (node.round + 1) % self.verify_every == 0

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (num_nodes - 1) * self._num_bytes(layout)
