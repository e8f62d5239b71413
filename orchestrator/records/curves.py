"""Draws a run: training and validation loss over rounds, and over the bytes that were sent."""

from __future__ import annotations

from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

from starling.orchestrator import plots
from starling.orchestrator.units import bytes_unit, number_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from starling.orchestrator.records.observers import RoundRecord, Started

_MOST_REPORTED = 8
"""Metrics of programs that have axes of their own."""
_TRAIN, _VALIDATION, _BASELINES = plots.BLUE, plots.ORANGE, (plots.DARK, plots.GREEN, plots.PINK)


def draw(path: Path, started: Started, rounds: Sequence[RoundRecord]) -> None:
    """Draw the committed rounds into a png file."""
    names = list(dict.fromkeys(name for record in rounds for name in record.reported))[:_MOST_REPORTED]
    num_rows = 1 + -(-len(names) // 2)
    figure, (left, right, *others) = plots.canvas(11, 4.4 + 2.2 * (num_rows - 1), num_rows, 2)
    right.sharey(left)
    sent = list(accumulate(record.payload_bytes for record in rounds))
    scale, unit = bytes_unit(sent[-1])
    _curves(left, rounds, [record.round + 1 for record in rounds], started.baselines)
    _curves(right, rounds, [nbytes / scale for nbytes in sent], started.baselines)
    plots.count_along_x(left, "rounds done")
    left.set_ylabel("loss")
    right.set_xlabel(f"payload of all nodes, total ({unit})")
    if plots.is_wide([*_losses(rounds), *started.baselines.values()]):
        left.set_yscale("log")
    for axes, name in zip_longest(others, names):
        if name is None:
            axes.set_axis_off()
        else:
            _reported(axes, rounds, name)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    config = started.config
    nodes = f"{len(started.nodes)} node{'s' if len(started.nodes) != 1 else ''}"
    figure.suptitle(f"{config.algorithm.name} on {config.task.name}, {nodes}  ({started.run_id})", fontsize=11)
    plots.save(figure, path)


def _curves(axes: Axes, rounds: Sequence[RoundRecord], places: Sequence[float], baselines: Mapping[str, float]) -> None:
    trained = [(place, record.loss) for place, record in zip(places, rounds, strict=True) if record.loss is not None]
    evaluated = [
        (place, record.metrics["loss"])
        for place, record in zip(places, rounds, strict=True)
        if record.metrics and "loss" in record.metrics
    ]
    for points, label, color in ((trained, "training loss", _TRAIN), (evaluated, "validation loss", _VALIDATION)):
        if points:
            form = {"color": color, "linewidth": 1.8, "marker": plots.marker(points), "markersize": 3.5}
            axes.plot(*zip(*points, strict=True), label=label, **form)
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
    plots.style(axes)


def _reported(axes: Axes, rounds: Sequence[RoundRecord], name: str) -> None:
    """Draw the mean of a metric that programs report, and the span over nodes."""
    points = [(record.round + 1, record.reported[name]) for record in rounds if name in record.reported]
    places = [place for place, _ in points]
    form = {"color": plots.BLUE, "linewidth": 1.8, "marker": plots.marker(points), "markersize": 3.5}
    axes.plot(places, [values["mean"] for _, values in points], **form)
    least, most = ([values[kind] for _, values in points] for kind in ("min", "max"))
    axes.fill_between(places, least, most, color=plots.BLUE, alpha=0.18, linewidth=0)
    plots.count_along_x(axes, "rounds done")
    axes.set_ylabel(name)
    plots.style(axes)


def _losses(rounds: Sequence[RoundRecord]) -> list[float]:
    losses = [record.loss for record in rounds if record.loss is not None]
    return losses + [record.metrics["loss"] for record in rounds if record.metrics and "loss" in record.metrics]
