"""Records of rounds: the list of codes that all nodes applied, as bytes.

Learning rate and ε (8 bytes each), the number of contributors (2), then of each its id (4) and its codes, and the
SHA-256 of the parameters (32) where the round ends with one. All little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from starling.algorithms.api import NodeId

_HEADER = struct.Struct("<ddH")
_ID = struct.Struct("<i")
_DIGEST_NBYTES = 32


@dataclass(frozen=True)
class Record:
    """The content of one round's record."""

    lr: float
    eps: float
    codes: Mapping[NodeId, Tensor]
    """uint8, by contributor, sorted."""
    digest: str
    """Hex, of the parameters afterwards; empty if it was not taken."""


def checked(member: NodeId, codes: Tensor, size: int) -> Tensor:
    """Return the codes of ``member``, checked to be ``size`` bytes.

    Raises:
        ProgramError: they are not.
    """
    if codes.dtype != torch.uint8 or codes.numel() != size:
        kind = "bytes" if codes.dtype == torch.uint8 else f"values of {codes.dtype}"
        raise ProgramError(f"node {member} has {codes.numel()} {kind} of codes; it must have {size} bytes")
    return codes


def pack(lr: float, eps: float, codes: Mapping[NodeId, Tensor], digest: str) -> bytes:
    """Encode the codes of all contributors, of one length, as a record."""
    pieces = [_HEADER.pack(lr, eps, len(codes))]
    pieces += [_ID.pack(member) + one.cpu().numpy().tobytes() for member, one in codes.items()]
    return b"".join([*pieces, bytes.fromhex(digest)])


def unpack(record: bytes, size: int, *, with_digest: bool) -> Record | None:
    """Decode a record with codes of ``size`` bytes; return ``None`` for a record of another length."""
    if len(record) < _HEADER.size:
        return None
    lr, eps, count = _HEADER.unpack_from(record)
    end = _HEADER.size + count * (_ID.size + size)
    if len(record) != end + _DIGEST_NBYTES * with_digest:
        return None
    codes: dict[NodeId, Tensor] = {}
    for place in range(_HEADER.size, end, _ID.size + size):
        data = bytearray(record[place + _ID.size : place + _ID.size + size])
        codes[_ID.unpack_from(record, place)[0]] = torch.frombuffer(data, dtype=torch.uint8)
    return Record(lr, eps, codes, record[end:].hex())
