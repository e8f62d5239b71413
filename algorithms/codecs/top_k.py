"""Codec of the largest values alone."""

from __future__ import annotations

import torch
from torch import Tensor

from starling.algorithms.codecs.base import refuse_beyond
from starling.algorithms.codecs.sparse import Sparse

_INDEX_BYTES = 2


class TopK(Sparse, name="top_k"):
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
        for start, count, size in self.rows(single.numel()):
            blocks = single[start : start + count * size].view(count, size)
            places = blocks.abs().topk(self.kept(size), dim=1, sorted=False).indices
            # In the order of the places, zeros last and all at place 0: equal blocks have equal bytes.
            ordered = places.masked_fill(blocks.gather(1, places) == 0, size).sort(dim=1).values
            empty = ordered == size
            ordered.masked_fill_(empty, 0)
            kept = blocks.gather(1, ordered).masked_fill_(empty, 0.0)
            numbers = ordered.to(torch.int16).view(torch.uint8).view(count, -1)
            pieces.append(torch.cat([numbers, self.pack(kept)], dim=1).view(-1))
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(num_values)
        offset = 0
        for start, count, size in self.rows(num_values):
            kept, width = self.kept(size), self.row_nbytes(size)
            rows = data[offset : offset + count * width].view(count, width)
            numbers = rows[:, : _INDEX_BYTES * kept].clone(memory_format=torch.contiguous_format).view(torch.int16)
            values = self.unpack(rows[:, _INDEX_BYTES * kept :], kept)
            # Added, not written: place 0 may be there twice, once for a value and once for nothing.
            out[start : start + count * size].view(count, size).scatter_add_(1, numbers.long(), values)
            offset += count * width
        return out.to(dtype)
