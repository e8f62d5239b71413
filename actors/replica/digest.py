"""Digests: SHA-256 over tensors and state trees, equal exactly where the bits are equal."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from torch import Tensor

from starling.actors.wire.buffers import as_buffer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starling.algorithms.api import State


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 over tensors sorted by name: name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_header(name, tensor))
        digest.update(as_buffer(tensor.detach().cpu().contiguous()).data)
    return digest.hexdigest()


def digest_state(state: Mapping[str, State]) -> str:
    """Return the hex SHA-256 over a state tree's leaves sorted by path: tensors as bytes, others as canonical JSON."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves(dict(state)), key=lambda item: item[0]):
        if isinstance(leaf, Tensor):
            digest.update(_header(path, leaf))
            digest.update(as_buffer(leaf.detach().cpu().contiguous()).data)
        else:
            digest.update(f"{path}={json.dumps(leaf, sort_keys=True, allow_nan=True)};".encode())
    return digest.hexdigest()


def leaves(state: State, path: str = "") -> Iterator[tuple[str, State]]:
    """Walk a state tree: (path, leaf) for all leaves, empty containers included."""
    if isinstance(state, dict) and state:
        for key, child in state.items():
            # Quoted: {"a/b": 1} is not {"a": {"b": 1}}, and a key that looks like an index is none.
            yield from leaves(child, f"{path}/{key!r}")
    elif isinstance(state, list) and state:
        for index, child in enumerate(state):
            yield from leaves(child, f"{path}/{index:09d}")
    else:
        yield path, state


def _header(name: str, tensor: Tensor) -> bytes:
    return f"{name}:{str(tensor.dtype).removeprefix('torch.')}:{list(tensor.shape)};".encode()
