"""Methods that communicate little on a small language model: losses, bytes, and how long they take on slow links.

``python benchmarks/low_communication.py`` writes ``docs/low_communication.md`` and its picture. Each method is trained
once, which gives its losses and bytes, and run once more for each bandwidth with a task of the same size that computes
nothing, which gives its time: neither depends on the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from actors.tasks.text_lm import TextLM
from orchestrator.config import parse
from orchestrator.controller import Controller
from orchestrator.records import Observer, RoundRecord
from orchestrator.simulator import Simulator
from orchestrator.units import bytes_text

PAGE = Path(__file__).parents[1] / "docs" / "low_communication.md"
NODES = 4
PERIOD = 24
"""Steps between two exchanges of the same values."""
PERIODS = 16
STEP_MS = 100
"""Of a node: what a GPU needs for a model that fills it."""
MBITS = (10, 100, 1000)

MODEL = {"layers": 2, "width": 32, "heads": 2}
CONTEXT, BATCH = 32, 16
LEARNING_RATE = 8e-3

OUTER = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
WHOLE = {"codec": "identity", "result_codec": "identity"}
STREAMING = {"name": "streaming_diloco", "inner_steps": PERIOD, "fragments": 2, "overlap_steps": 2, "outer": OUTER}

METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "data-parallel": ({"name": "ddp", "inner_steps": PERIOD}, PERIOD),
    "DiLoCo": ({"name": "diloco", "inner_steps": PERIOD, "outer": OUTER}, PERIOD),
    "streaming": (STREAMING | WHOLE, PERIOD // 2),
    "streaming, FP4": (STREAMING, PERIOD // 2),
    "EDiT": ({"name": "edit", "inner_steps": PERIOD}, PERIOD),
    "single merge": ({"name": "single_merge", "steps": PERIOD // 2}, PERIOD // 2),
}
"""By name: the algorithm, and the steps of one of its rounds."""


class Weightless(TextLM):
    """The same model and windows, and no gradient: only bytes and time."""

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(parameters), parameters.new_zeros(len(parameters))


@dataclass
class Measured(Observer):
    """What comes of a method."""

    loss: float = 0.0
    payload: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    """By Mbit/s."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(share of the run, validation loss)."""
    rounds: int = 1

    def on_round(self, record: RoundRecord) -> None:
        if record.metrics:
            self.curve.append(((record.round + 1) / self.rounds, record.metrics["loss"]))


def _run(task: str, algorithm: Mapping[str, Any], steps: int, watch: Measured, **network: Any) -> Any:
    watch.rounds = PERIOD * PERIODS // steps
    timing = bool(network)
    config = parse(
        {
            "rounds": watch.rounds,
            "algorithm": dict(algorithm),
            "task": {"name": task, "model": MODEL, "context": CONTEXT},
            "data": {"batch_size": BATCH},
            "optimizer": {
                "name": "sgd" if timing else "adamw",
                "lr": LEARNING_RATE,
                "schedule": {"name": "cosine", "warmup_steps": PERIOD},
                "grad_clip": None if timing else 1.0,
            },
            "evaluation": {"every_rounds": 0 if timing else 4 * PERIOD // steps, "max_batches": 1 if timing else 8},
            "cluster": {"nodes": {"target": NODES}},
            "network": {"step_ms": STEP_MS} | network,
            "tracking": "none",
        }
    )
    runtime = Simulator(config)
    try:
        return Controller(config, runtime, watch, run_id="benchmark", run_dir="").run()
    finally:
        runtime.close()


def measure(name: str) -> Measured:
    algorithm, steps = METHODS[name]
    found = Measured()
    summary = _run("text_lm", algorithm, steps, found)
    found.loss, found.payload = summary.metrics["loss"], summary.bytes["payload"]
    for mbit in MBITS:
        timed = _run("benchmarks.low_communication:Weightless", algorithm, steps, Measured(), bandwidth_mbps=mbit)
        assert timed.bytes["payload"] == found.payload
        found.seconds[mbit] = timed.virtual_seconds
    return found


HEAD = f"""# Methods that communicate little

Written by `python benchmarks/low_communication.py`, in the simulator: a transformer of 35 thousand parameters on
Python's standard library, {NODES} nodes, {PERIOD * PERIODS} steps of each
({PERIOD * PERIODS * NODES * BATCH * CONTEXT / 1e6:.1f} million bytes of text in all), {STEP_MS} ms a step, AdamW with
the same learning rate for all. Streaming exchanges two fragments with an overlap of two steps; a single merge mixes
with a fifth of a neighbour in a round of {PERIOD // 2} steps.

| method | validation loss | against data-parallel | sent | {" | ".join(f"{mbit} Mbit/s" for mbit in MBITS)} |
|---|---:|---:|---:|{"---:|" * len(MBITS)}
"""

TAIL = f"""
The last columns are virtual seconds; computing alone takes {PERIOD * PERIODS * STEP_MS / 1000:g}.

In so short a run nothing that communicates little reaches the loss of data-parallel training; published runs have
hundreds of times as many steps. What four bits cost is the difference between the two lines of streaming.

![Validation loss over virtual time, one panel for each bandwidth](low_communication.png)

The bandwidth that a run of yours needs is what [`starling bandwidth`](cli.md) prints.
"""


def write(found: Mapping[str, Measured]) -> None:
    base = found["data-parallel"].loss
    lines = [
        f"| {name} | {one.loss:.3f} | {one.loss / base - 1:+.1%} | {bytes_text(one.payload)} | "
        + " | ".join(f"{one.seconds[mbit]:,.1f}" for mbit in MBITS)
        + " |\n"
        for name, one in found.items()
    ]
    PAGE.write_text(HEAD + "".join(lines) + TAIL, encoding="utf-8")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, mbit in enumerate(MBITS):
        axes = figure.add_subplot(1, len(MBITS), place + 1)
        for name, one in found.items():
            axes.plot(
                [share * one.seconds[mbit] for share, _ in one.curve], [loss for _, loss in one.curve], label=name
            )
        axes.set_xscale("log")
        axes.set_xlabel("virtual seconds")
        axes.set_title(f"{mbit} Mbit/s", fontsize=10)
        if place == 0:
            axes.set_ylabel("validation loss, nats per byte")
            axes.legend(fontsize=8)
    figure.savefig(PAGE.with_suffix(".png"), dpi=110, metadata={"Software": "Starling"})
    print(f"written: {PAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=METHODS, action="append", help="Measure these alone, and write no page.")
    parser.add_argument("--kept", type=Path, help="A file that keeps what was measured, and is read if it is there.")
    given = parser.parse_args()
    known: dict[str, Any] = json.loads(given.kept.read_text()) if given.kept and given.kept.exists() else {}
    found: dict[str, Measured] = {}
    for name in given.only or METHODS:
        if name in known:
            one = known[name]
            one["seconds"] = {int(mbit): seconds for mbit, seconds in one["seconds"].items()}
            found[name] = Measured(**one)
        else:
            found[name] = measure(name)
            known[name] = asdict(found[name])
            if given.kept:
                given.kept.write_text(json.dumps(known))
        print(f"{name}: loss {found[name].loss:.4f}, {found[name].payload} B, {found[name].seconds}", flush=True)
    if not given.only:
        write(found)


if __name__ == "__main__":
    main()
