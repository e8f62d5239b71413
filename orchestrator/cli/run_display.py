"""Views of a run: live on a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from starling.algorithms.api import SERVER
from starling.orchestrator.cli.terminal import LiveView, unfailing
from starling.orchestrator.config.schema import MLflowTracking
from starling.orchestrator.config.sections import without_password
from starling.orchestrator.records.event_text import told
from starling.orchestrator.records.observers import Observer
from starling.orchestrator.tracking.mlflow_tracker import is_recorded, link_of, store_of, ui_command
from starling.orchestrator.units import bytes_text, number_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console, RenderableType
    from rich.status import Status

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import RoundRecord, Started, Summary

_MAX_LINES = 200
"""Lines for rounds where there is no terminal; of longer runs every k-th round is shown."""

_MAX_EVENTS = 200
"""Lines about nodes that come and go; the run directory has all of them."""

_COMPARED = "loss"
"""The metric that a task's baselines belong to."""


def display(console: Console) -> Display:
    """Return the live view for a terminal, else the plain one."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class Display(Observer, LiveView):
    """Base of both views: the start, the notes and the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started: Started | None = None
        self._sent = 0
        self._num_told = 0
        self._began = time.monotonic()
        self.summary: Summary | None = None
        """Summary of the run, when it is over."""

    def open(self, config: Config, place: str) -> None:
        """Say that nodes are being started, in ``place``; it may take a while."""

    @unfailing
    def on_start(self, started: Started) -> None:
        self.stop()
        self._started = started
        self._began = time.monotonic()
        self._console.print(headline(started), soft_wrap=True, highlight=False)
        self._console.print(f"[dim]{escape(started.run_dir)}[/]", soft_wrap=True, highlight=False)
        for node in started.nodes:
            for warning in node.warnings:
                self.note(f"node {node.node}: {warning}")
        there, wanted = sum(node.node != SERVER for node in started.nodes), len(started.config.initial_nodes)
        if there < wanted and not started.virtual and started.config.cluster.nodes.target != "auto":
            self.note(f"there is room for {there} of {wanted} nodes; the others join when there is more (ray status)")
        self.begin(started)

    @unfailing
    def on_round(self, record: RoundRecord) -> None:
        assert self._started is not None
        self._sent += record.payload_bytes
        rounds = self._started.config.rounds
        before = -1 if self._started.resumed_after is None else self._started.resumed_after
        # Time of this machine, also for the simulator: it is this that one waits for.
        each_s = (time.monotonic() - self._began) / (record.round - before)
        self.show(self._started, record, each_s * (rounds - record.round - 1))

    @unfailing
    def on_event(self, event: Mapping[str, Any]) -> None:
        text = told(event)
        if text is None or self._started is None:
            return
        self._num_told += 1
        if self._num_told <= _MAX_EVENTS:
            self._console.print(f"[dim]· {escape(text)}[/]", soft_wrap=True, highlight=False)
        if self._num_told == _MAX_EVENTS:
            self.note("what else happens to nodes is in events.jsonl alone")

    def on_end(self, summary: Summary) -> None:
        self.summary = summary
        self.stop()

    def begin(self, started: Started) -> None:
        """Prepare to show rounds."""

    def show(self, started: Started, record: RoundRecord, left_s: float) -> None:
        """Show a round; ``left_s`` is how long the rest will take."""

    def stop(self) -> None:
        """Show nothing from now on."""

    @unfailing
    def note(self, text: str) -> None:
        """Say something in between."""
        self._console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)


