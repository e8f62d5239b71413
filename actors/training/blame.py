"""Blame: which sample a loss that is not finite comes from, if it comes from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from starling.actors.tasks import Samples


_TOO_SMALL = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")
"""Beginnings of the error messages of torch's batch and instance norms about too few values."""


def non_finite(samples: Samples, indices: Tensor) -> str | None:
    """Name the first sample at ``indices`` that is not finite, and its origin; ``None`` if all are finite."""
    for index in indices.tolist():
        found = non_finite_of(samples.batch(indices.new_tensor([index])))
        if found is not None:
            where = getattr(samples, "where", None)
            place = None if where is None else cast("str | None", where(index))
            return f"sample {index} is not finite ({place or found})"
    return None


def non_finite_of(tensors: Sequence[Tensor]) -> str | None:
    """Name the first value that is not finite, with its tensor and place; ``None`` if all are finite."""
    for number, tensor in enumerate(tensors):
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all()):
            continue
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        return f"{tensor[tuple(place)].item()} at {place} of tensor {number} of the batch"
    return None


def too_small(error: ValueError, size: int) -> str | None:
    """Return the remedy for a layer that refuses a batch of one sample; ``None`` for any other error."""
    text = str(error)
    if size > 1 or not any(one in text for one in _TOO_SMALL):
        return None
    what = f"a batch of {size} sample, and a layer of the model takes statistics over a batch ({text})"
    return f"{what}; set data.min_batch: 2, by which such a rest joins the batch before it, or another data.batch_size"
