"""Codecs of two bytes a value: bfloat16 and IEEE half precision."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from starling.algorithms.codecs.base import Codec, refuse_beyond


class _TwoBytes(Codec):
    """Rounds to the nearest value of a narrower dtype, ties to even; 2·n bytes, little-endian."""

    narrow: ClassVar[torch.dtype]

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return 2 * num_values

    def encode(self, values: Tensor) -> Tensor:
        refuse_beyond(torch.finfo(self.narrow).max, values, self)
        return values.to(self.narrow).contiguous().view(torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        return data.view(self.narrow)[:num_values].to(dtype)


class BFloat16(_TwoBytes, name="bf16"):
    """The values in bfloat16: float32's range, relative error at most 2⁻⁸. Refuses NaN and infinities.

    >>> import torch
    >>> codec = BFloat16()
    >>> codec.decode(codec.encode(torch.tensor([1.0, 1.01])), 2, torch.float32).tolist()
    [1.0, 1.0078125]
    """

    narrow: ClassVar[torch.dtype] = torch.bfloat16


class Float16(_TwoBytes, name="fp16"):
    """The values in float16: relative error at most 2⁻¹¹, below 6.1e-5 absolute error at most 3.0e-8.

    Refuses NaN and all that lies beyond ±65504.

    >>> import torch
    >>> codec = Float16()
    >>> codec.decode(codec.encode(torch.tensor([1.0, 1.01])), 2, torch.float32).tolist()
    [1.0, 1.009765625]
    """

    narrow: ClassVar[torch.dtype] = torch.float16
