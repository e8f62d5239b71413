"""How much bandwidth a method needs for a given compute utilization: the published table, and the user's own run.

*Compute utilization* is the share of the time in which nodes compute. The table of Streaming DiLoCo (Douillard et al.,
2025, arXiv:2501.18512, table 4) is reproduced by this recipe, worked out from the numbers (69 of the 75 cells exactly,
the others within one step of its grid):

* a model is L layers; forward takes a third of a step, layer by layer, and backward two thirds, in reverse;
* where a layer is communicated, its S/L bits enter one first-in-first-out link when its backward pass ends, and its
  forward pass waits for them in the next step, or with an overlap of τ steps in the τ-th after that;
* S is 16 bits a parameter, 4 both ways with FP4, and M = 2 nodes, for which a ring sends each value once;
* a cell is the largest bandwidth of ``GRID`` at which the utilization is still below the target.

For a user's run what is sent is FP4 and what comes back in ``result_codec``, bf16 by default. Its network is the
simulator's (``orchestrator.runtimes.network``), with the phases of its exchanges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from starling.actors.wire.buffers import Cuts, TensorSpec, num_parts
from starling.algorithms.api import INLINE_LIMIT_BYTES
from starling.algorithms.codecs import Codec, Identity
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.codecs.half import BFloat16
from starling.algorithms.low_communication.ddp import DDP
from starling.algorithms.low_communication.diloco import DiLoCo
from starling.algorithms.low_communication.eager_diloco import EagerDiLoCo
from starling.algorithms.low_communication.fragments import fragments_of, size_of
from starling.algorithms.low_communication.local_sgd import LocalSGD
from starling.algorithms.low_communication.streaming_diloco import StreamingDiLoCo
from starling.orchestrator.errors import ConfigError, SettingsError
from starling.orchestrator.runtimes.network import Cast, Network
from starling.orchestrator.runtimes.user_code import user_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from starling.algorithms.layout import Layout
    from starling.orchestrator.config.schema import Config

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Compute utilizations."""

METHODS = ("data_parallel", "diloco", "streaming", "streaming_overlap", "streaming_overlap_fp4")

GRID: NDArray[np.float64] = np.logspace(-1, 3, 50)
"""Gbit/s that the published table tries."""

_STEPS = 200
"""That are simulated for it; from 100 on the table does not depend on it. Data-parallel steps are all alike."""

_STEPS_OF_DATA_PARALLEL = 30

_DEFAULT_STEPS = 100
"""H, where the user's algorithm has none."""

_LEAST, _MOST = 1e-9, 1e6
"""Gbit/s between which a user's answer is sought."""


# --- the published table --------------------------------------------------------------------------------------------


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


def utilization_of(preset: Preset, method: str, gbit_s: NDArray[np.float64], *, strided: bool = True) -> Any:  # noqa: ANN401 - an array
    """Compute utilization at each bandwidth, shape as ``gbit_s``."""
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
    """The layers that are communicated after a step."""
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
    """The cells of a row as places in ``GRID``: the last one at which the utilization is below each target."""
    reached = utilization_of(preset, method, GRID, strided=strided)
    return [max(0, int(np.argmax(reached >= target)) - 1) for target in TARGETS]


def printed(gbit_s: float) -> float:
    """A bandwidth of the grid as the published table has it: rounded twice."""
    return round(round(gbit_s, 2), 1)


def preset_table(name: str) -> dict[str, list[float]]:
    """The published table of a model: Gbit/s by method, one for each of ``TARGETS``."""
    preset = PRESETS[name]
    return {method: [printed(float(GRID[place])) for place in places_in_grid(preset, method)] for method in METHODS}


# --- the user's run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segment:
    """A part of a round: steps alone, and an exchange that begins after them, and ends ``overlap`` steps later."""

    steps: int
    exchange: Cuts | None
    overlap: int = 0


