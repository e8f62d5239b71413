"""Base class of codecs that send few of the values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from starling.algorithms.codecs.base import Codec, Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

Fraction: TypeAlias = Annotated[float, Field(gt=0, le=1)]
BlockSize: TypeAlias = Annotated[int, Field(ge=1, le=32_768)]


class Sparse(Codec):
    """Keeps k = ⌈fraction · n⌉ of the n values of each block; ``values`` says what these look like."""

    fraction: Fraction = 0.01  # of a block's values that are sent
    block_size: BlockSize = 4096  # values among which those are chosen
    values: Codec = Identity()  # what is sent of each: identity, bf16 or fp16

    @model_validator(mode="after")
    def _values_are_sent_one_by_one(self) -> Self:
        if self.values.block != 1 or self.values.needs_feedback:
            raise ValueError(f"{self.name} sends single values, as identity, bf16 or fp16; not {self.values.name}")
        return self

    @property
    def block(self) -> int:
        return self.block_size

    def kept(self, size: int) -> int:
        """Return k, the number of values that are sent of a block of ``size``."""
        return math.ceil(self.fraction * size)

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        whole, rest = divmod(num_values, self.block_size)
        return whole * self.row_nbytes(self.block_size) + self.row_nbytes(rest)

    def row_nbytes(self, size: int) -> int:
        """Return the bytes of an encoded block of ``size`` values."""
        return self.values.nbytes(self.kept(size), torch.float32)

    def rows(self, num_values: int) -> Iterator[tuple[int, int, int]]:
        """(first value, number of blocks, values in each): the whole blocks, and the rest."""
        whole, rest = divmod(num_values, self.block_size)
        if whole:
            yield 0, whole, self.block_size
        if rest:
            yield whole * self.block_size, 1, rest

    def pack(self, kept: Tensor) -> Tensor:
        """Convert values of shape (rows, k) to bytes of shape (rows, …)."""
        return self.values.encode(kept.reshape(-1)).view(len(kept), -1)

    def unpack(self, rows: Tensor, kept: int) -> Tensor:
        """Convert bytes of shape (rows, …) back to values of shape (rows, k)."""
        data = rows.clone(memory_format=torch.contiguous_format).view(-1)
        return self.values.decode(data, len(rows) * kept, torch.float32).view(len(rows), kept)
