"""A-EDiT: EDiT by the clock; each node takes as many steps as it manages in an interval.

Node m takes its n_m steps until ``interval_s`` (τ_time) seconds have passed since the last synchronization, and then
all synchronize as in EDiT. If together they have taken fewer than ``min_total_steps``, they go on for as long again.
With ρ = ``step_share`` a node that has done more counts more:

    w_m = (1 - ρ) softmax_m(-G_m / T) + ρ n_m / Σ_k n_k

Deviations: n_m counts the steps since the last synchronization, where atorch's code counts all. An outlier has no
weight at all, and its n_m does not count: the others' weights sum to 1. In atorch its share ρ n_m / Σ_k n_k is lost, so
that the others' sum to less. As in ``edit`` for the rest; the steps of a warm-up round are ``inner_steps``.
Elasticity: as ``edit``. A slow node holds up others for one step at most.
Cost: as ``edit``, and 8·N·(N-1) bytes for the numbers of steps. State: as ``edit``.
Reference: Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language Models",
2024, arXiv:2412.07210, and its code in atorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from starling.algorithms.api import AllGather, Sleep, Train
from starling.algorithms.low_communication.edit import EDiT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import Layout, Node, NodeId

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]

_TOLERANCE = 1e-9
"""Tolerance relative to an interval: sums of seconds are not exact, and the last bit would cost one more step."""


class AEDiT(EDiT, name="a_edit"):
    """EDiT by the clock; see the module's docstring."""

    interval_s: PositiveFloat = 600.0  # τ_time, seconds between synchronizations; atorch
    min_total_steps: NonNegativeInt = 100  # of all nodes, for a synchronization; atorch
    max_steps: PositiveInt = 128  # of a node between synchronizations, as in edit; learning-rate schedules plan with it
    step_share: Share = 0.0  # ρ, how much of a weight is for steps; atorch: off, 0.5 if on

    async def steps_alone(self, node: Node) -> Mapping[NodeId, float]:
        taken, all_taken = 0, {node.id: 0.0}
        while True:
            until = node.now + self.interval_s * (1 - _TOLERANCE)
            while (now := node.now) < until:
                if taken == self.max_steps:
                    await Sleep(until - now)
                else:
                    await Train(steps=1)
                    taken += 1
            all_taken = await AllGather(float(taken))
            total = sum(all_taken.values())
            if total >= self.min_total_steps or min(all_taken.values()) >= self.max_steps:
                break
        return {one: self.step_share * steps / total for one, steps in all_taken.items()} if self.step_share else {}

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return super().expected_bytes(layout, num_nodes) + 8 * num_nodes * (num_nodes - 1)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return max(self.max_steps, self.inner_steps if self.warmup_steps else 0)
