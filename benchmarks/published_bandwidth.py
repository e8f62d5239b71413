"""The published table of Streaming DiLoCo, worked out anew: the bandwidth for a given compute utilization.

``python benchmarks/published_bandwidth.py`` prints table 4 of Douillard et al., 2025 (arXiv:2501.18512) beside what
this recipe gives: 69 of the 75 cells exactly, the others within one step of its grid. The recipe was worked out from
the numbers:

* A model is L layers. Forward takes a third of a step, layer by layer, and backward two thirds, in reverse.
* The S/L bits of a layer enter one first-in-first-out link when its backward pass ends. Its forward pass waits for them
  in the next step, or with an overlap of τ steps in the τ-th after that.
* S is 16 bits a parameter, 4 both ways with FP4, and M = 2 nodes, for which a ring sends each value once.
* A cell is the largest bandwidth of ``GRID`` at which the utilization is still below the target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Compute utilizations."""

METHODS = ("data_parallel", "diloco", "streaming", "streaming_overlap", "streaming_overlap_fp4")

GRID: NDArray[np.float64] = np.logspace(-1, 3, 50)
"""Gbit/s that the table tries."""

_STEPS = 200
"""Simulated steps; from 100 on the table does not depend on them. Data-parallel steps are all alike."""

_STEPS_OF_DATA_PARALLEL = 30

PUBLISHED = {
    "1b": {
        "data_parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
        "diloco": (1.4, 6.2, 13.3, 23.3, 86.8),
        "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
        "streaming_overlap": (1.4, 4.3, 6.2, 9.1, 11.0),
        "streaming_overlap_fp4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    "10b": {
        "data_parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
        "diloco": (1.7, 7.5, 16.0, 33.9, 104.8),
        "streaming": (1.7, 5.2, 9.1, 13.3, 19.3),
        "streaming_overlap": (1.7, 3.6, 5.2, 6.2, 7.5),
        "streaming_overlap_fp4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
    "100b": {
        "data_parallel": (184.2, 323.8, 390.7, 390.7, 471.5),
        "diloco": (3.0, 11.0, 23.3, 49.4, 184.2),
        "streaming": (2.4, 6.2, 9.1, 11.0, 19.3),
        "streaming_overlap": (1.7, 3.6, 4.3, 5.2, 5.2),
        "streaming_overlap_fp4": (0.5, 0.9, 1.1, 1.1, 1.4),
    },
}
"""Gbit/s by model and method, one for each of ``TARGETS``."""


@dataclass(frozen=True)
class Preset:
    """A model of the published table."""

    parameters: float
    layers: int
    step_s: float
    """At 60 % of the peak, as published."""
    slack: float
    """What the published, rounded numbers of parameters and seconds are off by; only their quotient matters."""
    inner_steps: int = 100
    layers_per_fragment: int = 3


PRESETS = {
    "1b": Preset(1e9, 24, 0.1, 1.02),
    "10b": Preset(10e9, 48, 0.8, 1.01),
    "100b": Preset(100e9, 108, 4.9, 1.01),
}


def utilization_of(preset: Preset, method: str, gbit_s: NDArray[np.float64], *, strided: bool = True) -> Any:
    """Return the compute utilization at each bandwidth, shape as ``gbit_s``."""
    bits = 16 * preset.parameters * preset.slack / (4 if method == "streaming_overlap_fp4" else 1)
    overlap = int("overlap" in method)
    seconds = bits / preset.layers / (gbit_s * 1e9)
    forward, backward = preset.step_s / 3 / preset.layers, 2 * preset.step_s / 3 / preset.layers
    steps = _STEPS_OF_DATA_PARALLEL if method == "data_parallel" else _STEPS
    now, free = np.zeros_like(gbit_s), np.zeros_like(gbit_s)
    awaited: dict[int, dict[int, NDArray[np.float64]]] = {}
    for step in range(steps):
        place = 0
        for layer, arrival in sorted(awaited.pop(step, {}).items()):
            now = np.maximum(now + forward * (layer - place), arrival)
            place = layer
        now = now + forward * (preset.layers - place)
        arrivals: dict[int, NDArray[np.float64]] = {}
        for layer in sorted(_sent(preset, method, step, strided=strided), reverse=True):
            free = np.maximum(free, now + backward * (preset.layers - layer)) + seconds
            arrivals[layer] = free
        if arrivals:
            awaited[step + 1 + overlap] = arrivals
        now = now + backward * preset.layers
    return steps * preset.step_s / np.maximum(now, free)


def _sent(preset: Preset, method: str, step: int, *, strided: bool) -> Iterable[int]:
    """Yield the layers that are communicated after a step."""
    if method == "data_parallel":
        return range(preset.layers)
    place = step % preset.inner_steps
    if method == "diloco":
        return range(preset.layers) if place == 0 else ()
    size = preset.layers_per_fragment
    count = preset.layers // size
    due = [p for p in range(count) if place == p * preset.inner_steps // count]
    if strided:
        return [layer for p in due for layer in range(p, preset.layers, count)]
    return [layer for p in due for layer in range(p * size, (p + 1) * size)]


def places_in_grid(preset: Preset, method: str, *, strided: bool = True) -> list[int]:
    """Return the cells of a row as places in ``GRID``: the last one at which the utilization is below each target."""
    reached = utilization_of(preset, method, GRID, strided=strided)
    return [max(0, int(np.argmax(reached >= target)) - 1) for target in TARGETS]


def printed(gbit_s: float) -> float:
    """Round a bandwidth of the grid twice, as the published table does."""
    return round(round(gbit_s, 2), 1)


def preset_table(name: str) -> dict[str, list[float]]:
    """Return the table of a model: Gbit/s by method, one for each of ``TARGETS``."""
    preset = PRESETS[name]
    return {method: [printed(float(GRID[place])) for place in places_in_grid(preset, method)] for method in METHODS}


def main() -> None:
    for model in PRESETS:
        print(f"{model:<22}", *(f"{target:>15.0%}" for target in TARGETS))
        for method, cells in preset_table(model).items():
            pairs = zip(PUBLISHED[model][method], cells, strict=True)
            print(f"  {method:<22}", *(f"{published:>7g} ({ours:g})".rjust(15) for published, ours in pairs))


if __name__ == "__main__":
    main()
