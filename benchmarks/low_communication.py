"""Methods that communicate little on a small language model: losses, bytes, and how long they take on slow links.

``python benchmarks/low_communication.py`` writes ``docs/low_communication.md`` and its picture. Each method begins with
the same model, a data-parallel run's, and is trained once with each learning rate; the best one counts. A dry run for
each bandwidth gives its time, which does not depend on what is trained. ``--kept FILE`` keeps what was measured, and
goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from starling.orchestrator.analysis.dry_run import dry_run
from starling.orchestrator.api import simulate
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer, RoundRecord
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from starling.orchestrator.units import bytes_text

PAGE = Path(__file__).parents[1] / "docs" / "low_communication.md"
NODES = 4
PRETRAINING, STEPS = 1536, 3072
"""Of each node: data-parallel ones that all methods begin with, and their own."""
PERIOD = 8
"""Steps between two exchanges of the same values."""
STEP_MS = 100
"""Of a node: what a GPU needs for a model that fills it."""
MBITS = (10, 100, 1000)

MODEL = {"layers": 2, "width": 32, "heads": 2}
CONTEXT, BATCH = 32, 16
RATES = (8e-3, 1.2e-2)
PRETRAINING_RATE = 1.2e-2
WARM_UP = 24
EVALUATED_EVERY = 96

OUTER = {"name": "nesterov", "lr": 0.7, "momentum": 0.8}
WHOLE = {"codec": "identity", "result_codec": "identity"}
STREAMING = {"name": "streaming_diloco", "inner_steps": PERIOD, "fragments": 2, "overlap_steps": 1, "outer": OUTER}

METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "data-parallel": ({"name": "ddp", "inner_steps": PERIOD}, PERIOD),
    "DiLoCo": ({"name": "diloco", "inner_steps": PERIOD, "outer": OUTER}, PERIOD),
    "streaming": (STREAMING | WHOLE, PERIOD // 2),
    "streaming, FP4": (STREAMING, PERIOD // 2),
    "EDiT": ({"name": "edit", "inner_steps": PERIOD}, PERIOD),
    "single merge": ({"name": "single_merge", "steps": PERIOD}, PERIOD),
}
"""By name: the algorithm, and the steps of one of its rounds."""


@dataclass
class Measured:
    """What comes of a method."""

    loss: float
    """With the best learning rate."""
    rate: float
    payload: int
    curve: list[tuple[float, float]]
    """(share of the run, validation loss)."""
    losses: dict[float, float]
    """By learning rate."""
    seconds: dict[int, float] = field(default_factory=dict)
    """By Mbit/s."""


class _Curve(Observer):
    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.points: list[tuple[float, float]] = []

    def on_round(self, record: RoundRecord) -> None:
        if record.metrics:
            self.points.append(((record.round + 1) / self._rounds, record.metrics["loss"]))


def _raw(algorithm: Mapping[str, Any], rounds: int, rate: float) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "algorithm": dict(algorithm),
        "task": {"name": "text_lm", "model": MODEL, "context": CONTEXT},
        "data": {"batch_size": BATCH},
        "optimizer": {
            "name": "adamw",
            "lr": rate,
            "schedule": {"name": "cosine", "warmup_steps": WARM_UP},
            "grad_clip": 1.0,
        },
        "evaluation": {"every_rounds": 0, "max_batches": 16},
        "cluster": {"nodes": {"target": NODES}},
        "network": {"step_ms": STEP_MS},
        "tracking": "none",
    }


def pretrain(path: Path) -> None:
    """Make the model that all begin with."""
    algorithm, steps = METHODS["data-parallel"]
    with tempfile.TemporaryDirectory() as folder:
        simulate(_raw(algorithm, PRETRAINING // steps, PRETRAINING_RATE), run_dir=Path(folder) / "run")
        path.write_bytes((Path(folder) / "run" / "model.safetensors").read_bytes())


def _run(raw: dict[str, Any], observer: Observer) -> Any:
    config = parse(raw)
    runtime = Simulator(config)
    try:
        return Controller(config, runtime, observer, run_id="benchmark", run_dir="").run()
    finally:
        runtime.close()


def train(name: str, rate: float, begin: str) -> dict[str, Any]:
    """Loss, bytes and curve of a method at a learning rate."""
    algorithm, steps = METHODS[name]
    raw = _raw(algorithm, STEPS // steps, rate)
    raw["task"]["init_from"] = begin
    raw["evaluation"]["every_rounds"] = EVALUATED_EVERY // steps
    watch = _Curve(STEPS // steps)
    summary = _run(raw, watch)
    return {"loss": summary.metrics["loss"], "payload": summary.bytes["payload"], "curve": watch.points}


def clock(name: str, mbit: int) -> dict[str, Any]:
    """Virtual seconds of a method at a bandwidth, and its bytes once more."""
    algorithm, steps = METHODS[name]
    raw = _raw(algorithm, STEPS // steps, RATES[0])
    raw["network"]["bandwidth_mbps"] = mbit
    summary = dry_run(parse(raw), STEPS // steps)
    return {"seconds": summary.virtual_seconds, "payload": summary.bytes["payload"]}


def measure(begin: Path, known: dict[str, Any], kept: Path | None, jobs: int) -> dict[str, Measured]:
    """Do what is not known yet, in so many processes."""
    tasks = {
        f"{name} at {rate:g}": functools.partial(train, name, rate, str(begin)) for name in METHODS for rate in RATES
    }
    tasks |= {f"{name} on {mbit}": functools.partial(clock, name, mbit) for name in METHODS for mbit in MBITS}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(task): key for key, task in tasks.items() if key not in known}
        for future in as_completed(futures):
            key = futures[future]
            known[key] = future.result()
            print(key, {what: one for what, one in known[key].items() if what != "curve"}, flush=True)
            if kept is not None:
                kept.write_text(json.dumps(known))
    found: dict[str, Measured] = {}
    for name in METHODS:
        runs = {rate: known[f"{name} at {rate:g}"] for rate in RATES}
        rate = min(runs, key=lambda one: runs[one]["loss"])
        best, times = runs[rate], {mbit: known[f"{name} on {mbit}"] for mbit in MBITS}
        # An outlier contributes nothing, so that what EDiT sends depends a little on the gradients.
        assert all(abs(one["payload"] / best["payload"] - 1) < 0.01 for one in times.values())
        losses = {one: run["loss"] for one, run in runs.items()}
        seconds = {mbit: one["seconds"] for mbit, one in times.items()}
        found[name] = Measured(best["loss"], rate, best["payload"], best["curve"], losses, seconds)
    return found


HEAD = f"""# Methods that communicate little

