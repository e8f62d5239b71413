"""The picture of a sweep: a curve for each trial, and the objective over the values that were varied."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from starling.orchestrator import plots
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.sweeps.trial_thread import reports_of
from starling.orchestrator.sweeps.trials import TRIALS
from starling.orchestrator.units import number_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.sweeps.result import SweepResult
    from starling.orchestrator.sweeps.trials import Board, Objective, Trial

_BEST, _OTHER, _STOPPED, _FRONT = plots.ORANGE, plots.BLUE, plots.GREY, plots.GREEN
_MOST_PATHS = 3


def draw(path: Path, result: SweepResult, board: Board, config: Config) -> None:
    """Draw a sweep into a png file: curves, then the front, or the objective over what was varied."""
    objectives: Sequence[Objective] = list(board.objectives)
    paths = _numeric_paths(result)
    panels = 2 if len(objectives) > 1 or not paths else 1 + len(paths)
    figure, axes = plots.canvas(4.8 + 3.4 * (panels - 1), 4.2, 1, panels)
    _curves(axes[0], result, objectives[0])
    if len(objectives) > 1:
        _front(axes[1], result, objectives)
    else:
        for place, name in zip(axes[1:], paths, strict=False):
            _over(place, result, objectives[0], name)
    kinds = f"{len(result.rows)} samples of {result.options.space}"
    figure.suptitle(f"{config.algorithm.name} on {config.task.name}: {kinds}  ({result.sweep_dir.name})", fontsize=11)
    plots.save(figure, path)


def _numeric_paths(result: SweepResult) -> list[str]:
    """Return the keys of the space that hold numbers, the first few."""
    first = result.trials[0].values
    return [name for name, value in first.items() if isinstance(value, int | float)][:_MOST_PATHS]


def _is_best(result: SweepResult, trial: Trial) -> bool:
    return result.best is not None and trial in result.best.trials


def _curves(axes: Axes, result: SweepResult, objective: Objective) -> None:
    values: list[float] = []
    for trial in sorted(result.trials, key=lambda one: _is_best(result, one)):
        points = [
            (report["rounds"], report[objective.metric])
            for report in _reports(result, trial)
            if _has(report, objective)
        ]
        if not points or trial.stage != "search":
            continue
        best = _is_best(result, trial)
        color = _BEST if best else _STOPPED if trial.end != "finished" else _OTHER
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            linewidth=2.2 if best else 1.0,
            marker="o",
            markersize=3,
            alpha=1.0 if best else 0.6,
        )
        values += [value for _, value in points]
    plots.count_along_x(axes, "rounds done")
    axes.set_ylabel(objective.metric)
    _scale(axes, values)
    for label, color in (("best", _BEST), ("finished", _OTHER), ("stopped", _STOPPED)):
        axes.plot([], [], color=color, label=label)
    axes.legend(frameon=False, fontsize=8)


def _reports(result: SweepResult, trial: Trial) -> list[dict[str, Any]]:
    """Return the report of each evaluated round; the board has only those that were asked for in time."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ConfigError):
        found = reports_of(result.sweep_dir / TRIALS / trial.name)
    return max(found, trial.reports, key=len)


def _over(axes: Axes, result: SweepResult, objective: Objective, name: str) -> None:
    for row in result.rows:
        color = _BEST if row == result.best else _OTHER if row.first.end == "finished" else _STOPPED
        axes.plot(row.first.values[name], row.means[objective.metric], "o", color=color, markersize=5)
    axes.set_xlabel(name)
    axes.set_ylabel(objective.metric)
    _scale(axes, [row.means[objective.metric] for row in result.rows], [row.first.values[name] for row in result.rows])


def _front(axes: Axes, result: SweepResult, objectives: Sequence[Objective]) -> None:
    first, second = objectives[0].metric, objectives[1].metric
    rows = [row for row in result.rows if second in row.means]
    for row in rows:
        inside = row in result.front
        color = _FRONT if inside else _STOPPED if row.first.end != "finished" else _OTHER
        axes.plot(row.means[second], row.means[first], "o", color=color, markersize=6 if inside else 4)
    points = sorted((row.means[second], row.means[first]) for row in result.front)
    if points:
        axes.plot(*zip(*points, strict=True), color=_FRONT, linewidth=1.2, label="Pareto front")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    _scale(axes, [row.means[first] for row in rows], [row.means[second] for row in rows])


def _has(report: dict[str, object], objective: Objective) -> bool:
    return isinstance(report.get(objective.metric), int | float)


def _scale(axes: Axes, up: Sequence[float], along: Sequence[float] = ()) -> None:
    """Choose the scales for values along both axes."""
    if plots.is_wide(up):
        axes.set_yscale("log")
    if plots.is_wide(along):
        axes.set_xscale("log")
    plots.style(axes)


def label(value: object) -> str:
    """Write a value of a sample for a table."""
    return number_text(value) if isinstance(value, float) else str(value)
