"""Places of a model's named tensors in its flat parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starling.algorithms.errors import ProgramError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Collection

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

    def select(self, names: Collection[str]) -> list[int]:
        """Return the places in ``entries`` that ``names`` select: of an entry, or of a submodule with all in it.

        Raises:
            ProgramError: a name selects nothing.
        """
        chosen: set[int] = set()
        for name in names:
            found = [
                place
                for place, entry in enumerate(self.entries)
                if entry.name == name or entry.name.startswith(f"{name}.")
            ]
            if not found:
                there = listed((entry.name for entry in self.entries), most=8)
                raise ProgramError(f"{name!r} names no trained parameter of the model; there are {there}")
            chosen.update(found)
        return sorted(chosen)

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
