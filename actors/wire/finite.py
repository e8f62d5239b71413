"""Checks that keep values from other nodes that are not finite, or whose sum is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

_LARGEST = torch.finfo(torch.float32).max


def trouble(payload: Any, num_members: int, *, weight: float = 1.0, least: int = 1) -> str | None:  # noqa: ANN401 - a payload
    """Say what is wrong with the values that a node is about to give to others; ``None``: nothing.

    One pass over them, which costs about as much as a copy. Numbers, and tensors with fewer than ``least`` values, are
    a program's own signals: infinity may be one.

    Args:
        payload: a tensor, a number, or a mapping of them.
        num_members: how many may be added up.
        weight: by which it is multiplied then.
        least: values of the tensors that are looked at.
    """
    tensors: Iterable[tuple[str, Any]] = [("", payload)]
    if isinstance(payload, Mapping):
        tensors = cast("Mapping[str, Any]", payload).items()
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.numel() >= max(1, least):
            found = _trouble(tensor, num_members * max(1.0, weight))
            if found is not None:
                return f"{name!r} {found}" if name else found
    return None


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    # The sum is one pass, and finite only if all values are; that it is not may be its own overflow.
    return math.isfinite(values.sum()) or bool(values.isfinite().all())


def _trouble(tensor: Tensor, factor: float) -> str | None:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return None
    # Narrower values are added up in float32.
    bound = max(_LARGEST, torch.finfo(tensor.dtype).max) / factor
    low, high = (float(one) for one in torch.aminmax(tensor.detach()))
    if low >= -bound and high <= bound:  # neither holds for NaN
        return None
    if bool(tensor.isfinite().all()):
        return f"has values up to {max(-low, high):.3g}, the sum of which overflows"
    return f"is not finite ({'NaN' if bool(tensor.isnan().any()) else 'infinite'})"
