"""Tables of ``starling check``, ``starling algorithms`` and their like."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from starling.orchestrator.analysis.estimates import span
from starling.orchestrator.units import bytes_text, number_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from starling.orchestrator.analysis.plan import Plan
    from starling.orchestrator.checkpoints.export import Exported
    from starling.orchestrator.config.reference import Description, FieldDescription
    from starling.orchestrator.records.rebuild import Rebuilt

_MAX_WIDTH = 120


def print_plan(console: Console, plan: Plan) -> None:
    """Print the plan of a valid configuration."""
    console.print(f"[bold]{escape(plan.name)}[/]: {escape(plan.algorithm)} on {escape(plan.task)}, as configured:\n")
    samples = plan.samples
    processes = "" if plan.actors == plan.nodes else f" in {plan.actors} processes"
    rows = {
        "runs": " or ".join(
            {"cluster": "starling run", "simulator": "starling simulate"}[one] for one in plan.runtimes
        ),
        "nodes": f"{plan.nodes}{processes}",
        "needs": f"{plan.num_cpus:g} CPUs and {plan.num_gpus:g} GPUs of the cluster",
        "samples": f"{samples['training']:,}, {_range(samples)} per node; {samples['validation']:,} held out",
        **plan.reading,
        "parameters": f"{plan.parameters:,}, {bytes_text(plan.model_bytes)}",
        "rounds": f"{plan.rounds:,}{_steps(plan)}, in batches of {plan.batch_size}",
        "optimizer": plan.schedule,
        "bytes": _payload(plan.payload_bytes),
        "evaluations": f"{plan.evaluations:,}",
    }
    memory, seconds = plan.estimate["node_bytes"], plan.estimate["simulation_s"]
    rows["memory"] = f"{bytes_text(memory)} per node and what the algorithm keeps; activations not counted"
    if seconds is not None:
        step = plan.estimate["step_s"]
        rows["time"] = f"some {span(seconds)} of training in the simulator here, at {span(step)} for a step"
    if plan.baselines:
        rows["baselines"] = ", ".join(f"{name} {number_text(value)}" for name, value in plan.baselines.items())
    for label, value in rows.items():
        console.print(f"  [dim]{label:<12}[/] {escape(value)}", soft_wrap=True, highlight=False)
    for warning in plan.warnings:
        console.print(f"  [yellow]{'warning':<12}[/] {escape(warning)}", soft_wrap=True, highlight=False)


def _steps(plan: Plan) -> str:
    """Optimizer steps in a round."""
    if plan.steps_per_round is None or not plan.steps_per_round["most"]:
        return ""
    steps = f" of {_range(plan.steps_per_round)} steps"
    if plan.node_rounds == 1:
        return f"{steps} per node"
    return f" of the server; in each a node does {plan.node_rounds:.3g} of its own{steps}"


def _payload(sent: Mapping[str, int] | None) -> str:
    if sent is None:
        return "not known in advance: the algorithm does not define expected_bytes; runs count what they send"
    per_round, total = bytes_text(sent["per_round"]), bytes_text(sent["total"])
    return f"{per_round} payload per round over all nodes, {total} in all, without losses"


def _range(least_and_most: Mapping[str, int]) -> str:
    least, most = least_and_most["least"], least_and_most["most"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def print_rebuilt(console: Console, rebuilt: Rebuilt) -> None:
    """Print the facts of a model rebuilt from the log of rounds."""
    start = "the first model" if rebuilt.since is None else f"the snapshot after round {rebuilt.since}"
    compared = f"{rebuilt.checked} in the log, all equal" if rebuilt.checked else "none in the log to compare with"
    rows = {
        "run": rebuilt.run_id,
        "round": f"{rebuilt.round}, {rebuilt.replayed:,} rounds from {start}",
        "digest": rebuilt.digest,
        "digests": compared,
        "time": f"{rebuilt.seconds:.2f} s",
    }
    for label, value in rows.items():
        console.print(f"  [dim]{label:<12}[/] {escape(value)}", soft_wrap=True, highlight=False)


def print_exported(console: Console, exported: Exported) -> None:
    """Print the facts of an exported model."""
    which = "the final model" if exported.round is None else f"the model of the checkpoint of round {exported.round}"
    mean = f", the mean of {exported.nodes} nodes'" if (exported.nodes or 0) > 1 else ""
    rows = {"run": exported.run_id, "model": which + mean, "digest": exported.digest, exported.format: exported.path}
    for label, value in rows.items():
        console.print(f"  [dim]{label:<12}[/] {escape(value)}", soft_wrap=True, highlight=False)


def print_names(console: Console, hint: str, names: Mapping[str, str]) -> None:
    """Print the parts of a family, a line each, and a hint."""
    table = _table("name", "")
    for name, summary in names.items():
        table.add_row(f"[bold cyan]{escape(name)}[/]", escape(summary))
    console.print(table, width=min(console.width, _MAX_WIDTH))
    console.print(f"\n[dim]{hint}[/]", highlight=False)


def print_description(console: Console, family: str, description: Description) -> None:
    """One part, in full."""
    width = min(console.width, _MAX_WIDTH)
    title = f"[bold cyan]{escape(description.name)}[/]  {_prose(description.summary)}"
    console.print(title, width=width, highlight=False)
    for block in _blocks(description.text):
        console.print()
        _print_block(console, block, width)
    if description.fields:
        console.print()
        console.print(_fields(family, description.fields), width=width)
    for field, members in description.choices.items():
        if len(members) > 1:
            console.print(f"\n[bold]{family}.{escape(field)}[/] is one of", highlight=False)
            for name, fields in members.items():
                values = ", ".join(f"{one.name}: {_default(one)}" for one in fields)
                console.print(f"  [cyan]{escape(name):<10}[/] [dim]{escape(values)}[/]", width=width, highlight=False)
    for title, text in description.sections.items():
        console.print(f"\n[bold]{title}[/]")
        sentence = text[:1].upper() + text[1:] if text[1:2].islower() else text  # but not a symbol: "x is shared state"
        console.print(Padding(_prose(sentence), (0, 2)), width=width, highlight=False)


def _blocks(text: str) -> list[str]:
    """Paragraphs, list items and formulas."""
    return [block for part in text.split("\n\n") for block in re.split(r"\n(?=\* )", part) if block.strip()]


def _print_block(console: Console, block: str, width: int) -> None:
    if all(line.startswith("    ") for line in block.splitlines()):
        # A formula, laid out by hand.
        console.print(Text(block.replace("``", "")), soft_wrap=True)
    elif block.startswith("* "):
        console.print(Padding(_prose(f"• {' '.join(block[2:].split())}"), (0, 2)), width=width, highlight=False)
    else:
        console.print(Padding(_prose(" ".join(block.split())), (0, 2)), width=width, highlight=False)


def _prose(text: str) -> str:
    """Turn the text of a docstring into markup."""
    return re.sub(r"``(.+?)``", r"[cyan]\1[/]", escape(text))


def _fields(family: str, fields: Sequence[FieldDescription]) -> Table:
    table = _table(f"{family}.", "type", "default", "meaning")
    for field in fields:
        default = "[red]required[/]" if field.required else escape(_default(field))
        table.add_row(f"[cyan]{escape(field.name)}[/]", escape(field.type), default, escape(field.description))
    return table


def _default(field: FieldDescription) -> str:
    value = field.default
    if isinstance(value, dict):
        name = value.get("name")
        inner = ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items() if key != "name")
        return f"{name} ({inner})" if name and inner else str(name or f"{{{inner}}}")
    return _scalar(value)


def _scalar(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    return table
