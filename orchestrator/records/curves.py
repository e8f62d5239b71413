"""Draws a run: training and validation loss over rounds, and over the bytes that were sent."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from starling.orchestrator.units import bytes_unit, number_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from starling.orchestrator.records.observers import RoundRecord, Started

# Distinguishable with any colour vision (Okabe and Ito).
_TRAIN, _VALIDATION, _BASELINES = "#0072B2", "#D55E00", ("#555555", "#009E73", "#CC79A7")
_LOG_SCALE_FROM = 30
"""The greatest loss over the smallest, from which on a linear axis would show a flat line."""
_MARKERS_UP_TO = 60
"""Points; more would make a thick line."""


def draw(path: Path, started: Started, rounds: Sequence[RoundRecord]) -> None:
    """Draw the committed rounds into a png file."""
    # A figure and canvas of its own: pyplot's global state belongs to the user.
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    sent = list(accumulate(record.payload_bytes for record in rounds))
    scale, unit = bytes_unit(sent[-1])
    _curves(left, rounds, [record.round + 1 for record in rounds], started.baselines)
    _curves(right, rounds, [nbytes / scale for nbytes in sent], started.baselines)
    left.set_xlabel("rounds done")
    left.set_ylabel("loss")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel(f"payload of all nodes, total ({unit})")
    if _spreads(rounds, started.baselines):
        left.set_yscale("log")
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    config = started.config
    nodes = f"{len(started.nodes)} node{'s' if len(started.nodes) != 1 else ''}"
    figure.suptitle(f"{config.algorithm.name} on {config.task.name}, {nodes}  ({started.run_id})", fontsize=11)
    figure.savefig(path, dpi=120, metadata={"Software": "Starling"})


def _curves(axes: Axes, rounds: Sequence[RoundRecord], places: Sequence[float], baselines: Mapping[str, float]) -> None:
    trained = [(place, record.loss) for place, record in zip(places, rounds, strict=True) if record.loss is not None]
    evaluated = [
        (place, record.metrics["loss"])
        for place, record in zip(places, rounds, strict=True)
        if record.metrics and "loss" in record.metrics
    ]
    for points, label, color in ((trained, "training loss", _TRAIN), (evaluated, "validation loss", _VALIDATION)):
        if points:
            marker = "o" if len(points) <= _MARKERS_UP_TO else None
            axes.plot(
                *zip(*points, strict=True), label=label, color=color, linewidth=1.8, marker=marker, markersize=3.5
            )
    spans = [
        (place, *record.spread["loss"]) for place, record in zip(places, rounds, strict=True) if "loss" in record.spread
    ]
    if spans:
        where, least, most = (list(column) for column in zip(*spans, strict=True))
        axes.fill_between(where, least, most, label="of single nodes", color=_VALIDATION, alpha=0.18, linewidth=0)
    for index, (name, value) in enumerate(baselines.items()):
        color = _BASELINES[index % len(_BASELINES)]
        label = f"{name.replace('_', ' ')} ({number_text(value)})"
        axes.axhline(value, label=label, color=color, linestyle="--", linewidth=1.3)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _spreads(rounds: Sequence[RoundRecord], baselines: Mapping[str, float]) -> bool:
    """Whether the losses cover orders of magnitude."""
    losses = [record.loss for record in rounds if record.loss is not None]
    losses += [record.metrics["loss"] for record in rounds if record.metrics and "loss" in record.metrics]
    shown = [*losses, *baselines.values()]
    return bool(losses) and min(shown) > 0 and max(shown) / min(shown) > _LOG_SCALE_FROM
