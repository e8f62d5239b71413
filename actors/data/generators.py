"""The process's own random generators, for code that can only use those."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that belong to the process, for code that can only use those, and put them back after.

    Those of torch (initialisation, dropout), numpy and Python. With them what such code could leave behind is put back
    that changes what others compute: the default type of new tensors, the number of threads, whether gradients are
    recorded.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # before its first use a device has no generator
        generators.append(torch.cuda.default_generators[device.index or 0])
    # Not torch.random.fork_rng, which takes 60 times as long: a round of a small node is a few hundred microseconds.
    states = [one.get_state() for one in generators]
    others = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - a user's code draws from it
    kept = Settings.now()
    try:
        for one in generators:
            one.manual_seed(seed)
        random.seed(seed)  # noqa: TID251 - as above
        np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
        yield
    finally:
        kept.restore()
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002 - as above


def drawn_from() -> tuple[Tensor, object, tuple[Any, ...]]:
    """Return the state of the process's CPU generators, for ``same_draws``."""
    numpys = np.random.get_state(legacy=True)  # noqa: NPY002 - as above
    return torch.default_generator.get_state(), random.getstate(), cast("tuple[Any, ...]", numpys)


def same_draws(one: tuple[Tensor, object, tuple[Any, ...]], other: tuple[Tensor, object, tuple[Any, ...]]) -> bool:
    """Whether nothing was drawn between the two."""
    is_same = torch.equal(one[0], other[0]) and one[1] == other[1] and one[2][2:] == other[2][2:]
    return is_same and np.array_equal(one[2][1], other[2][1])


class Settings(NamedTuple):
    """Process-wide settings that a user's code may change and other nodes compute with."""

    default_dtype: torch.dtype
    records_gradients: bool
    num_threads: int

    @staticmethod
    def now() -> Settings:
        """Read the current settings."""
        return Settings(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())

    def restore(self) -> None:
        """Make them as they were."""
        found = Settings.now()
        if found == self:
            return
        torch.set_default_dtype(self.default_dtype)
        torch.set_grad_enabled(self.records_gradients)
        if found.num_threads != self.num_threads:
            torch.set_num_threads(self.num_threads)
