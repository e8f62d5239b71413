"""The codec interface, and the codec that changes nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from starling.algorithms.errors import ProgramError
from starling.algorithms.registry import Part
from starling.algorithms.seeds import derive_seed


class Codec(Part, family="codec", catalog="starling.algorithms.codecs"):
    """Turns flat tensors into bytes and back.

    The encoded values are the ones that are reduced and booked: the ledger counts ``nbytes``, and a test holds
    ``nbytes`` to the length of ``encode``.
    """

    @property
    def block(self) -> int:
        """Return the number of values that are encoded together: an exchange is cut only at multiples of this."""
        return 1

    @property
    def needs_feedback(self) -> bool:
        """Say whether the codec needs error feedback: without it, left-out values are lost for good."""
        return False

    @property
    def is_contraction(self) -> bool:
        """Say whether the encoding error is smaller than the values, so that error feedback does not grow."""
        return True

    @property
    def hides_contributions(self) -> bool:
        """Say whether one decoded contribution tells nothing, as under masks that cancel in the sum of all."""
        return False

    def at(self, round_number: int) -> Self:
        """Return the codec of an exchange by its number, the same on all members; it draws random numbers of its own.

        The number is the round's where a round has one exchange; see ``exchange_codecs`` where it has several.
        """
        del round_number
        return self

    def through(self, values: Tensor) -> Tensor:
        """Return ``values``, shape (n,), encoded and decoded again, with their dtype and device."""
        flat = values.detach()
        return self.decode(self.encode(flat.cpu()), flat.numel(), flat.dtype).to(flat.device)

    @abstractmethod
    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        """Return the bytes of ``num_values`` encoded values of ``dtype``."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Encode a flat tensor, shape (n,), as a uint8 tensor, shape (nbytes,); it may share memory with ``values``."""

    @abstractmethod
    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        """Decode bytes into ``num_values`` values of ``dtype``, shape (n,); they may share memory with ``data``."""


class Identity(Codec, name="identity"):
    """The values themselves, in their own dtype, little-endian.

    >>> import torch
    >>> Identity().encode(torch.tensor([1.0])).tolist()
    [0, 0, 128, 63]
    """

    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        return num_values * dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8)

    def decode(self, data: Tensor, num_values: int, dtype: torch.dtype) -> Tensor:
        return data.view(dtype)[:num_values]


def exchange_codecs(codec: Codec, result_codec: Codec, number: int, name: str = "") -> tuple[Codec, Codec]:
    """Return the codecs of contributions and of the result, with random numbers of this exchange alone.

    Args:
        codec: of what is contributed.
        result_codec: of what comes back.
        number: of the exchange in the run, such as the round's.
        name: tells exchanges of one number apart, such as a fragment's.
    """
    draw = derive_seed("exchange", number, name) if name else number
    return codec.at(draw), result_codec.at(derive_seed("result", draw))


AT_ONCE = 65_536
"""Values that are encoded or decoded at a time: what is in between stays in a core's cache."""


def blocks_of(values: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Return blocks ``start`` to ``stop`` of a flat tensor, float32, shape (stop - start, size), padded with zeros.

    Not to be written to: it may share memory with ``values``.
    """
    piece = values[start * size : stop * size].to(torch.float32)
    if piece.numel() % size:
        piece = torch.nn.functional.pad(piece, (0, -piece.numel() % size))
    return piece.reshape(-1, size)


def refuse_beyond(limit: float, values: Tensor, codec: Codec) -> None:
    """Refuse values that a lossy codec could not give back as finite ones.

    Raises:
        ProgramError: one of ``values`` is NaN, or beyond ±``limit``.
    """
    if not values.numel():
        return
    low, high = (float(extreme) for extreme in torch.aminmax(values))
    if low >= -limit and high <= limit:  # neither holds if there is a NaN
        return
    what = f"codec {codec.name} carries finite values up to ±{limit:.5g}; these lie between {low:.5g} and {high:.5g}"
    finite = math.isfinite(low) and math.isfinite(high)
    cure = "use codec bf16 (up to 3.4e+38) or identity" if finite else "training has diverged, lower its learning rate"
    message = f"{what}: {cure}"
    raise ProgramError(message)
