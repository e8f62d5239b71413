"""A sampler of one's own: rehearsal with a power law, for data that come in the order of their age.

In epoch e a node has met its samples up to ``new`` · (e + 1), the oldest first. It draws the sample of age a (0: the
newest) with a probability in proportion to

    (1 + a)^(−``exponent``)

so that new samples are seen most, and old ones again and again, ever more rarely. Used by examples/power_law.yaml.
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt

from starling import Sampler


class PowerLawRehearsal(Sampler):
    """Draws with replacement, the newer the likelier."""

    new: PositiveInt = 50  # samples that come in with each epoch
    exponent: NonNegativeFloat = 1.0  # 0: all that were met are as likely

    def order(self, num_samples: int, epoch: int, rng: torch.Generator) -> torch.Tensor:
        """As many draws as the node has samples."""
        met = min(num_samples, self.new * (epoch + 1))
        ages = torch.arange(met - 1, -1, -1, dtype=torch.float64)
        return torch.multinomial((1 + ages) ** -self.exponent, num_samples, replacement=True, generator=rng)
