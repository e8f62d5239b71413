"""Fingerprints of a run's data, which processes compare when they come up, and a run when it is resumed.

Partitions and samplers rely on one list of samples, in one order, in all processes and since the checkpoint. A file
that was written anew, or a task that divides its data at random, would make places in that order mean other samples,
without a word.

A fingerprint has the number of samples, their labels, and the values of some samples as the task decodes them. It also
has the ``contents`` of the sources: tensors in memory, and files of samples with a method ``content``.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import xxhash

from starling.actors.data import contents

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from starling.actors.data.samples import Samples

Fingerprint: TypeAlias = "dict[str, int | str]"
"""Hashes and counts of a data set, by a readable name of each compared property."""

_IN_MEMORY = 256
"""Samples that are looked at of those that are in memory, evenly spaced."""
_READ = 2
"""Samples read at each end of data that are not in memory: they may have to be read from files."""


def fingerprint(train: Samples | None, validation: Samples) -> Fingerprint:
    """Take the fingerprint of data; cheap, and without a trace in random generators.

    Args:
        train: to be trained on; ``None``: each node has its own, and alone may look at them.
        validation: held-out.
    """
    found: Fingerprint = {}
    for what, samples in (("training samples", train), ("held-out samples", validation)):
        if samples is None:
            continue
        found[what] = len(samples)
        labels = vars(samples).get("labels") if hasattr(samples, "__dict__") else None
        if isinstance(labels, torch.Tensor):
            found[f"labels of the {what}"] = _digest((labels,))
        with contextlib.suppress(Exception), _unseen():  # what cannot be read is said when it is trained on
            found[f"values of the {what}"] = _digest(samples.batch(_places(samples)))
        with contextlib.suppress(Exception):  # as above
            pieces = _content(samples)
            if pieces is not None:
                found[f"content of the {what}"] = _digest_of(pieces)
    return found


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe in one line how two fingerprints differ; ``None`` if they agree in everything that both know.

    >>> difference({"training samples": 200, "x": 1}, {"training samples": 150})
    'training samples: 200 and 150'
    """
    unlike = [key for key in was if key in now and was[key] != now[key]]
    counts = [f"{key}: {was[key]} and {now[key]}" for key in unlike if isinstance(was[key], int)]
    others = [f"{key} differ" for key in unlike if not isinstance(was[key], int)]
    return "; ".join([*counts, *others]) or None


def _content(samples: Samples) -> Iterator[Any] | None:
    """Pieces of what ``samples`` are made from; ``None``: that is not known."""
    told = getattr(samples, "content", None)
    if told is not None:
        return told()
    tensors = getattr(samples, "tensors", None)
    if tensors is None:
        return None
    return (piece for tensor in tensors for piece in contents.of_memory(_bytes_of(tensor)))


def _places(samples: Samples) -> Tensor:
    count = len(samples)
    if hasattr(samples, "tensors"):
        return torch.arange(0, count, max(1, count // _IN_MEMORY))
    return torch.tensor(sorted({*range(min(_READ, count)), *range(max(0, count - _READ), count)}))


def _digest(tensors: tuple[Tensor, ...]) -> str:
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor).data)
    return digest.hexdigest()


def _digest_of(pieces: Iterator[Any]) -> str:
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Let what is drawn at random inside be the same everywhere, and nobody notice it outside."""
    mine, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's code may draw from it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # noqa: TID251 - put back below
            random.seed(0)  # noqa: TID251 - as above
            np.random.seed(0)  # noqa: NPY002 - as above
            yield
    finally:
        random.setstate(mine)
        np.random.set_state(numpys)  # noqa: NPY002 - as above
