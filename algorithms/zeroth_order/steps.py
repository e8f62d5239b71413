"""The step of a round: move the parameters along all nodes' directions, identically on all nodes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from starling.algorithms.noise import CHUNK, Distribution, accumulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from starling.algorithms.layout import Layout

Normalizer: TypeAlias = Literal["mean", "sqrt"]

_AT_ONCE = 16 * CHUNK
"""Values that are hashed at a time."""


@dataclass(frozen=True)
class Moved:
    """A range of the parameters, and the (key, coefficient) of each direction along which it moves."""

    start: int
    stop: int
    terms: Sequence[tuple[int, float]]

    @staticmethod
    def by(span: tuple[int, int], estimates: Sequence[tuple[int, float]], lr: float, normalizer: Normalizer) -> Moved:
        """Move by −η ĝ / c along each (key, ĝ) that is a number; c is the count of these, or its root."""
        counted = [(key, value) for key, value in estimates if not math.isnan(value)]
        scale = lr / (math.sqrt(len(counted)) if normalizer == "sqrt" else len(counted)) if counted else 0.0
        return Moved(*span, [(key, -scale * value) for key, value in counted if value])


@dataclass(frozen=True)
class PerturbationStep:
    """θ ← ``kept`` · θ in the ranges ``decayed``, and then θ ← θ + Σ coefficient · z(key) in each of ``moved``."""

    moved: Sequence[Moved]
    decayed: Sequence[tuple[int, int]]
    kept: float
    distribution: Distribution

    def apply(self, parameters: Tensor) -> None:
        """Take the step from θ, shape (P,), in place."""
        self._apply(parameters, 0)

    def digest(self, parameters: Tensor) -> str:
        """Return the SHA-256 of θ after the step, without changing θ or copying more than a piece of it."""
        sha = hashlib.sha256()
        for first in range(0, parameters.numel(), _AT_ONCE):
            values = parameters[first : first + _AT_ONCE].clone()
            self._apply(values, first)
            sha.update(values.cpu().numpy().data)
        return sha.hexdigest()

    def _apply(self, values: Tensor, first: int) -> None:
        """Take the part of it that concerns ``values``, which are those of θ from ``first`` on."""

        def here(start: int, stop: int) -> tuple[int, int]:
            return max(start - first, 0), max(min(stop - first, values.numel()), 0)

        for start, stop in self.decayed:
            low, high = here(start, stop)
            values[low:high].mul_(self.kept)
        for one in self.moved:
            low, high = here(one.start, one.stop)
            if low < high:
                accumulate(values[low:high], one.terms, self.distribution, first + low)


def matrices_of(layout: Layout) -> list[tuple[int, int]]:
    """Return the ranges of parameters with two dimensions or more."""
    return [(entry.start, entry.stop) for entry in layout.entries if len(entry.shape) > 1]


def layers_of(layout: Layout) -> list[tuple[int, int]]:
    """Return the ranges of each module's parameters."""
    spans: list[tuple[int, int]] = []
    last = None
    for entry in layout.entries:
        layer = entry.name.rpartition(".")[0]
        start = spans.pop()[0] if layer == last else entry.start
        spans.append((start, entry.stop))
        last = layer
    return spans
