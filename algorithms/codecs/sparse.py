"""Codecs that send few of the values: the largest, or some at random."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Annotated, Self, TypeAlias

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from algorithms.codecs.base import Codec, Identity, refuse_beyond
from algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Iterator

_INDEX_BYTES = 2

Fraction: TypeAlias = Annotated[float, Field(gt=0, le=1)]
BlockSize: TypeAlias = Annotated[int, Field(ge=1, le=32_768)]


class _Sparse(Codec):
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
        """k, of a block of ``size`` values."""
        return math.ceil(self.fraction * size)

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        whole, rest = divmod(num_values, self.block_size)
        return whole * self.row_nbytes(self.block_size) + self.row_nbytes(rest)

    def row_nbytes(self, size: int) -> int:
        """Bytes of a block of ``size`` values."""
        return self.values.nbytes(self.kept(size), torch.float32)

    def _rows(self, num_values: int) -> Iterator[tuple[int, int, int]]:
        """(first value, number of blocks, values in each): the whole blocks, and the rest."""
        whole, rest = divmod(num_values, self.block_size)
        if whole:
            yield 0, whole, self.block_size
        if rest:
            yield whole * self.block_size, 1, rest

    def _pack(self, kept: Tensor) -> Tensor:
        """Values of shape (rows, k) as bytes of shape (rows, …)."""
        return self.values.encode(kept.reshape(-1)).view(len(kept), -1)

    def _unpack(self, rows: Tensor, kept: int) -> Tensor:
        data = rows.clone(memory_format=torch.contiguous_format).view(-1)
        return self.values.decode(data, len(rows) * kept, torch.float32).view(len(rows), kept)


class TopK(_Sparse, name="top_k"):
    """The k = ⌈fraction · n⌉ values of the largest magnitude of each block of n, and where they are.

    A block is k places, two bytes each, in their order, and then k values. It leaves out at most 1 - k/n of ‖x‖², and
    nothing of that ever arrives without error feedback. Refuses NaN and infinities.

    Reference: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv:1809.07599; blocks are ours.

    >>> import torch
    >>> codec = TopK(fraction=0.5)
    >>> codec.decode(codec.encode(torch.tensor([0.1, -3.0, 2.0, 0.0])), 4, torch.float32).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """

    @property
    def needs_feedback(self) -> bool:
        return True

    def row_nbytes(self, size: int) -> int:
        return _INDEX_BYTES * self.kept(size) + super().row_nbytes(size)

    def encode(self, values: Tensor) -> Tensor:
        single = values.to(torch.float32)
        refuse_beyond(torch.finfo(torch.float32).max, single, self)
        pieces: list[Tensor] = []
        for start, count, size in self._rows(single.numel()):
            blocks = single[start : start + count * size].view(count, size)
            places = blocks.abs().topk(self.kept(size), dim=1, sorted=False).indices
            # In the order of the places, zeros last and all at place 0: equal blocks have equal bytes.
            ordered = places.masked_fill(blocks.gather(1, places) == 0, size).sort(dim=1).values
            empty = ordered == size
            ordered.masked_fill_(empty, 0)
            kept = blocks.gather(1, ordered).masked_fill_(empty, 0.0)
            numbers = ordered.to(torch.int16).view(torch.uint8).view(count, -1)
            pieces.append(torch.cat([numbers, self._pack(kept)], dim=1).view(-1))
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(num_values)
        offset = 0
        for start, count, size in self._rows(num_values):
            kept, width = self.kept(size), self.row_nbytes(size)
            rows = data[offset : offset + count * width].view(count, width)
            numbers = rows[:, : _INDEX_BYTES * kept].clone(memory_format=torch.contiguous_format).view(torch.int16)
            values = self._unpack(rows[:, _INDEX_BYTES * kept :], kept)
            # Added, not written: place 0 may be there twice, once for a value and once for nothing.
            out[start : start + count * size].view(count, size).scatter_add_(1, numbers.long(), values)
            offset += count * width
        return out.to(dtype)


class RandomK(_Sparse, name="random_k"):
    """k = ⌈fraction · n⌉ values of each block of n, at places that all nodes draw alike, so that no place is sent.

    The places are the same in all blocks, and other ones in each round. A value that is sent counts n/k of itself,
    which makes the mean over all draws right; with ``unbiased: false`` it counts once, for error feedback. Refuses NaN
    and infinities.

    Reference: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv:1809.07599, for the operator; common
    places are ours.
    """

    fraction: Fraction = 0.1  # of a block's values that are sent
    unbiased: bool = True  # scale what is sent by n/k
    seed: NonNegativeInt = 0  # of the places; each round derives its own

    @property
    def needs_feedback(self) -> bool:
        return not self.unbiased

    @property
    def is_contraction(self) -> bool:
        return not self.unbiased

    def at(self, round_number: int) -> Self:
        return self.model_copy(update={"seed": derive_seed("random_k", self.seed, round_number)})

    def encode(self, values: Tensor) -> Tensor:
        single = values.to(torch.float32)
        refuse_beyond(torch.finfo(torch.float32).max, single, self)
        pieces = [
            self._pack(single[start : start + count * size].view(count, size)[:, self._places(size)]).view(-1)
            for start, count, size in self._rows(single.numel())
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(num_values)
        offset = 0
        for start, count, size in self._rows(num_values):
            kept, width = self.kept(size), self.row_nbytes(size)
            values = self._unpack(data[offset : offset + count * width].view(count, width), kept)
            scale = size / kept if self.unbiased else 1.0
            out[start : start + count * size].view(count, size)[:, self._places(size)] = values * scale
            offset += count * width
        return out.to(dtype)

    def _places(self, size: int) -> Tensor:
        return _places(self.seed, self.block_size, size, self.kept(size))


@functools.lru_cache(maxsize=32)
def _places(seed: int, block_size: int, size: int, kept: int) -> Tensor:
    """The first ``kept`` places below ``size`` of an order of the block's, sorted."""
    order = torch.randperm(block_size, generator=generator("random_k", seed))
    return order[order < size][:kept].sort().values
