"""Tensors in safetensors files, by content: equal bytes are there once, and a tensor's name vouches for it.

A tensor's *key* is the XXH3-128 of its type, shape and bytes, and its name in the file. The checksum of a file is its
header's; the header has all names, types, shapes and places. Together with the tensors' keys it covers each byte. Each
byte is hashed once, for the look-up among the stored tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip
"""Names of torch's types in safetensors; tensors of other types are written as bytes."""
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000  # as safetensors has it


class DamagedError(Exception):
    """A file is not what was written; says what is wrong with it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    itemsize: int


def stored(form: dict[str, Any], data: Bytes) -> StoredTensor:
    """Hash a tensor with dtype and shape of ``form``; for large ones that releases the GIL."""
    shape: tuple[int, ...] = tuple(form["shape"])
    if nbytes(form) != data.nbytes:
        raise ValueError(f"{data.nbytes} bytes are no {form['dtype']}{list(shape)}")
    known = _NAMES.get(form["dtype"])
    name, shape = (known, shape) if known else ("U8", (data.nbytes,))
    return StoredTensor(_key(name, shape, data), name, shape, data, _itemsize(form))


def nbytes(form: dict[str, Any]) -> int:
    """Size of a tensor with this dtype and shape."""
    return math.prod(form["shape"]) * _itemsize(form)


def _itemsize(form: dict[str, Any]) -> int:
    dtype: torch.dtype = getattr(torch, form["dtype"])
    return dtype.itemsize


def _key(dtype: str, shape: Iterable[int], data: Bytes) -> str:
    # Whoever can change a file can change what vouches for it: this is against accidents, and takes a twentieth of the
    # time of SHA-256, from the cores that train.
    digest = xxhash.xxh3_128(f"{dtype}{list(shape)};".encode())
    digest.update(data.data)
    return digest.hexdigest()


def layout(tensors: Iterable[StoredTensor]) -> tuple[bytes, list[memoryview]]:
    """A safetensors file: its header, and what follows it."""
    entries: dict[str, Any] = {}
    pieces: list[memoryview] = []
    end = 0
    # Large types first, and a header whose length is a multiple of 8: then all begin where their type may.
    for one in sorted(tensors, key=lambda one: (-one.itemsize, one.key)):
        begin, end = end, end + one.data.nbytes
        entries[one.key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [begin, end]}
        pieces.append(one.data.data)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text, pieces


def checksum(header: bytes) -> str:
    """Checksum of a file of tensors."""
    return f"header-sha256:{hashlib.sha256(header).hexdigest()}"


def read(data: Bytes, expected: str) -> Iterator[tuple[str, Bytes]]:
    """Read the tensors of a file by their keys, as views of it, each checked.

    Raises:
        DamagedError: it is not the file whose checksum was ``expected``.
    """
    head = data[: _LENGTH.size].tobytes()
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _MAX_HEADER
    begin = _LENGTH.size + length
    if begin > min(data.nbytes, _MAX_HEADER) or checksum(data[:begin].tobytes()) != expected:
        raise DamagedError("its checksum is wrong")
    end = 0
    for key, entry in json.loads(data[_LENGTH.size : begin].tobytes()).items():
        start, stop = entry["data_offsets"]
        piece = data[begin + start : begin + stop]
        if start != end or _key(entry["dtype"], entry["shape"], piece) != key:
            raise DamagedError("its checksum is wrong")
        yield key, piece
        end = stop
    if begin + end != data.nbytes:
        raise DamagedError("its checksum is wrong")
