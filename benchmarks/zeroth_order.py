"""One-byte SPSA against a plain loop, replay against training, and the memory of a step.

The loop does the same forward passes and makes the same noise, with nothing around it: perturb a copy, look at the loss
on either side, add what all nodes' estimates come to. Both alternate, round by round. 4 directions a round, on a
transformer of 9.8 million parameters, in one process and on one thread.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from actors.data import EpochSampler
from actors.setup import load_data
from algorithms.noise import accumulate, perturb
from algorithms.zeroth_order import JustOneByte
from benchmarks.harness import Row, drive
from orchestrator import simulate
from orchestrator.config import Config, parse
from orchestrator.rebuild import rebuild
from orchestrator.simulator import Simulator

ROUNDS = 8
WARM_UP = 1
SAMPLES = 2
MEMORY_VALUES = 50_000_000
MEGABYTE = 1_000_000


def _config(rounds: int = ROUNDS) -> Config:
    return parse(
        {
            "rounds": rounds,
            "algorithm": {"name": "just_one_byte", "samples": SAMPLES, "lr": 1e-4, "verify_every": 0},
            "task": {"name": "text_lm", "context": 64, "model": {"layers": 12, "width": 256, "heads": 8}},
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


def measure() -> tuple[float, float, int]:
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

    config = _config()
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


def measure_memory() -> tuple[float, float]:
    """Peak GB of a step, and what inference and the committed copy take: two times the parameters."""
    theta = torch.zeros(MEMORY_VALUES)
    committed = theta.clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    perturb(theta, committed, 1e-3, "gaussian", 1)
    theta.copy_(committed)
    accumulate(theta, [(1, 0.1), (2, 0.2)], "gaussian")
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    copies = 2 * theta.nbytes / 1e9
    return copies + more, copies


def main() -> list[Row]:
    # First: what a process has once had shows in its peak for ever.
    peak, copies = measure_memory()
    name = "Peak memory of a probe and a step, 50 M parameters, against parameters and committed copy, in GB"
    rows = [Row(name, peak, copies, "+ a chunk: ≤ 1.02×", peak <= 1.02 * copies)]
    ours, loop, num_values = measure()
    name = f"A round of one-byte SPSA, {num_values / 1e6:.1f} M parameters, against a plain loop"
    rows.append(Row(name, ours, loop, "≤ 1.1×", ours / loop <= 1.1))
    replayed, trained = measure_replay()
    name = "A round replayed from the log, against training it"
    rows.append(Row(name, replayed, trained, "≤ 0.33×", replayed * 3 <= trained))
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
