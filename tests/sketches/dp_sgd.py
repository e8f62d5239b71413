"""DP-SGD on every node, with Opacus' per-sample gradients; the noisy models are averaged.

A step's batch has each sample with probability q, and its gradient is

    g = (1/(q·n)) (Σ_i g_i min(1, C/‖g_i‖) + N(0, σ²C² I))

divided by the size that the batch was expected to have. Reference: Abadi et al., "Deep Learning with Differential
Privacy", CCS 2016, Algorithm 1, with Poisson batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from opacus.accountants import RDPAccountant
from opacus.grad_sample import GradSampleModule
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from starling.algorithms.api import Algorithm, AllReduce, Layout, Node, Train, all_reduce_bytes
from starling.algorithms.rules import DataBatch, GradientFunction, LocalProblem, Rule

if TYPE_CHECKING:
    from starling.algorithms.rules import BatchSampler


class Poisson:
    """Each sample with probability q = size / n, independently."""

    def __init__(self, num_samples: int, rng: torch.Generator) -> None:
        self.num_samples = num_samples
        self.rng = rng

    def next(self, size: int) -> Tensor:
        return (torch.rand(self.num_samples, generator=self.rng) < size / self.num_samples).nonzero().flatten()


class PrivateGradient(Rule):
    """Clips every sample's gradient to C, and adds noise."""

    def __init__(self, clip: float, noise: float) -> None:
        self.clip = clip  # C
        self.noise = noise  # σ

    def sampler(self, problem: LocalProblem) -> BatchSampler:
        return Poisson(problem.num_samples, problem.rng)

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            total, loss = torch.zeros_like(parameters), parameters.new_zeros(())
            if batch.num_samples:
                samples, loss = per_sample(problem, batch)
                norms = samples.norm(dim=1, keepdim=True)
                total = (samples * (self.clip / norms).clamp(max=1)).sum(0)
            drawn = torch.randn(len(total), generator=problem.rng)
            total += self.noise * self.clip * drawn.to(total)
            return total / problem.batch_size, loss

        return gradient


def per_sample(problem: LocalProblem, batch: DataBatch) -> tuple[Tensor, Tensor]:
    """The gradient of each sample, shape (b, P), and the mean loss."""
    hooked = GradSampleModule(problem.module)
    try:
        loss = problem.loss(hooked, batch)
        loss.backward()
        named: dict[str, Any] = dict(problem.module.named_parameters())
        rows = [named[entry.name].grad_sample.flatten(1) for entry in problem.layout.entries]
        return torch.cat(rows, dim=1), loss.detach()
    finally:
        # The module is that of all nodes of the process, and of the rounds to come.
        hooked.to_standard_module()


class PrivateAveraging(Algorithm):
    steps: PositiveInt = 5  # between two averages
    clip: PositiveFloat = 1.0  # C
    noise: NonNegativeFloat = 1.0  # σ, in multiples of C

    def init(self, node: Node) -> None:
        node.local["steps"] = 0  # the ledger of the data's owner: what it has spent it has spent

    async def round(self, node: Node) -> None:
        report = await Train(steps=self.steps, rule=PrivateGradient(self.clip, self.noise))
        spent = node.local["steps"]
        assert isinstance(spent, int)
        node.local["steps"] = spent + report.num_steps
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return all_reduce_bytes(layout.nbytes, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps


def epsilon(noise: float, sample_rate: float, steps: int, delta: float) -> float:
    """ε of (ε, δ)-differential privacy, adding or removing one sample, by Rényi divergences."""
    accountant = RDPAccountant()
    accountant.history = [(noise, sample_rate, steps)]
    return accountant.get_epsilon(delta=delta)
