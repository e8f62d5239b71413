"""Sweeps: what a trial costs over a plain ``run``, and how long 200 simulated trials take.

A trial and a run do the same: start two processes of nodes, train, evaluate, fetch the model, end the processes. They
are measured on one Ray: runs one after the other, then a sweep with trials one at a time, from the end of one to the
end of the next. What a sweep costs once, before its first trial, is a row of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, with the repository's root as the import root

from benchmarks.harness import Row
from orchestrator import ray_session, run
from orchestrator.api import resolve
from orchestrator.sweep import Options, sweep
from orchestrator.sweep_board import Trial
from orchestrator.tuning import Watcher

TRIALS = 4
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


class Ends(Watcher):
    """When trials began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_trial_start(self, trial: Trial) -> None:
        self.began.append(time.monotonic())

    def on_trial_end(self, trial: Trial) -> None:
        self.ended.append(time.monotonic())


def overhead() -> list[Row]:
    """Seconds of a trial, against a run; and of what a sweep does once."""
    config = resolve(RUN)
    ends = Ends()
    with tempfile.TemporaryDirectory(prefix="st-") as folder:
        space = Path(folder) / "spaces.py"
        space.write_text(SPACE)
        session = ray_session.connect("local", num_cpus=os.cpu_count() or 2)
        try:
            run(config, run_dir=f"{folder}/warm-up")
            began = time.monotonic()
            for number in range(TRIALS - 1):
                run(config, run_dir=f"{folder}/run-{number}")
            run_s = (time.monotonic() - began) / (TRIALS - 1)
            began = time.monotonic()
            options = Options(space=f"{space}:seed", samples=TRIALS, max_concurrent=1)
            sweep(config, options, sweep_dir=f"{folder}/sweep", watcher=lambda *_: ends)
            once_s = ends.began[0] - began + time.monotonic() - ends.ended[-1]
        finally:
            session.close()
    trial_s = (ends.ended[-1] - ends.ended[0]) / (TRIALS - 1)
    kept = trial_s - run_s <= 2.0 and trial_s <= 1.05 * run_s
    return [
        Row("a trial of a sweep, on Ray", trial_s, run_s, "≤ 2 s and ≤ 5 % over `run`", kept),
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
