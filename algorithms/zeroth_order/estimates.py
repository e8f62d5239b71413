"""Estimates of directional derivatives: the loss at two points along a random direction, divided by their distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starling.algorithms.api import Batch, Loss, Perturbed
from starling.algorithms.noise import Distribution, perturb
from starling.algorithms.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.algorithms.api import DataBatch, Node, NodeId


def direction_key(node: Node, contributor: NodeId, sample: int, samples: int) -> int:
    """Name a direction by (run, round, contributor, sample): N nodes with K samples draw those of one with N·K."""
    return derive_seed("direction", node.seed, node.round, contributor * samples + sample)


@dataclass(frozen=True)
class Probes:
    """A node's estimates of one round: ``samples`` directions, each with a batch of its own."""

    eps: float
    """ε, the distance of a probe from the model in units of the direction."""
    samples: int
    """K, directions of a node in a round."""
    distribution: Distribution
    one_sided: bool
    """Compare with L(θ) instead of L(θ - εz); all samples then share one batch."""
    on_use: bool
    """Perturb each tensor when an operation of the model takes it, instead of the parameters in place."""
    clip: float | None
    """Largest size of an estimate; ``None``: unlimited."""

    async def estimates(self, node: Node, spans: Sequence[tuple[int, int]]) -> list[float]:
        """Return ĝ of each sample and each of ``spans`` within it; the parameters keep their committed bits."""
        found: list[float] = []
        batch = at_model = None
        if self.one_sided:
            batch = await Batch()
            at_model = await Loss(batch=batch, probe=True)
        for sample in range(self.samples):
            samples = batch or await Batch()
            key = direction_key(node, node.id, sample, self.samples)
            for span in spans:
                above = await self._loss(node, samples, key, span, self.eps)
                below = at_model
                if below is None:
                    below = await self._loss(node, samples, key, span, -self.eps)
                if not self.on_use:
                    # Nothing is subtracted from what was added: the model is copied from what was committed.
                    node.parameters[span[0] : span[1]].copy_(node.committed[span[0] : span[1]])
                found.append((above - below) / (self.eps if self.one_sided else 2 * self.eps))
        if self.clip is None:
            return found
        return [min(max(one, -self.clip), self.clip) if math.isfinite(one) else one for one in found]

    async def _loss(self, node: Node, batch: DataBatch, key: int, span: tuple[int, int], scale: float) -> float:
        start, stop = span
        if self.on_use:
            return await Loss(at=Perturbed(scale, self.distribution, key, *span), batch=batch, probe=True)
        perturb(node.parameters[start:stop], node.committed[start:stop], scale, self.distribution, key, start)
        return await Loss(batch=batch, probe=True)