class PlainDisplay(Display):
    """Prints a line for each round."""

    @unfailing
    def open(self, config: Config, place: str) -> None:
        self._console.print(_opening(config, place), highlight=False)

    def show(self, started: Started, record: RoundRecord, left_s: float) -> None:
        rounds = started.config.rounds
        done = record.round + 1
        if done % -(-rounds // _MAX_LINES) and done != rounds:
            return
        parts = [f"{done:,} of {_plural(rounds, 'round')} done"]
        if record.loss is not None:
            parts.append(f"loss {number_text(record.loss)}")
        if record.metrics:
            compared = _baselines(started.baselines)
            values = (
                f"{name} {number_text(value)}{f' ({compared})' if name == _COMPARED and compared else ''}"
                for name, value in record.metrics.items()
            )
            parts.append(f"eval {' '.join(values)}")
        if _COMPARED in record.spread:
            parts.append(f"of nodes {_span(record)}")
        parts += [f"{name} {_reported(values)}" for name, values in record.reported.items()]
        parts += [_nodes(record), bytes_text(record.payload_bytes), _duration(started, record)]
        if done < rounds:
            parts.append(f"ETA {seconds_text(left_s)}")
        self._console.print("  ".join(parts), soft_wrap=True, highlight=False, markup=False)


class LiveDisplay(Display):
    """Draws a progress bar and the latest values in place."""

    _live: Live | Status | None = None
    _metrics: Mapping[str, float] | None = None
    _evaluated: int = -1
    """Round of the displayed metrics; -1: none yet."""

    @unfailing
    def open(self, config: Config, place: str) -> None:
        self._live = self._console.status(_opening(config, place))
        self._live.start()

    def begin(self, started: Started) -> None:
        self._bar = Progress(
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} rounds done"),
            BarColumn(bar_width=40),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}[/]"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=started.config.rounds, left="")
        self._live = Live(self._bar, console=self._console, transient=True, refresh_per_second=8)
        self._live.start()

    def show(self, started: Started, record: RoundRecord, left_s: float) -> None:
        if record.metrics:
            self._metrics, self._evaluated = record.metrics, record.round
        self._bar.update(self._task, completed=record.round + 1, left=f"ETA {seconds_text(left_s)}")
        if isinstance(self._live, Live):
            self._live.update(Group(self._bar, self._values(started, record)))

    @unfailing
    def stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _values(self, started: Started, record: RoundRecord) -> RenderableType:
        table = _two_columns()
        if record.loss is not None:
            table.add_row("training loss", f"[bold]{number_text(record.loss)}[/]")
        for name, value in (self._metrics or {}).items():
            label = "validation loss" if name == _COMPARED else name
            age = f"  [dim]after round {self._evaluated}[/]" if self._evaluated < record.round else ""
            table.add_row(escape(label), f"[bold]{number_text(value)}[/]{_beside(name, started.baselines)}{age}")
        if _COMPARED in record.spread:
            table.add_row("of the nodes", _span(record))
        for name, values in record.reported.items():
            table.add_row(escape(name), _reported(values))
        counts = {"committed": record.nodes, "contributing": record.contributing, "in view": record.in_view}
        counts |= {"alive": record.alive, "late": record.late}
        table.add_row(
            "nodes", f"{', '.join(f'{n} {what}' for what, n in counts.items())} of {started.config.num_nodes}"
        )
        table.add_row("bytes", f"{bytes_text(self._sent)}  [dim]{bytes_text(record.payload_bytes)} in this round[/]")
        table.add_row("round", f"{_duration(started, record)}  [dim]{_phases(record)}[/]")
        return table


# --- the beginning and the end --------------------------------------------------------------------------------------


def _opening(config: Config, place: str) -> str:
    return f"starting {_plural(config.num_nodes, 'node')} {place} …"


def _nodes(record: RoundRecord) -> str:
    """Write the number of nodes that committed a round, of all."""
    if record.nodes == record.in_view == record.alive:
        return _plural(record.nodes, "node")
    late = f", {record.late} late" if record.late else ""
    return f"{record.nodes} of {_plural(record.in_view, 'node')} ({record.alive} alive{late})"


def headline(started: Started) -> str:
    """Write one line about the run that begins."""
    config = started.config
    devices = sorted({node.device for node in started.nodes})
    where = "simulated" if started.virtual else f"on {', '.join(devices)}"
    return (
        f"[bold]{escape(config.algorithm.name)}[/] on [bold]{escape(config.task.name)}[/]: "
        f"{_plural(len(started.nodes), 'node')} {where}, {started.layout.num_values:,} parameters, "
        f"{_plural(config.rounds, 'round')}"
        + ("" if started.resumed_after is None else f", {started.resumed_after + 1:,} of them done")
    )


