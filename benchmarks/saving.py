"""What checkpoints cost a run, and how long it takes until a large one goes on.

The cost: rounds of one run on Ray, of which every other one is followed by a checkpoint, which is written while the
next trains. Compared is from commit to commit: what saving takes between rounds counts, and what it takes from the
training beside it.

Going on: everything but the start of processes, from a cold object store: the checkpoint is read and checked, and all
nodes have taken it over.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Row
from starling.orchestrator import api
from starling.orchestrator.checkpoints.schedule import Checkpointing
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.context import RunContext
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.restore import restoration
from starling.orchestrator.control.run_state import RunState
from starling.orchestrator.control.synchronous import Synchronous
from starling.orchestrator.records.observers import Observer, RoundRecord
from starling.orchestrator.runtimes.cluster.runtime import Cluster

PAIRS = {12: 30, 100: 24}
"""Of rounds, by their length in steps. 100 is the least that a paper has (Streaming DiLoCo; DiLoCo has 500)."""
SIZE = 100_000_000
"""Trained values; with the anchor and the outer momentum 1.2 GB of state."""


class _Commits(Observer):
    """The moments of commits."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_round(self, record: RoundRecord) -> None:
        self.moments.append(time.perf_counter())


def cost(steps: int) -> Row:
    """Rounds with and without a checkpoint, in pairs."""
    pairs = PAIRS[steps]
    config = parse(
        {
            "rounds": 2 * (pairs + 2) + 1,
            "algorithm": {"name": "diloco", "inner_steps": steps},
            "task": {"name": "text_lm", "model": {"layers": 2, "width": 64, "heads": 2}, "context": 64},
            "data": {"batch_size": 16},
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "evaluation": {"every_rounds": 0, "max_batches": 1},
            "cluster": {"nodes": {"target": 4}},
            "tracking": "none",
            "checkpoint": {"every_rounds": 2},
        }
    )
    commits, runtime = _Commits(), Cluster(config)
    with TemporaryDirectory() as folder:
        store = CheckpointStore(None, Path(folder), "benchmark")
        checkpoints = Checkpointing(config.checkpoint, store, runtime)
        try:
            Controller(config, runtime, commits, run_id="benchmark", run_dir=folder, checkpoints=checkpoints).run()
        finally:
            checkpoints.close()
            runtime.close()
        written = checkpoints.counts["written"]
    assert written >= pairs, f"{written} checkpoints were written"
    seconds = [later - sooner for sooner, later in zip(commits.moments, commits.moments[1:], strict=False)][4:]
    # Round 1 is the first that is saved: rounds that follow one have even numbers here.
    with_, without = seconds[1::2], seconds[0::2]
    ratio = statistics.median(one / other for one, other in zip(with_, without, strict=False))
    print(f"  saving: medians {statistics.median(with_):.4f} and {statistics.median(without):.4f} s, {written} written")
    median = statistics.median(without)
    what = f"A DiLoCo round of text_lm, {steps} steps, saved, against one that is not (median of pairs)"
    if steps < max(PAIRS):
        return Row(what, median * ratio, median)  # so short that `auto` would not save each
    return Row(what, median * ratio, median, "≤ 1.01×", ratio <= 1.01)


def going_on() -> Row:
    """Two nodes of 100 M parameters, from the checkpoint to the round."""
    config = {
        "rounds": 2,
        "algorithm": {"name": "diloco", "inner_steps": 1},
        "task": {"name": "benchmarks.workloads:Filled", "size": SIZE},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "evaluation": {"every_rounds": 0},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
        "checkpoint": {"every_rounds": 1},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, "run")
        api.run(config, run_dir=path)
        restored, _, _ = restoration(path, ["rounds=3"])
        runtime = Cluster(restored.config)
        runtime.num_parts = restored.num_parts
        try:
            state = RunState(RunContext(restored.config, runtime, Observer(), "run", str(path)))
            state.start()
            began = time.perf_counter()
            again, _, _ = restoration(path, ["rounds=3"])
            read = time.perf_counter() - began
            again.restore(state, Synchronous(state))
            seconds = time.perf_counter() - began
        finally:
            runtime.close()
        size = sum(file.stat().st_size for file in path.glob("checkpoints/round-000001/*"))
    print(f"  saving: {size / 1e9:.2f} GB read and checked in {read:.2f} s")
    return Row(
        "Resume of 2 nodes of 100 M parameters, without the start of processes", seconds, None, "≤ 10 s", seconds <= 10
    )


def main() -> list[Row]:
    return [*map(cost, PAIRS), going_on()]


if __name__ == "__main__":
    for row in main():
        print(row)
