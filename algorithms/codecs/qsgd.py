"""Codec of a few bits a value: levels between zero and a block's norm, rounded at random so that the mean is right."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from starling.algorithms.codecs.base import Codec, refuse_beyond
from starling.algorithms.seeds import derive_seed

_NORM_BYTES = 4


class QSGD(Codec, name="qsgd"):
    """Blocks of ``block_size`` values x as ‖x‖₂ · sign(x_i) · ξ_i / s, with s = 2^(bits-1) - 1 levels.

    ξ_i is one of the two integers around s·|x_i|/‖x‖₂, at random, so that its mean is that. A block is the norm as a
    float32, and ``bits`` bits for each value, in two's complement and the first one lowest: n values take
    ⌈n·bits/8⌉ + 4·⌈n / block_size⌉ bytes. Refuses NaN and infinities.

    The random numbers are a hash of the seed, the block's magnitudes and the place in the block. So equal values are
    encoded alike wherever an exchange is cut, and nodes with other values round independently of one another.

    Reference: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS
    2017, arXiv:1610.02132, section 3; codes of a fixed length instead of Elias'.
    """

    bits: Literal[2, 4, 8] = 4  # of a value, sign included: 1, 7 or 127 levels
    block_size: int = Field(default=512, ge=8, multiple_of=8)  # values that share a norm; paper, section 4: buckets
    seed: NonNegativeInt = 0  # of the rounding; each round derives its own

    @property
    def block(self) -> int:
        return self.block_size

    @property
    def is_contraction(self) -> bool:
        return False

    @property
    def levels(self) -> int:
        """Return s, the number of levels above zero."""
        return 2 ** (self.bits - 1) - 1

    def at(self, round_number: int) -> Self:
        return self.model_copy(update={"seed": derive_seed("qsgd", self.seed, round_number)})

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return -(-num_values * self.bits // 8) + _NORM_BYTES * -(-num_values // self.block_size)

    def encode(self, values: Tensor) -> Tensor:
        size, count = self.block_size, values.numel()
        blocks = torch.nn.functional.pad(values.to(torch.float32), (0, -count % size)).view(-1, size)
        norms = blocks.double().square().sum(dim=1).sqrt()
        refuse_beyond(torch.finfo(torch.float32).max, norms, self)
        norms = norms.float()
        ratios = blocks.abs() / norms.where(norms > 0, 1.0).unsqueeze(1) * self.levels
        codes = (ratios + _uniform(blocks, self.seed)).floor_().clamp_(max=self.levels).to(torch.int16)
        codes = torch.where(blocks < 0, -codes, codes) & (2**self.bits - 1)
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.int16) * self.bits
        rows = torch.empty(len(blocks), _NORM_BYTES + size // per_byte, dtype=torch.uint8)
        rows[:, :_NORM_BYTES] = norms.unsqueeze(1).view(torch.uint8)
        rows[:, _NORM_BYTES:] = (codes.view(len(blocks), size // per_byte, per_byte) << shifts).sum(dim=2)
        return rows.view(-1)[: self.nbytes(count, values.dtype)]

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        size, per_byte = self.block_size, 8 // self.bits
        width = _NORM_BYTES + size // per_byte
        rows = torch.nn.functional.pad(data, (0, -data.numel() % width)).view(-1, width)
        norms = rows[:, :_NORM_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float32)
        shifts = torch.arange(per_byte, dtype=torch.int16) * self.bits
        codes = (rows[:, _NORM_BYTES:].to(torch.int16).unsqueeze(2) >> shifts) & (2**self.bits - 1)
        codes = torch.where(codes > self.levels, codes - 2**self.bits, codes).view(-1, size)
        return (codes * (norms / self.levels)).view(-1)[:num_values].to(dtype)


def _uniform(blocks: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) for each value of ``blocks``, shape (rows, size): a hash, multiplied as 64-bit integers are."""
    places = torch.arange(1, blocks.shape[1] + 1) * _GOLDEN
    bits = blocks.abs().view(torch.int32).long()
    block = _mixed((bits * (places | 1)).sum(dim=1, keepdim=True) + derive_seed("qsgd", seed))
    return (_mixed(block + places) >> 40 & 0xFF_FFFF).float() / 2**24


# Constants of splitmix64, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _mixed(state: Tensor) -> Tensor:
    """The finalizer of splitmix64. Right shifts fill with the sign here, and are masked to fill with zeros."""
    state = (state ^ (state >> 30 & 0x3_FFFF_FFFF)) * _FIRST
    state = (state ^ (state >> 27 & 0x1F_FFFF_FFFF)) * _SECOND
    return state ^ (state >> 31 & 0x1_FFFF_FFFF)
