"""Codec of half a byte a value: a sign and a power of two, with a scale for each block."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from starling.algorithms.codecs.base import AT_ONCE, Codec, blocks_of, refuse_beyond

_SCALE_BYTES = 2

# The largest bfloat16, and the least scale: beneath it 2⁻⁶ s, the smallest magnitude, would be subnormal.
_LIMIT = torch.finfo(torch.bfloat16).max
_LEAST = 2.0**-120


class FP4(Codec, name="fp4"):
    """E3M0: blocks of ``block_size`` values as a sign and an exponent e of three bits each, times a scale s.

    Code e = 0 is zero, and e = 1 … 7 is 2^(e-7)·s, where s is the block's largest magnitude, rounded up to a bfloat16.
    Each value becomes the nearest of these, measured in a straight line: between 2^k·s and 2^(k+1)·s the border is
    1.5·2^k·s, and what is beneath 2⁻⁷·s becomes zero. The relative error is at most 1/3 from 0.75·2⁻⁶·s on. Rounding is
    not unbiased: it shrinks. Normally distributed values arrive 0.965 times as long in their direction, and off by 19 %
    of their norm. An outer step is 3.5 % smaller than without the codec.

    A block is s, two bytes, and then two codes in each byte, the first in the lower half; blocks follow one another,
    and the last one may be shorter. So n values take ⌈n/2⌉ + 2·⌈n / block_size⌉ bytes. A block without a value of
    7.5e-37 or more becomes zeros. Refuses NaN, infinities, and what lies beyond ±3.39e38.

    The format's name is that of Streaming DiLoCo's outer gradients (arXiv:2501.18512); granularity and rounding of the
    scale are ours.

    >>> import torch
    >>> codec = FP4()
    >>> codec.decode(codec.encode(torch.tensor([8.0, -3.1, 0.9, 0.01])), 4, torch.float32).tolist()
    [8.0, -4.0, 1.0, 0.0]
    """

    block_size: int = Field(default=256, ge=2, multiple_of=2)  # values that share a scale; 256: 1.6 % more bytes

    @property
    def block(self) -> int:
        return self.block_size

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return (num_values + 1) // 2 + _SCALE_BYTES * -(-num_values // self.block_size)

    def encode(self, values: Tensor) -> Tensor:
        size, count = self.block_size, values.numel()
        # One row for each block. Only the last row can be too long, and what is too much of it is at the end.
        rows = torch.empty(-(-count // size), _SCALE_BYTES + size // 2, dtype=torch.uint8)
        step = max(1, min(AT_ONCE // size, len(rows)))
        scratch, codes = torch.empty(step, size), torch.empty(step * size, dtype=torch.uint8)
        for start in range(0, len(rows), step):
            here = rows[start : start + step]
            blocks, room = blocks_of(values, start, start + step, size), scratch[: len(here)]
            largest = torch.abs(blocks, out=room).amax(dim=1)
            refuse_beyond(_LIMIT, largest, self)  # a NaN is the largest of its block
            scales = _scales(largest)
            here[:, :_SCALE_BYTES] = scales.to(torch.bfloat16).unsqueeze(1).view(torch.uint8)
            # Two neighbours are the bytes of a 16-bit number: the second one's bits come down beside the first one's.
            pairs = _codes(blocks, scales, room, codes[: room.numel()]).view(torch.int16).view(len(here), -1)
            here[:, _SCALE_BYTES:] = pairs.bitwise_or_(pairs >> 4).view(torch.uint8)[:, ::2]
        return rows.view(-1)[: self.nbytes(count, values.dtype)]

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        size = self.block_size
        width = _SCALE_BYTES + size // 2
        whole = num_values // size
        values = torch.empty(num_values, dtype=dtype)
        step = max(1, AT_ONCE // size)
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            _decode_rows(data[start * width : stop * width].view(-1, width), values[start * size : stop * size])
        if num_values % size:
            _decode_rows(data[whole * width :].unsqueeze(0), values[whole * size :])
        return values


_CUT = 22
"""The bits of a float32 beneath its sign, exponent and the first of its fraction: no border has any of them."""


def _scales(largest: Tensor) -> Tensor:
    """The largest magnitudes of blocks rounded up to bfloat16s, as float32; 0 where that is tiny. Writes to them."""
    # On the bits of a float32 a carry out of the fraction goes into the exponent, which is what rounding up means.
    largest.view(torch.int32).add_(0xFFFF).bitwise_and_(~0xFFFF)
    return largest.where(largest >= _LEAST, 0.0)


def _codes(blocks: Tensor, scales: Tensor, room: Tensor, out: Tensor) -> Tensor:
    """Write the codes of ``blocks`` to ``out``, uint8, shape (n,); ``room`` has their shape and is written to."""
    # The quotient is rounded, and yet no border is crossed: division is monotone, and 1.5·2^k·s is divided exactly.
    ratios = torch.div(blocks, scales.where(scales > 0, 1.0).unsqueeze(1), out=room)
    upper = ratios.view(torch.int32).bitwise_right_shift_(_CUT).bitwise_and_(len(_CODES) - 1)
    return torch.index_select(_CODES, 0, upper.view(-1), out=out)


def _table() -> Tensor:
    """The code by the uppermost bits of a float32 in [-1, 1]: the exponent, and 8 for a minus; shape (1024,)."""
    ratios = (torch.arange(1 << (32 - _CUT), dtype=torch.int32) << _CUT).view(torch.float32)
    borders = torch.tensor([2.0**-7, *(1.5 * 2.0**k for k in range(-6, 0))])
    codes = torch.bucketize(ratios.abs(), borders, right=True)
    return codes.add_(8 * ((ratios < 0) & (codes > 0))).to(torch.uint8)


_CODES = _table()
_POWERS = torch.tensor([0.0, *(2.0 ** (code - 7) for code in range(1, 8))])
_SIGNED = torch.cat([_POWERS, -_POWERS])
_PAIRS = torch.stack([_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)], dim=1).view(torch.int64).view(-1)
"""Both float32 values of each byte, packed into one int64, shape (256,), for a single look-up."""


def _decode_rows(rows: Tensor, out: Tensor) -> None:
    """Write the values of ``rows``, each a scale and its codes, one after another to ``out``, shape (n,)."""
    scales = rows[:, :_SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    codes = rows[:, _SCALE_BYTES:].int().view(-1)
    values = _PAIRS.index_select(0, codes).view(torch.float32).view(len(rows), -1)
    if out.numel() == values.numel():
        torch.mul(values, scales, out=out.view(values.shape))
    else:  # the last of two codes is nobody's
        out.copy_(values.mul_(scales).view(-1)[: out.numel()])
