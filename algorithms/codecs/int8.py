"""Codec of one byte a value: signed integers with a scale for each block."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor

from starling.algorithms.codecs.base import AT_ONCE, Codec, blocks_of, refuse_beyond

_LARGEST = 127  # and −127; −128 is not used, so that the codes of −x are those of x, negated

# The largest 127·s that is a float32, for an s of 17 bits: what is larger might come back as infinity.
_LIMIT = _LARGEST * 66_052 * 2.0**105


class Int8(Codec, name="int8"):
    """Blocks of ``block_size`` values x as integers c = round(x / s) of a scale s = max|x| / 127 of their own.

    A block is s as a float32, little-endian, and one signed byte for each value; blocks follow one another, and the
    last one may be shorter. So n values take n + 4·⌈n / block_size⌉ bytes, and an exchange that is cut between blocks
    consists of the same bytes. The error is at most s/2, that is max|x| / 254.

    s is rounded up to 17 significant bits: with 7 more for c the product c·s is exact in float32, and what was decoded
    encodes to the same bytes again. A block without a value of 1.5e-36 or more becomes zeros. Refuses NaN, infinities,
    and what lies beyond ±3.4e38.

    >>> import torch
    >>> codec = Int8()
    >>> codec.decode(codec.encode(torch.tensor([0.0, -63.6, 127.0])), 3, torch.float32).tolist()
    [0.0, -64.0, 127.0]
    """

    block_size: PositiveInt = 256  # values that share a scale; 256: 1.6 % more bytes than values

    @property
    def block(self) -> int:
        return self.block_size

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return num_values + 4 * math.ceil(num_values / self.block_size)

    def encode(self, values: Tensor) -> Tensor:
        size, count = self.block_size, values.numel()
        # One row for each block. Only the last row can be too long, and what is too much of it is at the end.
        rows = torch.empty(math.ceil(count / size), 4 + size, dtype=torch.uint8)
        step = max(1, min(AT_ONCE // size, len(rows)))
        scratch = torch.empty(step, size)
        for start in range(0, len(rows), step):
            here = rows[start : start + step]
            blocks, room = blocks_of(values, start, start + step, size), scratch[: len(here)]
            largest = torch.abs(blocks, out=room).amax(dim=1)
            refuse_beyond(_LIMIT, largest, self)  # a NaN is the largest of its block
            scales = _scales(largest)
            here[:, :4] = scales.view(torch.uint8).view(-1, 4)
            torch.div(blocks, scales.where(scales > 0, 1.0).unsqueeze(1), out=room).round_()
            here[:, 4:].view(torch.int8).copy_(room)
        return rows.view(-1)[: self.nbytes(count, values.dtype)]

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        size = self.block_size
        whole = num_values // size
        split = whole * (4 + size)
        values = torch.empty(num_values, dtype=dtype)
        rows, blocks = data[:split].view(whole, 4 + size), values[: whole * size].view(whole, size)
        step = max(1, AT_ONCE // size)
        for start in range(0, whole, step):
            _decode_rows(rows[start : start + step], blocks[start : start + step])
        if num_values % size:
            _decode_rows(data[split:].unsqueeze(0), values[whole * size :].unsqueeze(0))
        return values


def _scales(largest: Tensor) -> Tensor:
    """max|x| / 127 of blocks by their max|x|, rounded up to 17 significant bits, shape (blocks,); 0 if subnormal."""
    scales = largest / _LARGEST
    # On the bits of a float32 a carry out of the fraction goes into the exponent, which is what rounding up means.
    scales.view(torch.int32).add_(_LARGEST).bitwise_and_(~_LARGEST)
    return scales.where(scales >= torch.finfo(torch.float32).tiny, 0.0)


def _decode_rows(rows: Tensor, out: Tensor) -> None:
    """Write the values of ``rows``, each a scale and its codes, to ``out``; as many rows, 4 columns fewer."""
    scales = rows[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)
    torch.mul(rows[:, 4:].view(torch.int8), scales, out=out)
