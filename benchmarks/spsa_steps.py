"""How large a step SPSA takes before it diverges, by the number n of directions in a round, on one node and on four.

An implementation of its own, without the program: all directions of a round at once, on a perceptron of 2410 parameters
for digits. Prints the table in docs/algorithms.md: ``python -m benchmarks.spsa_steps``, some minutes.
"""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from starling.actors.data.generators import seeded
from starling.actors.tasks.digits import Digits

WIDTH, INPUTS, CLASSES = 32, 64, 10
BATCH = 32
ROUNDS = 300
EPS = 1e-3
DIVERGED = 1.5
"""Held-out loss; that of guessing is 2.30."""
SEEDS = 16
NODES = (1, 4)
CASES = ((4, (0.02, 0.03, 0.04)), (16, (0.05, 0.07, 0.1, 0.12, 0.14)), (64, (0.3, 0.4, 0.5)))
"""n, and the learning rates."""


class Problem:
    """Samples, and losses of many models at once."""

    def __init__(self) -> None:
        self.task = Digits.model_validate({"model": {"name": "mlp", "width": WIDTH}})
        self.train, self.held_out = (
            samples.batch(torch.arange(len(samples)))
            for samples in (self.task.train_samples(1), self.task.validation_samples(1))
        )

    def start(self, seed: int) -> Tensor:
        """Initial parameters, shape (P,)."""
        with seeded(seed, torch.device("cpu")):
            return torch.cat([one.detach().reshape(-1) for one in self.task.build().parameters()])

    @staticmethod
    def losses(models: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean losses, shape (n,), of models, shape (n, P), each on its own samples, shapes (n, b, …)."""
        sizes = (WIDTH * INPUTS, WIDTH, CLASSES * WIDTH, CLASSES)
        first, bias, second, last = models.split(sizes, dim=1)
        n = len(models)
        hidden = torch.baddbmm(
            bias.unsqueeze(1), inputs.flatten(2), first.view(n, WIDTH, INPUTS).transpose(1, 2)
        ).relu()
        outputs = torch.baddbmm(last.unsqueeze(1), hidden, second.view(n, CLASSES, WIDTH).transpose(1, 2))
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(n, -1).mean(1)


def end(problem: Problem, lr: float, nodes: int, samples: int, seed: int) -> float:
    """The held-out loss after ``ROUNDS`` rounds of ``samples`` directions at each node, each on a batch of its own."""
    rng = torch.Generator().manual_seed(seed)
    theta = problem.start(seed)
    inputs, labels = problem.train
    parts = torch.randperm(len(inputs), generator=rng).tensor_split(nodes)
    orders = [torch.empty(0, dtype=torch.int64)] * nodes
    for _ in range(ROUNDS):
        drawn: list[Tensor] = []
        for node, part in enumerate(parts):
            while len(orders[node]) < samples * BATCH:
                orders[node] = torch.cat([orders[node], part[torch.randperm(len(part), generator=rng)]])
            drawn.append(orders[node][: samples * BATCH].view(samples, BATCH))
            orders[node] = orders[node][samples * BATCH :]
        places = torch.cat(drawn)
        batch = inputs[places], labels[places]
        signs = torch.randint(0, 2, (len(places), len(theta)), generator=rng) * 2.0 - 1.0
        above, below = (problem.losses(theta + scale * signs, *batch) for scale in (EPS, -EPS))
        theta = theta - lr / len(places) * ((above - below) / (2 * EPS) @ signs)
    found = float(problem.losses(theta.unsqueeze(0), *(one.unsqueeze(0) for one in problem.held_out)))
    return found if math.isfinite(found) else math.inf


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    problem = Problem()
    print("| n | `lr` | one node: median, diverged | four nodes: median, diverged |\n|---:|---:|---:|---:|")
    for n, rates in CASES:
        for lr in rates:
            cells: list[str] = []
            for nodes in NODES:
                ends = [end(problem, lr, nodes, n // nodes, seed) for seed in range(SEEDS if n < 64 else SEEDS // 2)]
                cells.append(f"{statistics.median(ends):.2f}, {sum(one > DIVERGED for one in ends)} of {len(ends)}")
            print(f"| {n} | {lr:g} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
