"""Consensus-based optimization, exactly: B1 to B7 of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.tasks import Task, TensorSamples
from starling.algorithms.zeroth_order.cbo import CBO, weights_of
from tests.membership import scripted
from tests.toys import simulate

FP64: dict[str, Any] = {"precision": "fp64"}
TASK: dict[str, Any] = {"name": "quadratic", "dimension": 4, "heterogeneity": 0.0}


def run(nodes: int = 1, rounds: int = 1, task: Any = TASK, **keys: Any) -> Any:
    return simulate(algorithm={"name": "cbo"} | keys, task=task, nodes=nodes, rounds=rounds, optimizer=FP64)


def first_particles(count: int = 10, size: int = 4, spread: float = 1.0) -> Tensor:
    """Return the particles as they were before round 0: around the model, which is 0."""
    ran = run(particles=count, drift=1e-12, diffusion=0.0, spread=spread)
    particles: Tensor = ran.replicas[0].shared["particles"]
    assert particles.shape == (count, size)
    return particles


def energies(particles: Tensor) -> Tensor:
    from starling.actors.tasks.quadratic import Quadratic

    problem = Quadratic(dimension=4, heterogeneity=0.0)
    away = particles - problem.center(0)
    return ((away @ problem.curvature(0)) * away).sum(1) / 2


def test_with_a_large_alpha_the_consensus_is_the_best_particle():
    """B1."""
    particles = first_particles()
    best = particles[energies(particles).argmin()]
    torch.testing.assert_close(run(particles=10, alpha=1e6).parameters, best, rtol=0, atol=1e-9)


def test_without_alpha_the_consensus_is_the_mean():
    """B1."""
    torch.testing.assert_close(run(particles=10, alpha=0.0).parameters, first_particles().mean(0), rtol=0, atol=1e-9)


def test_the_consensus_is_that_of_the_definition():
    particles = first_particles()
    weights = (-2.0 * energies(particles)).exp()
    expected = (weights.unsqueeze(1) * particles).sum(0) / weights.sum()
    torch.testing.assert_close(run(particles=10, alpha=2.0).parameters, expected, rtol=0, atol=1e-9)


def test_energies_count_by_their_differences():
    """B2. Shifted by a power of two that rounds nothing away, the weights are the same to the last bit."""
    some = [0.25, 1.5, 0.75]
    assert weights_of(some, 3.0) == weights_of([one + 1024 for one in some], 3.0)
    assert weights_of(some, 3.0) == [1.0, math.exp(-3.75), math.exp(-1.5)]
    assert weights_of([800.0, 801.0], 1e4) == [1.0, 0.0], "what underflows is nothing, and no error"


@pytest.mark.parametrize("anisotropic", [True, False])
def test_without_noise_particles_contract_to_the_consensus(anisotropic: bool):
    """B3: exactly by 1 − λΔt."""
    particles = first_particles()
    ran = run(particles=10, diffusion=0.0, drift=2.0, dt=0.25, anisotropic=anisotropic)
    consensus = ran.parameters
    after: Tensor = ran.replicas[0].shared["particles"]
    torch.testing.assert_close(after - consensus, 0.5 * (particles - consensus), rtol=0, atol=1e-9)


@pytest.mark.parametrize("anisotropic", [True, False])
def test_particles_that_agree_stay(anisotropic: bool):
    """B4: neither drift nor noise."""
    ran = run(2, rounds=3, spread=1e-300, anisotropic=anisotropic)
    assert float(ran.parameters.abs().max()) < 1e-290
    assert float(ran.replicas[1].shared["particles"].abs().max()) < 1e-290


def test_a_particles_energy_is_its_mean_loss_over_nodes():
    """B5, of losses that differ: the weights are those of the mean of the nodes' losses, to 1e-12."""
    from starling.actors.tasks.quadratic import Quadratic

    keys: Any = {"dimension": 4, "heterogeneity": 2.0, "curvature_heterogeneity": 1.0}
    problem, particles = Quadratic(**keys), first_particles(5)
    losses = torch.tensor([problem.objective(one, 3) for one in particles], dtype=torch.float64)
    expected = (torch.softmax(-30.0 * losses, 0).unsqueeze(1) * particles).sum(0)
    ran = run(3, particles=5, alpha=30.0, task={"name": "quadratic"} | keys)
    # The particles were read after a drift of 1e-13 of their distance.
    torch.testing.assert_close(ran.parameters, expected, rtol=0, atol=2e-12)
    assert torch.equal(ran.replicas[0].shared["particles"], ran.replicas[2].shared["particles"])


class Two(Task):
    """f_0 = ½‖x + 1‖² and f_1 = ½‖x - 1‖² + ``more``: the optimum of the mean is 0, whatever the constant."""

    dimension: int = 2
    more: float = 0.0

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.tensor([[-1.0, 0.0], [1.0, self.more]]), owners=torch.arange(2))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        module = nn.Module()
        module.register_parameter("x", nn.Parameter(torch.zeros(self.dimension)))
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, (places, more) = next(module.parameters()), batch[0].unbind(dim=1)
        return ((x - places.unsqueeze(1)).square().sum(dim=1) / 2 + more).mean()


