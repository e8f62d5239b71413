"""The codec interface, and the codec that changes nothing."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from algorithms.registry import Part


class Codec(Part, family="codec", catalog="algorithms.codecs"):
    """Turns flat tensors into bytes and back.

    What a codec encodes is what is reduced and what is booked: the ledger counts ``nbytes`` and a test holds it to
    the length of ``encode``.
    """

    @property
    def block(self) -> int:
        """Values that must stay together: an exchange is cut only at multiples of it."""
        return 1

    @abstractmethod
    def nbytes(self, num_values: int, dtype: torch.dtype) -> int:
        """Length of the encoding of ``num_values`` values of ``dtype``, in bytes."""

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
