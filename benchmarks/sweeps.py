"""Sweeps: what a trial costs over a plain ``run``, and how long 200 simulated trials take.

A trial and a run do the same: start two processes of nodes, train, evaluate, fetch the model, end the processes. They
are measured on one Ray, in turns: a sweep has one trial at a time, and after each a run is made while it stands still.
A trial lasts from there to its end. What a sweep costs once, before its first trial, is a row of its own.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from benchmarks.harness import Row
from starling import run
from starling.orchestrator.config.schema import Config
from starling.orchestrator.driver import resolve
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.sweep import sweep
from starling.orchestrator.sweeps.trials import Trial
from starling.orchestrator.sweeps.tune import Watcher

TRIALS = 7
SIMULATED = 200

RUN = {
    "name": "bench",
    "rounds": 120,  # what a trial costs more than a run does not grow with its length: it is half a second
    "algorithm": {"name": "diloco", "inner_steps": 60},
    "task": {"name": "digits", "model": {"name": "mlp", "width": 128}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "evaluation": {"every_rounds": 10},
    "cluster": {"address": "auto", "nodes": {"target": 2}, "num_cpus": 0.5},
    "tracking": "none",
}

SIMULATION = {
    "name": "bench",
    "algorithm": "fedavg",
    "task": "logistic",
    "optimizer": {"lr": 0.1},
    "tracking": "none",
}

SPACE = """
from ray import tune

seed = {"optimizer.lr": tune.uniform(0.05, 0.2)}
"""


class Turns(Watcher):
    """Makes a run after each trial, and measures both; the first of either is not counted."""

    def __init__(self, config: Config, folder: str) -> None:
        self._config = config
        self._folder = folder
        self.first_began = math.inf
        self.went_on = math.nan
        self.trials: list[float] = []
        self.runs: list[float] = []

    def on_trial_start(self, trial: Trial) -> None:
        self.first_began = min(self.first_began, time.monotonic())

    def on_trial_end(self, trial: Trial) -> None:
        began = time.monotonic()
        self.trials.append(began - self.went_on)
        run(self._config, run_dir=f"{self._folder}/run-{len(self.runs)}")
        self.went_on = time.monotonic()
        self.runs.append(self.went_on - began)


def overhead() -> list[Row]:
    """Seconds of a trial, against a run; and of what a sweep does once."""
    config = resolve(RUN)
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        space = Path(folder) / "spaces.py"
        space.write_text(SPACE)
        ours = session.connect("local", num_cpus=os.cpu_count() or 2)
        try:
            turns = Turns(config, folder)
            options = Options(space=f"{space}:seed", samples=TRIALS, max_concurrent=1)
            began = time.monotonic()
            sweep(config, options, sweep_dir=f"{folder}/sweep", watcher=lambda *_: turns)
            once_s = turns.first_began - began + time.monotonic() - turns.went_on
        finally:
            ours.close()
    pairs = list(zip(turns.trials[1:], turns.runs[1:], strict=True))
    run_s = statistics.median(turns.runs[1:])
    over_s = statistics.median(one - other for one, other in pairs)
    print(f"  sweeps: a trial takes {over_s:+.3f} s more than a run (median of {len(pairs)} pairs)")
    kept = over_s <= min(2.0, 0.05 * run_s)
    return [
        Row("a trial of a sweep, on Ray", run_s + over_s, run_s, "≤ 2 s and ≤ 5 % over `run`", kept),
        Row("what a sweep costs once", once_s, None),
    ]


def simulated() -> Row:
    """Seconds of a whole sweep, from an idle process to its result, with Ray's start."""
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        began = time.monotonic()
        result = sweep(
            resolve(SIMULATION), Options(space="fedavg", samples=SIMULATED, simulate=True), sweep_dir=f"{folder}/sweep"
        )
        seconds = time.monotonic() - began
        assert all(trial.end == "finished" for trial in result.trials)
    return Row(f"{SIMULATED} simulated trials of logistic × fedavg", seconds, None, "≤ 60 s on 2 cores", seconds <= 60)


def main() -> list[Row]:
    return [simulated(), *overhead()]


if __name__ == "__main__":
    for row in main():
        print(row)
