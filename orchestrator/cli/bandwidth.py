"""The page of ``starling bandwidth``: traffic of a run, and the links it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from starling.orchestrator.analysis.bandwidth import TARGETS, Workload
from starling.orchestrator.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console

    from starling.orchestrator.config.schema import Config


def print_workload(console: Console, config: Config, rounds: int | None) -> dict[str, Any]:
    """Print the traffic of a configuration and the bandwidth it needs; return them as ``--json`` has them."""
    work = Workload(config, rounds)
    layout, network, per_round = work.layout, config.network, work.bytes_per_round
    console.print(
        f"[bold cyan]{escape(config.name)}[/]: {escape(config.algorithm.name)} of {layout.num_values:,} parameters "
        f"({bytes_text(layout.nbytes + layout.buffer_nbytes)}) on {config.num_nodes} nodes, {network.step_ms:g} ms a "
        f"step, {network.latency_ms:g} ms latency; {work.rounds} rounds in the simulator, without training:\n",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"  {bytes_text(per_round)} a round over all nodes, {seconds_text(work.seconds)} of computing")
    table = work.table()
    shown = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    shown.add_column("compute utilization")
    for target in TARGETS:
        shown.add_column(f"{target:.0%}", justify="right")
    shown.add_row("Gbit/s of each link", *("never" if cell is None else _number(cell) for cell in table))
    console.print(shown)
    answer: dict[str, Any] = {"status": "ok", "name": config.name, "algorithm": config.algorithm.name}
    answer |= {"rounds": work.rounds, "bytes_per_round": per_round, "seconds_per_round": work.seconds}
    answer |= {"targets": list(TARGETS), "gbit_s": table, "utilization": None}
    if network.bandwidth_mbps is not None:
        share = answer["utilization"] = work.utilization(network.bandwidth_mbps / 1000)
        console.print(f"\nAt {network.bandwidth_mbps:g} Mbit/s: {share:.1%}", highlight=False)
    return answer


def _number(gbit_s: float) -> str:
    """Three digits, without an exponent.

    >>> [_number(value) for value in (569.0, 1.4, 0.12345, 0.000123456)]
    ['569', '1.4', '0.123', '0.000123']
    """
    text = f"{gbit_s:.3g}"
    return text if "e" not in text else f"{gbit_s:.8f}".rstrip("0")