@dataclass(frozen=True)
class Workload:
    """A user's model, nodes and step time."""

    config: Config
    layout: Layout
    inner_steps: int
    fragments: int
    overlap_steps: int
    methods: dict[str, DDP | DiLoCo | StreamingDiLoCo]
    """What is compared, by the names in ``METHODS``."""

    @classmethod
    def of(cls, config: Config) -> Workload:
        """Build the model, and take from the algorithm what it says of steps, fragments, overlap and codecs.

        Raises:
            ConfigError: the nodes take no time to compute, or cannot be told apart from the network's.
            StarlingError: the model cannot be built.
        """
        with user_code(0, 0):
            layout = config.replica_spec().bench(torch.device("cpu")).layout
        given = config.algorithm
        known = isinstance(given, DiLoCo | StreamingDiLoCo | EagerDiLoCo | LocalSGD)
        steps = given.inner_steps if known else _DEFAULT_STEPS
        streaming = given if isinstance(given, StreamingDiLoCo) else None
        if config.network.step_ms == 0:
            raise ConfigError("network.step_ms is 0: there is nothing to utilize; set it to the time of a step")
        count = streaming.fragments if streaming else _fragments(steps)
        base = {"inner_steps": steps, "fragments": count, "pattern": _pattern(layout, count, streaming)}
        room = steps // count - 1
        overlap = min(room, (streaming.overlap_steps if streaming else 0) or 1)
        whole = base | {"codec": Identity(), "result_codec": Identity(), "overlap_steps": 0}
        result: Codec = streaming.result_codec if streaming else BFloat16()
        quantized = whole | {"overlap_steps": overlap, "codec": FP4(), "result_codec": result}
        return cls(
            config,
            layout,
            steps,
            count,
            overlap,
            {
                "data_parallel": DDP(),
                "diloco": DiLoCo(inner_steps=steps),
                "streaming": StreamingDiLoCo.model_validate(whole),
                "streaming_overlap": StreamingDiLoCo.model_validate(whole | {"overlap_steps": overlap}),
                "streaming_overlap_fp4": StreamingDiLoCo.model_validate(quantized),
            },
        )

    def utilization(self, method: str, gbit_s: float) -> float:
        """Compute utilization over a period, with the simulator's network at this bandwidth."""
        config = self.config.network.model_copy(update={"bandwidth_mbps": gbit_s * 1000})
        network, nodes = Network(config), range(self.config.num_nodes)
        paces = [config.step_ms / 1000 / config.speeds.get(node, 1.0) for node in nodes]
        algorithm = self.methods[method]
        period = algorithm.fragments if isinstance(algorithm, StreamingDiLoCo) else 1
        now, computed = [0.0 for _ in nodes], 0.0
        for number in range(period):
            for segment in self._segments(algorithm, number):
                begun = [at + segment.steps * pace for at, pace in zip(now, paces, strict=True)]
                done = begun if segment.exchange is None else _exchanged(network, segment.exchange, begun)
                trained = [at + segment.overlap * pace for at, pace in zip(begun, paces, strict=True)]
                now = [max(both) for both in zip(trained, done, strict=True)]
                computed += (segment.steps + segment.overlap) * max(paces)
            now = [max(now) for _ in nodes]  # the round's end
        return computed / now[0]

    def needed(self, method: str, target: float) -> float | None:
        """The least bandwidth in Gbit/s with which ``target`` is reached; ``None``: latency alone costs more."""
        if self.utilization(method, _MOST) < target:
            return None
        if self.utilization(method, _LEAST) >= target:
            return 0.0  # alone, nobody waits for anybody
        low, high = math.log(_LEAST), math.log(_MOST)
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if self.utilization(method, math.exp(middle)) >= target else (middle, high)
        return math.exp(high)

    def table(self) -> dict[str, list[float | None]]:
        """Gbit/s by method, one for each of ``TARGETS``."""
        return {method: [self.needed(method, target) for target in TARGETS] for method in self.methods}

    def _segments(self, algorithm: DDP | DiLoCo | StreamingDiLoCo, number: int) -> list[_Segment]:
        size, buffers = self.layout.num_values, self.layout.num_buffer_values
        if isinstance(algorithm, DiLoCo):
            tensors = [TensorSpec("buffers", self.layout.dtype, (buffers,)), *self._tensor(size, "outer_gradient")]
            return [_Segment(algorithm.inner_steps, self._cuts(tensors, algorithm.codec, algorithm.result_codec))]
        if isinstance(algorithm, DDP):
            segments = [_Segment(1, self._cuts(self._tensor(size), algorithm.codec, algorithm.result_codec))]
        else:
            (due,) = algorithm.due(number)
            size = size_of(fragments_of(self.layout, algorithm.fragments, algorithm.pattern)[due])
            cuts = self._cuts(self._tensor(size), algorithm.codec, algorithm.result_codec)
            segments = [_Segment(algorithm.steps - algorithm.overlap_steps, cuts, algorithm.overlap_steps)]
        if buffers:
            segments.append(_Segment(0, self._cuts(self._tensor(buffers), Identity(), Identity())))
        return segments

    def _tensor(self, size: int, name: str = "") -> list[TensorSpec]:
        return [TensorSpec(name, self.layout.dtype, (size,))]

    def _cuts(self, tensors: Sequence[TensorSpec], codec: Codec, result_codec: Codec) -> Cuts:
        """As the exchange will be cut (``actors.host.exchanges``)."""
        whole = Cuts(tuple(tensors), codec, result_codec, 1)
        parts = num_parts(sum(whole.part_nbytes), self.config.num_nodes)
        return whole if parts == 1 else Cuts(tuple(tensors), codec, result_codec, parts)


def _exchanged(network: Network, cuts: Cuts, begun: Sequence[float]) -> list[float]:
    """When each node has the result of an exchange that they reach at ``begun``; as the simulator does it."""
    nodes, opened = range(len(begun)), max(begun)
    sizes = cuts.part_nbytes
    if sum(sizes) <= INLINE_LIMIT_BYTES:
        arrivals = network.arrivals(opened, [Cast(dict.fromkeys(nodes, sum(sizes)), list(nodes))])
        return [max(opened, arrivals.get(node, opened)) for node in nodes]
    makers = [part % len(nodes) for part in range(len(sizes))]
    gathered = [Cast(dict.fromkeys(nodes, sizes[part]), [maker]) for part, maker in enumerate(makers)]
    secured = max([opened, *network.arrivals(opened, gathered).values()])
    made: dict[int, int] = {}
    for part, maker in enumerate(makers):
        made[maker] = made.get(maker, 0) + cuts.result_nbytes[part]
    delivered = max([secured, *network.arrivals(secured, [Cast(made, list(nodes))]).values()])
    return [delivered for _ in nodes]


def _fragments(steps: int) -> int:
    """About four fragments that divide the steps and leave some to overlap with."""
    return next((count for count in (4, 5, 3, 6, 2) if steps % count == 0 and steps > count), 1)


def _pattern(layout: Layout, count: int, given: StreamingDiLoCo | None) -> str:
    if given is not None:
        return given.pattern
    try:
        fragments_of(layout, count, "strided")
    except SettingsError:
        return "size"
    return "strided"