@pytest.mark.parametrize("more", [0.0, 0.2, 50.0])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_the_consensus_is_the_optimum_of_the_mean_loss(seed: int, more: float):
    """A node whose loss is lower everywhere has no more to say than another."""
    ran = simulate(
        {
            "algorithm": {"name": "cbo", "particles": 40, "spread": 2.0},
            "task": {"name": f"{__name__}:Two", "more": more},
            "evaluation": {"every_rounds": 0},
        },
        nodes=2, rounds=40, seed=seed, optimizer=FP64, data={"batch_size": 1},
    )  # fmt: skip
    assert float(ran.parameters.abs().max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("heterogeneity", [0.0, 2.0])
def test_it_comes_to_the_optimum_of_quadratics_that_differ(heterogeneity: float):
    from starling.actors.tasks.quadratic import Quadratic

    problem = Quadratic(dimension=2, heterogeneity=heterogeneity)
    task = {"name": "quadratic", "dimension": 2, "heterogeneity": heterogeneity}
    ran = run(4, rounds=60, particles=40, spread=2.0, task=task)
    assert problem.objective(ran.parameters, 4) - problem.objective(problem.optimum(4), 4) < 0.01


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


@pytest.mark.slow
def test_it_finds_the_global_minimum_of_rastrigin():
    """B6: d = 2, 200 particles, α = 100, anisotropic: at least 9 of 10 runs."""
    keys: Any = {"particles": 200, "alpha": 100.0, "spread": 2.0, "diffusion": 1.0, "dt": 0.1}
    found = 0
    for seed in range(10):
        ran = simulate(
            {"algorithm": {"name": "cbo"} | keys, "task": f"{__name__}:Rastrigin", "evaluation": {"every_rounds": 0}},
            nodes=1, rounds=25, seed=seed, optimizer=FP64,
        )  # fmt: skip
        found += bool((ran.parameters - 1.0).abs().max() < 0.25)
    assert found >= 9


@pytest.mark.slow
@pytest.mark.parametrize(("anisotropic", "factor"), [(True, 0.8590), (False, 0.81 + 4 * 0.049)])
def test_the_spread_changes_as_computed(anisotropic: bool, factor: float):
    """B7: E‖x − x_α‖² by (1 − λΔt)² + σ²Δt a step (λ = 1, σ = 0.7, Δt = 0.1: 0.8590); isotropic: P times that noise."""
    ran = run(particles=4000, alpha=1e9, drift=1.0, diffusion=0.7, dt=0.1, anisotropic=anisotropic)
    before = first_particles(count=4000) - ran.parameters
    after = ran.replicas[0].shared["particles"] - ran.parameters
    ratio = after.square().sum(1).mean() / before.square().sum(1).mean()
    assert float(ratio) == pytest.approx(factor, rel=0.02)


def test_noise_is_drawn_anew_in_each_round():
    """From x⁺ = x − (x − x_α) λΔt + |x − x_α| z σ √Δt: the z of two rounds are normal, and have nothing in common."""
    keys: dict[str, Any] = {"particles": 200, "drift": 1.0, "diffusion": 0.5, "dt": 0.25}
    seen, drawn = [first_particles(200)], []
    for rounds in (1, 2):
        ran = run(rounds=rounds, **keys)
        seen.append(ran.replicas[0].shared["particles"])
        apart = seen[-2] - ran.parameters
        drawn.append((seen[-1] - seen[-2] + 0.25 * apart) / (0.25 * apart.abs()))
    first, second = (one.flatten() for one in drawn)
    assert [float(one.square().mean()) for one in drawn] == pytest.approx([1.0, 1.0], abs=0.2)
    assert abs(float((first * second).mean())) < 0.15, "of 800 products; equal ones have 1"


def test_particles_without_a_number_have_no_weight():
    ran = run(2, rounds=2, task=f"{__name__}:Holes", alpha=0.0)
    assert bool(ran.parameters.isfinite().all())
    assert float(ran.parameters[0]) < 0


def test_a_joiner_has_the_particles_of_all():
    def watch(number: int, replicas: Any) -> None:
        if number >= 2:
            assert torch.equal(replicas[2].shared["particles"], replicas[0].shared["particles"])
            assert torch.equal(replicas[2].parameters, replicas[0].parameters)

    task = TASK | {"heterogeneity": 1.0}
    scripted([(0, 1)] * 2 + [(0, 1, 2)] * 2, watch, algorithm={"name": "cbo"}, task=task)


def test_its_bytes():
    """Energies of all particles, 8 bytes each, whatever the model."""
    ran = run(3, rounds=2, particles=10)
    assert [one.payload_bytes for one in ran.rounds] == [3 * 2 * 8 * 10] * 2 == [ran.expected_bytes] * 2
    assert CBO().steps_per_round(10, 2) == 0


@pytest.mark.slow
def test_its_bytes_by_parts():
    """Above 64 KiB an exchange is cut into parts."""
    many = run(3, rounds=1, particles=8200)
    assert many.rounds[0].payload_bytes == (2 + 2) * 8 * 8200 == many.expected_bytes