def print_summary(console: Console, summary: Summary, config: Config) -> None:
    """Print the results of a run, and where they are recorded."""
    color = {"finished": "green", "failed": "red", "interrupted": "yellow"}[summary.status]
    rows = [("status", f"[bold {color}]{summary.status}[/] after {_plural(summary.rounds, 'round')}")]
    for name, value in summary.metrics.items():
        label = "validation loss" if name == _COMPARED else name
        rows.append((label, f"[bold]{number_text(value)}[/]{_beside(name, summary.baselines)}"))
    payload, per_round = summary.bytes["payload"] or 0, summary.bytes["per_round"] or 0
    rows.append(("bytes", f"{bytes_text(payload)} payload, {bytes_text(per_round)} per round"))
    transport, recovery = summary.bytes["transport"], summary.bytes["recovery"]
    if transport is not None:
        rows.append(("transport", f"{bytes_text(transport)} between processes"))
    if recovery:
        # A server's state is kept elsewhere after each of its rounds, whether or not anything is lost.
        reasons = ["for nodes that had missed something"] if summary.nodes["lost"] or summary.nodes["joined"] else []
        copies = ["of kept copies of the server"] if config.algorithm.has_server else []
        words = " and ".join(copies + reasons) or "for nodes that had missed something"
        rows.append(("recovery", f"{bytes_text(recovery)} {words}"))
    changes = (f"{what} {summary.nodes[what]}" for what in ("lost", "drained", "joined") if summary.nodes[what])
    rows.append(("nodes", ", ".join([f"{summary.nodes['started']} started", *changes])))
    rows.append(("samples", _samples(summary)))
    if summary.lost.get("residuals"):
        norm = number_text(summary.lost["residual_norm"])
        rows.append(("lost", f"{_plural(int(summary.lost['residuals']), 'residual')} of norm {norm}"))
    if summary.replicas is not None:
        rows.append(("replicas", f"{summary.replicas} at every commit"))
    virtual = "" if summary.virtual_seconds is None else f" ({seconds_text(summary.virtual_seconds)} virtual)"
    rows.append(("time", f"{seconds_text(summary.seconds)}{virtual}"))
    if summary.digest:
        rows.append(("digest", summary.digest))
    if summary.checkpoints is not None:
        rows.append(("checkpoints", _checkpoints(summary.checkpoints)))
    path = Path(summary.run_dir)
    if path.is_dir():
        rows.append(("run directory", escape(str(path))))
        if summary.status != "finished" and summary.checkpoints and summary.checkpoints["last_round"] >= 0:
            rows.append(("go on with", escape(f"starling resume {shlex.quote(str(path))}")))
        if (path / "curves.png").exists():
            rows.append(("curves", escape(str(path / "curves.png"))))
        if isinstance(config.tracking, MLflowTracking):
            rows += _tracked(config.tracking, path)
    for label, value in rows:
        # Paths and commands are there to be copied: never cut, never folded.
        console.print(f"[dim]{escape(label):<17}[/]{value}", soft_wrap=True, highlight=False)


def _tracked(tracking: MLflowTracking, path: Path) -> list[tuple[str, str]]:
    """Return rows about the tracker that records the run."""
    store = store_of(tracking, path)
    state = is_recorded(path)
    later = escape(f"starling track {shlex.quote(str(path))}")
    if state is None:
        return [("not tracked yet", f"{escape(without_password(store))} has nothing of it: {later}")]
    rows = [("tracked in", escape(without_password(store)))]
    if not state:
        rows.append(("but not all", later))
    command, link = ui_command(store), link_of(tracking, path)
    if command:
        rows.append(("look at it with", escape(command)))
    if link:
        rows.append(("and at" if command else "look at it at", escape(link)))
    return rows


def _checkpoints(counts: Mapping[str, int]) -> str:
    failed = f", {counts['failed']} could not be" if counts["failed"] else ""
    last = f", the last after round {counts['last_round']}" if counts["last_round"] >= 0 else ""
    return f"{counts['written']} written{failed}{last}"


def _samples(summary: Summary) -> str:
    counts = summary.samples
    if counts["drawn"] == counts["committed"] and not counts["lost"]:
        return f"{counts['drawn']:,} drawn and committed"
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count or what in ("drawn", "committed"))


def _two_columns() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ignore")
    return table


def _baselines(baselines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number_text(value)}" for name, value in baselines.items())


def _beside(name: str, baselines: Mapping[str, float]) -> str:
    text = _baselines(baselines) if name == _COMPARED else ""
    return f"  [dim]({escape(text)})[/]" if text else ""


def _duration(started: Started, record: RoundRecord) -> str:
    return f"{seconds_text(record.seconds)}{' virtual' if started.virtual else ''}"


def _span(record: RoundRecord) -> str:
    """Write the least and the greatest validation loss of the nodes' own models."""
    return " to ".join(number_text(value) for value in record.spread[_COMPARED])


def _reported(values: Mapping[str, float]) -> str:
    """Write the mean of a metric that nodes report, and where these differ the least and the greatest value."""
    least, most = number_text(values["min"]), number_text(values["max"])
    span = "" if least == most else f" ({least} to {most})"
    return f"{number_text(values['mean'])}{span}"


def _phases(record: RoundRecord) -> str:
    return f"{seconds_text(record.train_seconds)} training, {seconds_text(record.exchange_seconds)} exchange"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
