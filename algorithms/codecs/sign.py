"""Codec of one bit a value: signs, with a mean magnitude for each block."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from starling.algorithms.codecs.base import Codec, refuse_beyond

_SCALE_BYTES = 2
_LIMIT = torch.finfo(torch.bfloat16).max
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class Sign(Codec, name="sign"):
    """Blocks of ``block_size`` values as their signs, times the mean s of their magnitudes (EF-signSGD's ‖x‖₁/n).

    A block is s as a bfloat16, two bytes, and then a bit for each value, 1 for a minus, the first one lowest; a zero
    counts as a plus unless all are. So n values take ⌈n/8⌉ + 2·⌈n / block_size⌉ bytes. It is no mean that it
    preserves: use it with error feedback. Refuses NaN, infinities, and what lies beyond ±3.39e38.

    Reference: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019,
    arXiv:1901.09847, for the scale; blocks are ours.

    >>> import torch
    >>> codec = Sign()
    >>> codec.decode(codec.encode(torch.tensor([2.0, -1.0, 3.0])), 3, torch.float32).tolist()
    [2.0, -2.0, 2.0]
    """

    block_size: int = Field(default=256, ge=8, multiple_of=8)  # values that share a scale

    @property
    def block(self) -> int:
        return self.block_size

    @property
    def needs_feedback(self) -> bool:
        return True

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return -(-num_values // 8) + _SCALE_BYTES * -(-num_values // self.block_size)

    def encode(self, values: Tensor) -> Tensor:
        size, count = self.block_size, values.numel()
        refuse_beyond(_LIMIT, values, self)
        blocks = torch.nn.functional.pad(values.to(torch.float32), (0, -count % size)).view(-1, size)
        # In float64, where a block's equal magnitudes add up exactly: what was decoded then has the same mean.
        sums = blocks.double().abs_().sum(dim=1)
        lengths = torch.full_like(sums, size)
        if count % size:
            lengths[-1] = count % size
        rows = torch.empty(len(blocks), _SCALE_BYTES + size // 8, dtype=torch.uint8)
        scales = (sums / lengths).clamp_(max=_LIMIT).to(torch.bfloat16)
        rows[:, :_SCALE_BYTES] = scales.unsqueeze(1).view(torch.uint8)
        minus = (blocks < 0).view(len(blocks), size // 8, 8)
        rows[:, _SCALE_BYTES:] = torch.where(minus, _BITS, 0).sum(dim=2, dtype=torch.uint8)
        return rows.view(-1)[: self.nbytes(count, values.dtype)]

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        size = self.block_size
        width = _SCALE_BYTES + size // 8
        rows = torch.nn.functional.pad(data, (0, -data.numel() % width)).view(-1, width)
        scales = rows[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        minus = rows[:, _SCALE_BYTES:].unsqueeze(2).bitwise_and(_BITS).ne(0).view(-1, size)
        return torch.where(minus, -scales, scales).view(-1)[:num_values].to(dtype)
