"""Consensus-based optimization, exactly: B1 to B7 of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.tasks import Task, TensorSamples
from algorithms.zeroth_order import CBO
from algorithms.zeroth_order.cbo import weights_of
from tests.membership import scripted
from tests.toys import simulate

FP64: dict[str, Any] = {"precision": "fp64"}
TASK: dict[str, Any] = {"name": "quadratic", "dimension": 4, "heterogeneity": 0.0}


def run(nodes: int = 1, rounds: int = 1, task: Any = TASK, **keys: Any) -> Any:
    return simulate(algorithm={"name": "cbo"} | keys, task=task, nodes=nodes, rounds=rounds, optimizer=FP64)


def first_particles(node: int = 0, count: int = 10, size: int = 4, spread: float = 1.0) -> Tensor:
    """As they were before round 0: around the model, which is 0."""
    ran = run(node + 1, particles=count, drift=1e-12, diffusion=0.0, spread=spread)
    particles: Tensor = ran.replicas[node].local["particles"]
    assert particles.shape == (count, size)
    return particles


def energies(particles: Tensor) -> Tensor:
    from actors.tasks.quadratic import Quadratic

    problem = Quadratic(dimension=4, heterogeneity=0.0)
    away = particles - problem.center(0)
    return ((away @ problem.curvature(0)) * away).sum(1) / 2


def test_with_a_large_alpha_the_consensus_is_the_best_particle():
    """B1."""
    particles = first_particles()
    best = particles[energies(particles).argmin()]
    torch.testing.assert_close(run(alpha=1e6).parameters, best, rtol=0, atol=1e-9)


def test_without_alpha_the_consensus_is_the_mean():
    """B1."""
    torch.testing.assert_close(run(alpha=0.0).parameters, first_particles().mean(0), rtol=0, atol=1e-9)


def test_the_consensus_is_that_of_the_definition():
    particles = first_particles()
    weights = (-2.0 * energies(particles)).exp()
    expected = (weights.unsqueeze(1) * particles).sum(0) / weights.sum()
    torch.testing.assert_close(run(alpha=2.0).parameters, expected, rtol=0, atol=1e-9)


def test_energies_count_by_their_differences():
    """B2. Shifted by a power of two that rounds nothing away, the weights are the same to the last bit."""
    some = [0.25, 1.5, 0.75]
    assert weights_of(some, 0.25, 3.0) == weights_of([one + 1024 for one in some], 1024.25, 3.0)
    assert weights_of(some, 0.25, 3.0) == [1.0, math.exp(-3.75), math.exp(-1.5)]
    assert weights_of([800.0, 801.0], 800.0, 1e4) == [1.0, 0.0], "what underflows is nothing, and no error"


@pytest.mark.parametrize("anisotropic", [True, False])
def test_without_noise_particles_contract_to_the_consensus(anisotropic: bool):
    """B3: exactly by 1 − λΔt."""
    particles = first_particles()
    ran = run(diffusion=0.0, drift=2.0, dt=0.25, anisotropic=anisotropic)
    consensus = ran.parameters
    after: Tensor = ran.replicas[0].local["particles"]
    torch.testing.assert_close(after - consensus, 0.5 * (particles - consensus), rtol=0, atol=1e-9)


@pytest.mark.parametrize("anisotropic", [True, False])
def test_particles_that_agree_stay(anisotropic: bool):
    """B4: neither drift nor noise."""
    ran = run(2, rounds=3, spread=1e-300, anisotropic=anisotropic)
    assert float(ran.parameters.abs().max()) < 1e-290
    assert float(ran.replicas[1].local["particles"].abs().max()) < 1e-290


def test_many_nodes_have_the_consensus_of_all_particles():
    """B5: the log-sum-exp over nodes is that over all particles in one place, to 1e-12."""
    nodes = 3
    all_particles = torch.cat([first_particles(node, 5) for node in range(nodes)])
    energy = energies(all_particles)
    weights = torch.softmax(-30.0 * energy, 0)
    expected = (weights.unsqueeze(1) * all_particles).sum(0)
    # The particles were read after a drift of 1e-13 of their distance.
    torch.testing.assert_close(run(nodes, particles=5, alpha=30.0).parameters, expected, rtol=0, atol=2e-12)


class Rastrigin(Task):
    """Σ (x² − 10 cos 2πx + 10) around ``center``: hundreds of local minima, one global."""

    dimension: int = 2
    center: float = 1.0

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(num_nodes, 1), owners=torch.arange(num_nodes))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        module = nn.Module()
        module.register_parameter("x", nn.Parameter(torch.zeros(self.dimension)))
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        away = next(module.parameters()) - self.center
        return (away.square() - 10 * (2 * math.pi * away).cos() + 10).sum()


class Holes(Rastrigin):
    """½‖x‖², and no number where x₀ > 0."""

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x = next(module.parameters())
        return x.square().sum() / 2 + (torch.inf if float(x.detach()[0]) > 0 else 0)


def test_it_finds_the_global_minimum_of_rastrigin():
    """B6: d = 2, N = 200 particles on 4 nodes, α = 100, anisotropic: at least 9 of 10 runs."""
    keys: Any = {"particles": 50, "alpha": 100.0, "spread": 2.0, "diffusion": 1.0, "dt": 0.1}
    found = 0
    for seed in range(10):
        ran = simulate(
            {"algorithm": {"name": "cbo"} | keys, "task": f"{__name__}:Rastrigin", "evaluation": {"every_rounds": 0}},
            nodes=4, rounds=25, seed=seed, optimizer=FP64,
        )  # fmt: skip
        found += bool((ran.parameters - 1.0).abs().max() < 0.25)
    assert found >= 9


@pytest.mark.parametrize(("anisotropic", "factor"), [(True, 0.8590), (False, 0.81 + 4 * 0.049)])
def test_the_spread_changes_as_computed(anisotropic: bool, factor: float):
    """B7: E‖x − x_α‖² by (1 − λΔt)² + σ²Δt a step (λ = 1, σ = 0.7, Δt = 0.1: 0.8590); isotropic: P times that noise."""
    ran = run(particles=4000, alpha=1e9, drift=1.0, diffusion=0.7, dt=0.1, anisotropic=anisotropic)
    before = first_particles(count=4000) - ran.parameters
    after = ran.replicas[0].local["particles"] - ran.parameters
    ratio = after.square().sum(1).mean() / before.square().sum(1).mean()
    assert float(ratio) == pytest.approx(factor, rel=0.02)


def test_particles_without_a_number_have_no_weight():
    ran = run(2, rounds=2, task=f"{__name__}:Holes", alpha=0.0)
    assert bool(ran.parameters.isfinite().all())
    assert float(ran.parameters[0]) < 0


def test_a_joiner_scatters_its_particles_around_the_consensus():
    def watch(number: int, replicas: Any) -> None:
        if number >= 2:
            distances = (replicas[2].local["particles"] - replicas[2].parameters).norm(dim=1)
            assert float(distances.max()) < 5
            assert torch.equal(replicas[2].parameters, replicas[0].parameters)

    scripted([(0, 1)] * 2 + [(0, 1, 2)] * 2, watch, algorithm={"name": "cbo"}, task=TASK)


def test_its_bytes():
    ran = run(3, rounds=2)
    assert [one.payload_bytes for one in ran.rounds] == [3 * 2 * 8 + 3 * 2 * 4 * 8] * 2 == [ran.expected_bytes] * 2
    assert CBO().steps_per_round(10, 2) == 0
