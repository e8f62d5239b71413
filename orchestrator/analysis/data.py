"""The division of a task's data over nodes, counted by label, printed and drawn for ``starling data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from starling.actors.data.row_groups import UNREADABLE
from starling.actors.data.samples import Samples
from starling.actors.host.build import load_data
from starling.orchestrator.config.reference import written
from starling.orchestrator.runtimes.user_code import user_code
from starling.orchestrator.units import number_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from starling.actors.data import Indices
    from starling.orchestrator.config.schema import Config

_MAX_COLUMNS = 12
"""Labels that are shown by themselves; the rarer ones are counted together."""
_MAX_ROWS = 64
_NUMBERS_UP_TO = 24
"""Nodes in a picture whose cells have their number written in them."""


@dataclass(frozen=True)
class DataReport:
    """Counts of samples by node and label."""

    name: str
    task: str
    source: str
    partition: str
    num_nodes: int
    labels: list[str]
    """Names of the columns; without labels the one column ``samples``."""
    counts: list[list[int]]
    """Row by row of nodes, a column for each label."""
    validation: int
    has_labels: bool
    reading: dict[str, str]
    """Counts of data that are read, and that are left out, in the task's words."""

    @property
    def sizes(self) -> list[int]:
        """Samples of each node."""
        return [sum(row) for row in self.counts]

    @property
    def skew(self) -> float | None:
        """Mean total variation distance, 0 to 1, between a node's labels and all labels; None without labels."""
        if not self.has_labels:
            return None
        table = torch.tensor(self.counts, dtype=torch.float64)
        overall = table.sum(0) / table.sum()
        return float(((table / table.sum(1, keepdim=True)) - overall).abs().sum(1).mean() / 2)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "task": self.task,
            "source": self.source,
            "partition": self.partition,
            "nodes": self.num_nodes,
            "labels": self.labels,
            "counts": self.counts,
            "samples": self.sizes,
            "validation": self.validation,
            "label_skew": self.skew,
            "reading": self.reading,
        }


def measure(config: Config) -> DataReport:
    """Load the task's data and divide them, as a run would.

    Raises:
        StarlingError: they cannot be read or divided.
    """
    num_nodes = config.num_nodes
    with user_code(0, 0):
        data = load_data(config.task, config.data, num_nodes, config.seed)
        parts = list(data.parts)
        labels, names = _labels(data.train)
        reading = config.task.reading()
    if labels is None:
        counts = [[len(part)] for part in parts]
        names = ["samples"]
    else:
        counts = [row.tolist() for row in _counted(labels, parts, config.data.source, len(names))]
        counts, names = _cut_short(counts, names)
    return DataReport(
        name=config.name,
        task=config.task.name,
        source=config.data.source,
        partition=_partition(config, data.train),
        num_nodes=num_nodes,
        labels=names,
        counts=counts,
        validation=len(data.validation),
        has_labels=labels is not None,
        reading=reading,
    )


def _partition(config: Config, train: Samples) -> str:
    if config.data.source == "federated" or train.owners is not None:
        return "by owner"
    partition = config.data.partition
    usual = {name for name in ("min_samples", "balanced") if name not in partition.model_fields_set}
    return written(partition, usual)


def _labels(train: Samples) -> tuple[torch.Tensor | None, list[str]]:
    """Return the label of each sample as a number, None without labels, and the name of each number."""
    labels: torch.Tensor | None = getattr(train, "labels", None)
    if labels is None:
        return None, []
    values, numbers = labels.unique(return_inverse=True)
    known: Sequence[str] | None = getattr(train, "class_names", None)
    names = dict(enumerate(known or ()))
    if hasattr(train, "present"):
        names[UNREADABLE] = "unreadable"
    return numbers, [names.get(value, str(value)) for value in values.tolist()]


def _counted(labels: torch.Tensor, parts: Sequence[Indices], source: str, num_labels: int) -> Sequence[torch.Tensor]:
    if source == "federated":  # labels are in the order of the nodes
        pieces = labels.split([len(part) for part in parts])
    else:
        pieces = [labels[part if isinstance(part, torch.Tensor) else part[torch.arange(len(part))]] for part in parts]
    return [torch.bincount(piece, minlength=num_labels) for piece in pieces]


