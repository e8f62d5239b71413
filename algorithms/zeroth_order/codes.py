"""Codes of single numbers: a projected gradient in one to four bytes.

Every code rejects values that are not finite: they are marked as dropped, and decode to NaN.
"""

from __future__ import annotations

import bisect
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor

from starling.algorithms.errors import ProgramError
from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

_SIGN = 0x80
_LARGEST = 127
_LEVELS = [0.0] + [2.0 ** (-10 + step / 6) for step in range(_LARGEST)]
"""Magnitudes of a logarithmic scale by a code's lower seven bits; ``decode`` rounds them to float32."""


class ScalarCode(Part, family="scalar code", catalog="starling.algorithms.zeroth_order.codes"):
    """Turns numbers into bytes and back, ``nbytes`` each."""

    nbytes: ClassVar[int]

    @abstractmethod
    def encode(self, values: Sequence[float], rng: torch.Generator) -> Tensor:
        """Encode n numbers as uint8, shape (n · nbytes,)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> list[float]:
        """Return the numbers that all nodes use, the sender included; NaN for a dropped one.

        Raises:
            ProgramError: there is no such code.
        """


class Log8(ScalarCode, name="log8"):
    """One byte: a sign, and seven bits q for 0 (q = 0) or 2^(−10 + (q−1)/6), from 9.8e-4 to 2048; 0x80 is dropped.

    ``nearest`` is off by at most 5.8 % between the smallest level and the largest; ``stochastic`` chooses one of the
    two levels next to a value at random, so that its mean is the value. Beyond 2048 a value becomes 2048.

    >>> import torch
    >>> code = Log8()
    >>> code.decode(code.encode([1.0, -0.5, 0.0, 1e9, float("nan")], torch.Generator()))
    [1.0, -0.5, 0.0, 2048.0, nan]
    """

    nbytes: ClassVar[int] = 1
    rounding: Literal["nearest", "stochastic"] = "nearest"  # to a level

    def encode(self, values: Sequence[float], rng: torch.Generator) -> Tensor:
        thresholds = [0.5] * len(values)
        if self.rounding == "stochastic":
            # In (0, 1], so that a level stays what it is.
            draws = _numbers(torch.rand(len(values), dtype=torch.float64, generator=rng))
            thresholds = [1 - draw for draw in draws]
        codes = [_log8(value, threshold) for value, threshold in zip(values, thresholds, strict=True)]
        return torch.tensor(codes, dtype=torch.uint8)

    def decode(self, codes: Tensor) -> list[float]:
        return [_DECODED[int(number)] for number in _numbers(codes)]


class _Float(ScalarCode):
    """IEEE numbers, little-endian; beyond the largest a value becomes the largest; NaN is dropped."""

    dtype: ClassVar[torch.dtype]

    def encode(self, values: Sequence[float], rng: torch.Generator) -> Tensor:
        del rng
        largest = torch.finfo(self.dtype).max
        kept = [min(max(value, -largest), largest) if math.isfinite(value) else math.nan for value in values]
        return torch.tensor(kept, dtype=torch.float64).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> list[float]:
        values = _numbers(codes.contiguous().clone().view(self.dtype))
        if any(math.isinf(value) for value in values):
            raise ProgramError(f"code {self.name}: {values} has an infinite number, which is no code")
        return values


class Half(_Float, name="fp16"):
    """Two bytes: relative error at most 2⁻¹¹, up to 65504; as ``_Float``."""

    nbytes: ClassVar[int] = 2
    dtype: ClassVar[torch.dtype] = torch.float16


class Single(_Float, name="fp32"):
    """Four bytes: relative error at most 2⁻²⁴; as ``_Float``."""

    nbytes: ClassVar[int] = 4
    dtype: ClassVar[torch.dtype] = torch.float32


def _log8(value: float, threshold: float) -> int:
    """The code of a value; up if at least ``threshold`` of the way to the next level lies behind it."""
    if not math.isfinite(value):
        return _SIGN
    size = abs(value)
    below = bisect.bisect_right(_LEVELS, size) - 1
    if below < _LARGEST:
        below += (size - _LEVELS[below]) / (_LEVELS[below + 1] - _LEVELS[below]) >= threshold
    return below | _SIGN if below and value < 0 else below


def _numbers(values: Tensor) -> list[float]:
    return cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's stubs


def _decoded() -> list[float]:
    """The value of each byte. float32, as libraries may differ in the last bit of a power in float64."""
    sizes = _numbers(torch.tensor(_LEVELS, dtype=torch.float32))
    return sizes + [math.nan] + [-size for size in sizes[1:]]


_DECODED = _decoded()
