"""The simulator against a plain Python loop over the same models: FedAvg on digits, one local epoch, batches of 32.

The loop is what one would write without any framework: load the shared model, train with torch.optim.SGD on the node's
samples, average. Both alternate, round by round.

And D-SGD with 1000 nodes on a graph of degree 8, logistic regression in 100 dimensions, one step of 16 samples a round:
50 ms a round are 50 µs per node for everything.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import nn

from benchmarks.harness import Row, drive
from starling.actors.host.build import load_data
from starling.orchestrator.config.schema import parse
from starling.orchestrator.runtimes.simulator.runtime import Simulator

ROUNDS = 40
WARM_UP = 5


class Loop:
    """FedAvg by hand."""

    def __init__(self, nodes: int, learning_rate: float) -> None:
        config = _config(nodes)
        data = load_data(config.task, config.data, nodes, config.seed)
        images, labels = data.train.tensors
        self._shards = [(images[part], labels[part]) for part in data.parts]
        self._model = config.task.build()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=learning_rate)
        self._shared = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._generator = torch.Generator().manual_seed(0)

    def round(self) -> None:
        total = {name: torch.zeros_like(value) for name, value in self._shared.items()}
        num_samples = sum(len(labels) for _, labels in self._shards)
        for images, labels in self._shards:
            self._model.load_state_dict(self._shared)
            order = torch.randperm(len(labels), generator=self._generator)
            for batch in order.split(32):
                self._optimizer.zero_grad()
                nn.functional.cross_entropy(self._model(images[batch]), labels[batch]).backward()
                self._optimizer.step()
            for name, value in self._model.state_dict().items():
                total[name] += value * (len(labels) / num_samples)
        self._shared = total


def _config(nodes: int):
    return parse(
        {
            "rounds": ROUNDS,
            "algorithm": "fedavg",
            "task": "digits",
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": nodes}},
            "tracking": "none",
        }
    )


def measure(nodes: int) -> tuple[float, float]:
    """Median seconds of a round of ours, and of the loop's."""
    torch.set_num_threads(1)
    loop = Loop(nodes, 0.1)
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

    config = _config(nodes)
    drive(config, Simulator(config), each_round)
    return statistics.median(ours[WARM_UP:]), statistics.median(loops[WARM_UP:])


def measure_gossip(nodes: int) -> float:
    """Median seconds of a round of D-SGD."""
    torch.set_num_threads(1)
    config = parse(
        {
            "rounds": ROUNDS,
            "algorithm": {"name": "dsgd", "topology": {"name": "random_regular", "degree": 8}},
            "task": {"name": "logistic", "dimension": 100},
            "data": {"batch_size": 16},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            "cluster": {"nodes": {"target": nodes}},
            "tracking": "none",
        }
    )
    marks: list[float] = []
    drive(config, Simulator(config), lambda _: marks.append(time.perf_counter()))
    return statistics.median(after - before for before, after in itertools.pairwise(marks[WARM_UP:]))


def main() -> list[Row]:
    rows: list[Row] = []
    for nodes in (16, 64):
        ours, loop = measure(nodes)
        name = f"A simulated FedAvg round on digits, {nodes} nodes, against a plain loop"
        rows.append(Row(name, ours, loop, "≤ 1.2×", ours / loop <= 1.2))
    seconds = measure_gossip(1000)
    rows.append(Row("A simulated round of D-SGD, 1000 nodes", seconds, None, "≤ 0.05 s", seconds <= 0.05))
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
