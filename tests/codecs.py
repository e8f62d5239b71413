"""A codec for tests: lossy, and with values that must stay together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from starling.algorithms.codecs import Codec


class Blockwise(Codec, name="test_blockwise"):
    """Blocks of ``size`` values as a float32 scale and one signed byte for each value; all scales come first."""

    size: PositiveInt = 4

    @property
    def block(self) -> int:
        return self.size

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return num_values + 4 * math.ceil(num_values / self.size)

    def encode(self, values: Tensor) -> Tensor:
        blocks = F.pad(values.float(), (0, -len(values) % self.size)).view(-1, self.size)
        scales = blocks.abs().amax(dim=1) / 127
        codes = (blocks / scales.clamp_min(1e-30).unsqueeze(1)).round().to(torch.int8)
        return torch.cat([scales.view(torch.uint8), codes.view(-1)[: len(values)].view(torch.uint8)])

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        num_blocks = math.ceil(num_values / self.size)
        scales = data[: 4 * num_blocks].clone().view(torch.float32)
        codes = data[4 * num_blocks :].view(torch.int8).float()
        return (codes * scales.repeat_interleave(self.size)[:num_values]).to(dtype)
