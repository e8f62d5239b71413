"""One-byte SPSA against a plain loop, replay against training, and the memory of a step.

The loop does the same forward passes and makes the same noise, with nothing around it: perturb a copy, look at the loss
on either side, add what all nodes' estimates come to. Both alternate, round by round. 2 directions a round, on a
transformer of 9.8 million parameters, in one process and on one thread. Memory is that of a process in the first round
of a larger one, above what the process has without a model.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Row, drive
from starling import simulate
from starling.actors.data import EpochSampler
from starling.actors.host.build import load_data
from starling.algorithms.noise import accumulate, perturb
from starling.algorithms.zeroth_order.just_one_byte import JustOneByte
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer, RoundRecord, Started
from starling.orchestrator.records.rebuild import rebuild
from starling.orchestrator.runtimes.simulator.runtime import Simulator

ROUNDS = 8
WARM_UP = 1
SAMPLES = 2
CHUNKS = 10_000_000
"""Bytes: what is made of noise at a time, in some ten arrays."""
SIZE = {"layers": 12, "width": 256, "heads": 8}
WIDE = {"layers": 12, "width": 576, "heads": 8}


def _config(
    rounds: int = ROUNDS, algorithm: dict[str, Any] | None = None, size: dict[str, int] | None = None
) -> Config:
    options = {"name": "just_one_byte", "samples": SAMPLES, "lr": 1e-4, "verify_every": 0}
    return parse(
        {
            "rounds": rounds,
            "algorithm": options | (algorithm or {}),
            "task": {"name": "text_lm", "context": 64, "model": size or SIZE},
            "data": {"batch_size": 4},
            "evaluation": {"every_rounds": 0, "max_batches": 1},
            "cluster": {"nodes": {"target": 1}},
            "tracking": "none",
        }
    )


class Loop:
    """The same by hand, for one node."""

    def __init__(self) -> None:
        config = _config()
        data = load_data(config.task, config.data, 1, config.seed)
        self._task, self._samples = config.task, data.train
        self._sampler = EpochSampler(data.parts[0], config.seed, 0)
        self._module = config.task.build()
        self._parameters = [one for one in self._module.parameters() if one.requires_grad]
        self._theta = torch.cat([one.detach().reshape(-1) for one in self._parameters])
        self._scratch = self._theta.clone()
        start = 0
        for one in self._parameters:
            one.data = self._scratch[start : start + one.numel()].view(one.shape)
            start += one.numel()
        self._algorithm: JustOneByte = config.algorithm  # pyright: ignore[reportAttributeAccessIssue] - it is one
        self._round = 0

    def round(self) -> None:
        algorithm, terms = self._algorithm, list[tuple[int, float]]()
        for sample in range(SAMPLES):
            batch = self._samples.batch(self._sampler.next(4))
            key = 1000 * self._round + sample
            losses: list[float] = []
            for scale in (algorithm.eps, -algorithm.eps):
                perturb(self._scratch, self._theta, scale, "gaussian", key)
                with torch.no_grad():
                    losses.append(float(self._task.loss(self._module, batch)))
            estimate = (losses[0] - losses[1]) / (2 * algorithm.eps)
            terms.append((key, -algorithm.lr / SAMPLES * estimate))
        accumulate(self._theta, terms, "gaussian")
        self._round += 1

    @property
    def num_values(self) -> int:
        return self._theta.numel()


def measure(algorithm: dict[str, Any]) -> tuple[float, float, int]:
    """Median seconds of a round of ours, and of the loop's; parameters."""
    torch.set_num_threads(1)
    loop = Loop()
    ours: list[float] = []
    loops: list[float] = []
    mark = time.perf_counter()

    def each_round(_: list[float]) -> None:
        nonlocal mark
        now = time.perf_counter()
        ours.append(now - mark)
        loop.round()
        mark = time.perf_counter()
        loops.append(mark - now)

    config = _config(algorithm=algorithm)
    drive(config, Simulator(config), each_round)
    return statistics.median(ours[WARM_UP:]), statistics.median(loops[WARM_UP:]), loop.num_values