def _cut_short(counts: list[list[int]], names: list[str]) -> tuple[list[list[int]], list[str]]:
    """Keep the most frequent labels; count the others together."""
    if len(names) <= _MAX_COLUMNS:
        return counts, names
    table = torch.tensor(counts)
    common = table.sum(0).argsort(descending=True, stable=True)[: _MAX_COLUMNS - 1].sort().values
    rest = table.sum(1) - table[:, common].sum(1)
    shown = torch.cat([table[:, common], rest.unsqueeze(1)], dim=1)
    return shown.tolist(), [*(names[place] for place in common.tolist()), f"{len(names) - len(common)} others"]


# --- printed ----------------------------------------------------------------------------------------------------------


def print_report(console: Console, report: DataReport, plot: Path | None) -> None:
    """Print the table, and draw it into ``plot`` if that is given.

    Raises:
        ConfigError: ``plot`` cannot be written.
    """
    if plot is not None:
        draw(report, plot)
    title = f"[bold]{escape(report.name)}[/]: {escape(report.task)}, {report.source}, {escape(report.partition)}"
    console.print(f"{title}, over {report.num_nodes} node{'s' * (report.num_nodes != 1)}\n", highlight=False)
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 1), pad_edge=False)
    table.add_column("node", justify="right")
    for label in report.labels if report.has_labels else ():
        table.add_column(escape(label), justify="right")
    table.add_column("samples", justify="right")
    for node, row in list(enumerate(report.counts))[:_MAX_ROWS]:
        cells = [f"[dim]{'·'}[/]" if not count else f"{count:,}" for count in row] if report.has_labels else []
        table.add_row(f"[cyan]{node}[/]", *cells, f"[bold]{sum(row):,}[/]")
    if report.num_nodes > _MAX_ROWS:
        table.add_row("…", *("…" for _ in range(len(table.columns) - 1)))
    totals = [sum(column) for column in zip(*report.counts, strict=True)]
    table.add_row("[dim]all[/]", *(f"[dim]{one:,}[/]" for one in totals if report.has_labels), f"{sum(totals):,}")
    console.print(table)
    sizes = report.sizes
    lines = {"per node": f"{min(sizes):,} to {max(sizes):,} samples", "held out": f"{report.validation:,}"}
    if report.skew is not None:
        lines["label skew"] = f"{number_text(report.skew)} (mean total variation distance; 0: every node as the whole)"
    lines |= report.reading
    console.print()
    for label, value in lines.items():
        console.print(f"  [dim]{label:<10}[/] {escape(value)}", highlight=False, soft_wrap=True)
    if plot is None:
        console.print("\n[dim]--plot FILE draws it.[/]", highlight=False, soft_wrap=True)


# --- drawn ------------------------------------------------------------------------------------------------------------


def draw(report: DataReport, path: Path) -> None:
    """Draw the table into a file: above, how many samples each node has; below, of which labels.

    Raises:
        ConfigError: the file cannot be written.
    """
    from starling.orchestrator import plots

    counts = np.array(report.counts).T
    width = min(16.0, max(6.0, 0.55 * report.num_nodes + 2.5))
    height = (0.4 * len(report.labels) + 1.2 if report.has_labels else 0.0) + 2.6
    ratios = [1.2, max(1.0, 0.36 * len(report.labels))] if report.has_labels else [1.0]
    figure, (bars, *more) = plots.canvas(width, height, len(ratios), sharex=True, height_ratios=ratios)
    bars.bar(range(report.num_nodes), report.sizes, color=plots.BLUE, width=0.8)
    bars.set_ylabel("samples")
    bars.spines[["top", "right"]].set_visible(False)
    last = bars
    for last in more:
        image = last.imshow(counts, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        last.set_yticks(range(len(report.labels)), report.labels)
        last.set_ylabel("label")
        if report.num_nodes <= _NUMBERS_UP_TO:
            top = max(1, int(counts.max()))
            for label, node in zip(*np.nonzero(counts), strict=True):
                color = "white" if counts[label, node] > 0.55 * top else "#333333"
                text = f"{counts[label, node]}"
                last.text(node, label, text, ha="center", va="center", color=color, fontsize=7.5)
        else:
            figure.colorbar(image, ax=last, label="samples", pad=0.01)
    plots.count_along_x(last, "node", min(report.num_nodes, 20))
    last.set_xlim(-0.6, report.num_nodes - 0.4)
    figure.suptitle(f"{report.task}: {report.partition}, {report.num_nodes} nodes", fontsize=11)
    plots.save_plot(figure, path)
