"""Codec of some values at random places."""

from __future__ import annotations

import functools
from typing import Self

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from starling.algorithms.codecs.base import refuse_beyond
from starling.algorithms.codecs.sparse import Fraction, Sparse
from starling.algorithms.seeds import derive_seed, generator


class RandomK(Sparse, name="random_k"):
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
            self.pack(single[start : start + count * size].view(count, size)[:, self._places(size)]).view(-1)
            for start, count, size in self.rows(single.numel())
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(num_values)
        offset = 0
        for start, count, size in self.rows(num_values):
            kept, width = self.kept(size), self.row_nbytes(size)
            values = self.unpack(data[offset : offset + count * width].view(count, width), kept)
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
