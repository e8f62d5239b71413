"""Views of a sweep: a line for each trial that is over, a live view on a terminal, a table at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from starling.orchestrator.cli.terminal import LiveView, unfailing
from starling.orchestrator.sweeps.plots import label
from starling.orchestrator.sweeps.trials import Row
from starling.orchestrator.sweeps.tune import Watcher
from starling.orchestrator.units import bytes_text, number_text, seconds_text

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from starling.orchestrator.sweeps.options import Options
    from starling.orchestrator.sweeps.result import SweepResult
    from starling.orchestrator.sweeps.trials import Board, Trial

_MAX_LINES = 200
_WIDEST = 1000
_MAX_ROWS = 20
"""Rows of the table at the end; results.csv has all."""


class SweepDisplay(Watcher, LiveView):
    """Prints a line for each trial that is over; on a terminal also shows the progress of the others."""

    def __init__(self, console: Console, board: Board, options: Options, folder: Path) -> None:
        self._console, self._board, self._options = console, board, options
        self._total = options.samples * options.seeds
        self._running: dict[int, Trial] = {}
        self._began = time.monotonic()
        self._done_before = sum(trial.end is not None for trial in board.trials.values())
        self._live: Live | None = None
        by = "" if options.scheduler == "none" else f", {options.scheduler}"
        where = "in the simulator" if options.simulate else "on the cluster"
        print_line(
            console,
            f"sweep of [bold]{escape(options.space)}[/]: {options.samples} samples"
            f"{f' × {options.seeds} seeds' if options.seeds > 1 else ''} {where}, {options.search}{by}",
        )
        print_line(console, f"[dim]{escape(str(folder))}[/]")
        if self._done_before:
            print_line(console, f"{self._done_before} trials are over already")
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("trial {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=40),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[left]}[/]"),
                console=console,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._done_before, left="")
            self._live = Live(self._bar, console=console, transient=True, refresh_per_second=4)
            self._live.start()

    @unfailing
    def stop(self) -> None:
        """Show nothing from now on."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    @unfailing
    def note(self, text: str) -> None:
        """Say something in between."""
        print_line(self._console, f"[yellow]warning:[/] {escape(text)}")

    @unfailing
    def on_trial_start(self, trial: Trial) -> None:
        self._running[trial.number] = trial
        self._update()

    @unfailing
    def on_report(self, trial: Trial) -> None:
        self._update()

    @unfailing
    def on_trial_end(self, trial: Trial) -> None:
        self._running.pop(trial.number, None)
        stage = [one for one in self._board.trials.values() if one.stage == trial.stage]
        done = sum(one.end is not None for one in stage)
        total = self._total if trial.stage == "search" else len(stage)
        step = -(-total // _MAX_LINES)
        if done % step == 0 or done == total:
            print_line(self._console, self._line(trial, done, total))
        self._update()

    def _line(self, trial: Trial, done: int, total: int) -> str:
        color = {"finished": "green", "stopped": "dim", "failed": "red"}.get(trial.end or "", "yellow")
        what = "trial" if trial.stage == "search" else "on the cluster:"
        parts = [f"{what} {done}/{total}", f"[{color}]{trial.end}[/] after {trial.rounds} rounds"]
        parts += [f"{name} {_text(name, trial.value(name))}" for name in self._board.metrics]
        if trial.error:
            parts.append(escape(trial.error))
        parts.append(f"[dim]{escape(_values(trial))}[/]")
        if done < total:
            elapsed = time.monotonic() - self._began
            parts.append(f"ETA {seconds_text(elapsed / max(1, done - self._done_before) * (total - done))}")
        return "  ".join(parts)

    def _update(self) -> None:
        if self._live is None:
            return
        done = sum(one.end is not None for one in self._board.of_stage("search"))
        best = self._board.best()
        text = "" if best is None else f"best {self._board.metrics[0]} {_mean(best, self._board.metrics[0])}"
        self._bar.update(self._task, completed=done, left=text)
        table = Table.grid(padding=(0, 2))
        for trial in self._running.values():
            metric = self._board.metrics[0]
            table.add_row(
                f"[dim]trial {trial.number}[/]",
                f"{trial.rounds} rounds done",
                f"{metric} {_text(metric, trial.value(metric))}",
                f"[dim]{escape(_values(trial))}[/]",
            )
        self._live.update(Group(self._bar, table))


def print_result(console: Console, result: SweepResult) -> None:
    """Print the results of a sweep, and where they are recorded."""
    metrics = [one.metric for one in result.options.objectives]
    shown = list(dict.fromkeys([*metrics, "bytes"]))
    table = Table(box=None, padding=(0, 2), show_edge=False, header_style="dim")
    for name in ("", "trial", *shown, "rounds", "status"):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    paths = list(result.trials[0].values) if result.trials else []
    for path in paths:
        table.add_column(escape(path), justify="right", no_wrap=True)
    confirmed = {row.first.of: row for row in result.confirmed}
    if confirmed:
        table.add_column("on the cluster", justify="right", no_wrap=True)
    for place, row in enumerate(result.rows[:_MAX_ROWS]):
        mark = "[bold green]*[/]" if row == result.best else "[green]·[/]" if row in result.front else ""
        first = row.first
        cells = [mark, str(first.number), *(_mean(row, name) for name in shown), str(first.rounds), first.end or ""]
        cells += [label(first.values.get(path, "")) for path in paths]
        if confirmed:
            there = confirmed.get(first.number)
            cells.append("" if there is None else f"{_mean(there, metrics[0])}{_same(row, there)}")
        table.add_row(*cells, style="bold" if place == 0 else None)
    if result.rows:
        # As wide as it is: a terminal folds it, a file keeps it.
        width = console.width
        console.width = _WIDEST
        console.print(table, highlight=False)
        console.width = width
    more = len(result.rows) - _MAX_ROWS
    if more > 0:
        print_line(console, f"[dim]and {more} more in results.csv[/]")
    counts: dict[str, int] = {}
    for trial in result.trials:
        counts[trial.end or "unfinished"] = counts.get(trial.end or "unfinished", 0) + 1
    color = {"finished": "green", "failed": "red", "interrupted": "yellow"}[result.status]
    lines = [("status", f"[bold {color}]{result.status}[/]: {', '.join(f'{n} {end}' for end, n in counts.items())}")]
    if result.front:
        lines.append(("Pareto front", f"{len(result.front)} samples, marked · and *"))
    lines.append(("time", seconds_text(result.seconds)))
    lines.append(("sweep directory", escape(str(result.sweep_dir))))
    if (result.sweep_dir / "sweep.png").exists():
        lines.append(("picture", escape(str(result.sweep_dir / "sweep.png"))))
    if result.best is not None:
        lines.append(("run the best", f"starling run {escape(str(result.best_config))}"))
    if result.status == "interrupted":
        lines.append(("go on with", f"starling sweep --resume {escape(str(result.sweep_dir))}"))
    for name, value in lines:
        print_line(console, f"[dim]{name:<17}[/]{value}")


def print_line(console: Console, text: str) -> None:
    """Never cut, never folded."""
    console.print(text, soft_wrap=True, highlight=False)


def _same(row: Row, there: Row) -> str:
    """Write whether the trials of two rows have equal digests."""
    digests = [{(trial.summary or {}).get("digest") for trial in one.trials} for one in (row, there)]
    return " (same digest)" if digests[0] == digests[1] and None not in digests[0] else ""


def _values(trial: Trial) -> str:
    return " ".join(f"{path}={label(value)}" for path, value in trial.values.items())


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return bytes_text(value) if name == "bytes" else number_text(value)


def _mean(row: Row, name: str) -> str:
    spread = f" ±{number_text(row.deviations[name])}" if row.deviations.get(name) and name != "bytes" else ""
    return _text(name, row.means.get(name)) + spread
