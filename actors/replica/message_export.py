"""Undelivered messages as one state export of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from starling.actors.replica.state_transfer import StateExport
from starling.actors.wire.buffers import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starling.actors.wire.buffers import Buffer


def packed(specs: Sequence[tuple[TensorSpec, ...]], data: Sequence[Buffer]) -> StateExport:
    """Pack payloads and their specs into one export."""
    meta: dict[str, Any] = {
        "letters": [[_written(spec) for spec in one] for one in specs],
        "tensors": [{"dtype": "uint8", "shape": [one.nbytes]} for one in data],
    }
    return StateExport(meta, list(data))


def unpacked(letters: StateExport) -> Iterator[tuple[tuple[TensorSpec, ...], Buffer]]:
    """Yield specs and bytes of each payload in a packed export."""
    for one, data in zip(letters.meta["letters"], letters.arrays, strict=True):
        yield tuple(_read(spec) for spec in one), data


def _written(spec: TensorSpec) -> dict[str, Any]:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "dtype": dtype, "shape": list(spec.shape), "is_number": spec.is_number}


def _read(spec: dict[str, Any]) -> TensorSpec:
    return TensorSpec(spec["name"], getattr(torch, spec["dtype"]), tuple(spec["shape"]), spec["is_number"])
