"""Places of a model's named tensors in its flat parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from starling.algorithms.codecs import Codec


@dataclass(frozen=True)
class LayoutEntry:
    """Place of one named tensor in a flat one."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    block: str
    """The submodule that a partial exchange keeps together (``blocks.3``); empty at the top."""


@dataclass(frozen=True)
class Layout:
    """Names, places and shapes of the trainable tensors in ``node.parameters``."""

    entries: tuple[LayoutEntry, ...]
    dtype: torch.dtype
    num_buffer_values: int = 0
    """Values in ``node.buffers``."""

    @property
    def num_values(self) -> int:
        """Return P, the number of trainable values."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of the flat parameters."""
        return self.num_values * self.dtype.itemsize

    @property
    def buffer_nbytes(self) -> int:
        """Return the bytes of the flat floating-point buffers."""
        return self.num_buffer_values * self.dtype.itemsize

    def encoded_nbytes(self, codec: Codec) -> int:
        """Return the bytes of the parameters and the buffers, each encoded by ``codec``."""
        return sum(codec.nbytes(size, self.dtype) for size in (self.num_values, self.num_buffer_values))