Written by `python benchmarks/low_communication.py`, in the simulator: a transformer of 35 thousand parameters on
Python's standard library, {NODES} nodes, {STEPS} steps of each
({STEPS * NODES * BATCH * CONTEXT / 1e6:.1f} million bytes of text in all), {STEP_MS} ms a step. All begin with the same
model, which data-parallel training has made in {PRETRAINING} steps before, as in DiLoCo's paper. AdamW with a cosine
schedule; each method has the best of the learning rates {", ".join(f"{rate:g}" for rate in RATES)}. The same values
are exchanged every {PERIOD} steps. DiLoCo and streaming have an outer learning rate of {OUTER["lr"]} and momentum
{OUTER["momentum"]}; streaming exchanges two fragments with an overlap of one step; a single merge mixes with a fifth
of a neighbour every {PERIOD} steps.

| method | validation loss | to data-parallel | rate | sent | {" | ".join(f"{mbit} Mbit/s" for mbit in MBITS)} |
|---|---:|---:|---:|---:|{"---:|" * len(MBITS)}
"""

TAIL = f"""
The last columns are virtual seconds; computing alone takes {STEPS * STEP_MS / 1000:g}.

How near a method comes to data-parallel training depends on how far both are on. With the same settings, from random
weights, streaming with FP4 ended 7.0 % above it after 768 steps and 4.0 % after 3072; after 1008 common steps and 2064
of its own 2.0 % (measured on 2026-11-25, each at the best of two to four learning rates). There a rate of 0.016 was
worse than 0.012 for both. What four bits cost is the
difference between the two lines of streaming.

FP4 is of what is sent: the mean comes back in bf16, so that above 64 KiB a contribution all bytes are 3.2 times fewer
than in float32, not eight times. Fragments of this small model are smaller than that when encoded. Such contributions
go to everybody, N·(N-1)·b instead of 2·(N-1)·b bytes. So streaming without FP4 sends more than DiLoCo does, and FP4
sends 5.5 times less.

![Validation loss over virtual time, one panel for each bandwidth](low_communication.png)

Validation losses with all learning rates:

| method | {" | ".join(f"{rate:g}" for rate in RATES)} |
|---|{"---:|" * len(RATES)}
"""

END = """
The bandwidth that a run of yours needs is what [`starling bandwidth`](cli.md) prints.
"""


def write(found: Mapping[str, Measured]) -> None:
    base = found["data-parallel"].loss
    lines = [
        f"| {name} | {one.loss:.3f} | {one.loss / base - 1:+.1%} | {one.rate:g} | {bytes_text(one.payload)} | "
        + " | ".join(f"{one.seconds[mbit]:,.1f}" for mbit in MBITS)
        + " |\n"
        for name, one in found.items()
    ]
    grid = [
        f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in one.losses.values()) + " |\n"
        for name, one in found.items()
    ]
    PAGE.write_text(HEAD + "".join(lines) + TAIL + "".join(grid) + END, encoding="utf-8")
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
    parser.add_argument("--kept", type=Path, help="A file that keeps what was measured, and is read if it is there.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Processes; each has one core.")
    given = parser.parse_args()
    kept: Path | None = given.kept
    known: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        begin = Path(folder) / "begin.safetensors" if kept is None else kept.with_suffix(".safetensors").absolute()
        if not begin.exists():
            pretrain(begin)
        write(measure(begin, known, kept, given.jobs))


if __name__ == "__main__":
    main()
