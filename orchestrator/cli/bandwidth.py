"""What ``starling bandwidth`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from starling.orchestrator.analysis import bandwidth
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from starling.orchestrator.config.schema import Config

_WORDS = {
    "data_parallel": "data-parallel",
    "diloco": "DiLoCo",
    "streaming": "streaming DiLoCo",
    "streaming_overlap": "  with overlap",
    "streaming_overlap_fp4": "  with overlap and FP4",
}


def print_preset(console: Console, name: str) -> dict[str, Any]:
    """The published table of a model; returns what ``--json`` says.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in bandwidth.PRESETS:
        known = ", ".join(bandwidth.PRESETS)
        raise ConfigError(f"--model {name}: there is no such model in the table (there are: {known})")
    preset, table = bandwidth.PRESETS[name], bandwidth.preset_table(name)
    count = preset.layers // preset.layers_per_fragment
    console.print(
        f"[bold cyan]{name}[/]: {preset.layers} layers, {preset.step_s:g} s a step, 2 nodes, "
        f"H = {preset.inner_steps} in {count} fragments; Gbit/s for a compute utilization of\n",
        highlight=False,
        soft_wrap=True,
    )
    _print_table(console, table)
    console.print(
        "\n[dim]As published (arXiv:2501.18512, table 4): the last point of a grid of factors of 1.2 that "
        "is below the target. FP4 is four bits both ways; the table of a configuration has bf16 on the way back.[/]",
        highlight=False,
        soft_wrap=True,
    )
    return {"status": "ok", "model": name, "targets": list(bandwidth.TARGETS), "table": table}


def print_workload(console: Console, config: Config) -> dict[str, Any]:
    """The same for the user's model, nodes and step time."""
    work = bandwidth.Workload.of(config)
    table = work.table()
    layout, network = work.layout, config.network
    console.print(
        f"[bold cyan]{escape(config.name)}[/]: {layout.num_values:,} parameters "
        f"({bytes_text(layout.nbytes + layout.buffer_nbytes)}), {config.num_nodes} nodes, {network.step_ms:g} ms a "
        f"step, H = {work.inner_steps} in {work.fragments} fragments, overlap of {work.overlap_steps} steps, "
        f"{network.latency_ms:g} ms latency; Gbit/s of each node's link for a compute utilization of\n",
        highlight=False,
        soft_wrap=True,
    )
    _print_table(console, table)
    answer: dict[str, Any] = {"status": "ok", "model": config.name, "targets": list(bandwidth.TARGETS)}
    if network.bandwidth_mbps is not None:
        shares = {method: work.utilization(method, network.bandwidth_mbps / 1000) for method in work.methods}
        answer["utilization"] = shares
        texts = ", ".join(f"{_WORDS[method].strip()} {share:.1%}" for method, share in shares.items())
        console.print(f"\nAt {network.bandwidth_mbps:g} Mbit/s: {texts}", highlight=False, soft_wrap=True)
    console.print(
        "\n[dim]The least with which it is reached, in the network of starling simulate: an access link for each node, "
        "the same each way.[/]",
        highlight=False,
        soft_wrap=True,
    )
    return answer | {"table": table}


def _print_table(console: Console, table: Mapping[str, Sequence[float | None]]) -> None:
    shown = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("")
    for target in bandwidth.TARGETS:
        shown.add_column(f"{target:.0%}", justify="right")
    for method, row in table.items():
        shown.add_row(_WORDS[method], *("never" if cell is None else _number(cell) for cell in row))
    console.print(shown)


def _number(gbit_s: float) -> str:
    """Three digits, without an exponent.

    >>> [_number(value) for value in (569.0, 1.4, 0.12345, 0.000123456)]
    ['569', '1.4', '0.123', '0.000123']
    """
    text = f"{gbit_s:.3g}"
    return text if "e" not in text else f"{gbit_s:.8f}".rstrip("0")