def measure_replay() -> tuple[float, float]:
    """Seconds of a round replayed, and of one trained: of many rounds, less what one round takes with its set-up."""
    took: dict[int, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rounds in (1, 1 + ROUNDS):
            path = Path(folder) / str(rounds)
            began = time.perf_counter()
            simulate(_config(rounds), run_dir=path)
            trained = time.perf_counter()
            rebuild(path)
            took[rounds] = time.perf_counter() - trained, trained - began
    replayed, training = ((many - one) / ROUNDS for one, many in zip(took[1], took[1 + ROUNDS], strict=True))
    return replayed, training


def measure_memory(what: str) -> Memory:
    """Of a process of its own: what a process has once had shows in its allocator for ever."""
    command = [sys.executable, "-m", "benchmarks.zeroth_order", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return Memory(*map(int, done.stdout.split()[-3:]))


class Memory(NamedTuple):
    """Bytes."""

    peak: int
    """Resident, above what the process had with everything imported and without a model."""
    parameters: int
    largest: int
    """Of the tensors among them."""


class _Peak(Observer):
    """The peak of the first round but the last, in which nothing is evaluated or fetched."""

    peak = 0

    def on_start(self, started: Started) -> None:
        _forget_peak()

    def on_round(self, record: RoundRecord) -> None:
        self.peak = self.peak or _status("VmHWM:")


def _memory_of(what: str) -> Memory:
    torch.set_num_threads(1)
    # First a small model: what is imported, loaded and kept for any model is there then.
    _run(_config(2, {"perturb": "on_use"}, {"layers": 1, "width": 16, "heads": 1}))
    base = _status("VmRSS:")
    config = _config(2, {"perturb": what} if what != "inference" else {}, WIDE)
    if what == "inference":
        module = config.task.build()
        batch = load_data(config.task, config.data, 1, config.seed).train.batch(torch.arange(4))
        _forget_peak()
        with torch.no_grad():
            config.task.loss(module, batch)
        sizes = [one.nbytes for one in module.parameters()]
        return Memory(_status("VmHWM:") - base, sum(sizes), max(sizes))
    peak, sizes = _run(config)
    return Memory(peak - base, sum(sizes), max(sizes))


def _run(config: Config) -> tuple[int, list[int]]:
    """The peak in bytes, and those of the parameters."""
    observer, runtime = _Peak(), Simulator(config)
    try:
        Controller(config, runtime, observer, run_id="benchmark", run_dir="").run()
        return observer.peak, [4 * (entry.stop - entry.start) for entry in runtime.layout.entries]
    finally:
        runtime.close()


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    inference, copy, on_use = map(measure_memory, ("inference", "copy", "on_use"))
    size = f"{copy.parameters / 4e6:.0f} M parameters"
    for name, found, more in (
        ("from a copy, against inference + committed copy + a chunk", copy, copy.parameters),
        ("as they are used, against inference + largest tensor + a chunk", on_use, on_use.largest),
    ):
        promised = inference.peak + more + CHUNKS
        what = f"Peak memory of a node, one-byte SPSA, {size}, perturbed {name}"
        rows.append(Row(what, found.peak / 1e9, promised / 1e9, "≤ 1.05×", found.peak <= 1.05 * promised, "GB"))
    ours, loop, num_values = measure({"perturb": "copy"})
    name = f"A round of one-byte SPSA, {num_values / 1e6:.1f} M parameters, against a plain loop"
    rows.append(Row(name, ours, loop, "≤ 1.1×", ours / loop <= 1.1))
    ours, loop, num_values = measure({"perturb": "on_use"})
    size = f"{num_values / 1e6:.1f} M parameters perturbed as they are used"
    name = f"A round of one-byte SPSA, {size}, against a plain loop"
    rows.append(Row(name, ours, loop))
    replayed, trained = measure_replay()
    name = "A round replayed from the log, against training it"
    rows.append(Row(name, replayed, trained, "≤ 0.33×", replayed * 3 <= trained))
    return rows


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*_memory_of(sys.argv[1]))
    else:
        for row in main():
            print(row)
