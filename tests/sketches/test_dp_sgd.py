"""DP-SGD: against per-sample gradients by torch.func, the noise's law, and known values of ε."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starling.algorithms.api import Batch
from starling.algorithms.rules import LocalProblem
from starling.algorithms.seeds import generator
from tests.sketches.dp_sgd import Poisson, PrivateGradient, epsilon
from tests.toys import Ran, Toy, begin, replica, simulate

# Opacus hooks modules, and torch tells that the inputs of the first of them need no gradient, which is so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def problem(size: int = 8) -> tuple[LocalProblem, Tensor]:
    one = replica(task=Toy(num_samples=48), batch_size=size)
    begin(one)
    bench = one.bench
    rng = generator("rule")
    return LocalProblem(
        one.trainer._gradient_at, one.trainer.module, bench.loss.of_module, one.layout, one.num_samples, size, rng
    ), one.parameters


def clipped_sum(parameters: Tensor, batch: tuple[Tensor, ...], clip: float) -> Tensor:
    """Σ g_i min(1, C/‖g_i‖) of the toy's MLP, without hooks: one gradient for each sample by vmap."""

    def loss(theta: Tensor, one: Tensor, target: Tensor) -> Tensor:
        first, bias, second, last = theta.split([8 * 6, 8, 3 * 8, 3])
        hidden = torch.tanh(first.view(8, 6) @ one + bias)
        return (second.view(3, 8) @ hidden + last - target).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
    return (gradients * (clip / gradients.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


@pytest.mark.parametrize("clip", [0.05, 0.5, 1e9])
def test_gradient_is_the_sum_of_clipped_ones(clip: float):
    given, parameters = problem()
    one = replica(task=Toy())
    begin(one)
    batch = one.data.batch(Batch(size=8))
    gradient, _ = PrivateGradient(clip, 0.0).wrap(given)(parameters, batch)
    torch.testing.assert_close(gradient * 8, clipped_sum(parameters, batch.tensors, clip), rtol=1e-5, atol=1e-6)
    assert not any(hasattr(parameter, "grad_sample") for parameter in given.module.parameters())


def test_an_empty_batch_is_noise_of_the_right_size():
    given, parameters = problem()
    one = replica(task=Toy())
    empty = one.data.load(torch.empty(0, dtype=torch.int64))
    rule = PrivateGradient(clip=0.5, noise=3.0).wrap(given)
    draws = torch.cat([rule(parameters, type(one.data.batch(Batch()))(empty, 0))[0] for _ in range(100)])
    # 8300 draws: their standard deviation is within 4 % of the true one in all but one of 10⁶ cases.
    assert float(draws.std()) == pytest.approx(3.0 * 0.5 / 8, rel=0.04)
    assert abs(float(draws.mean())) < 5 * 3.0 * 0.5 / 8 / len(draws) ** 0.5


def test_batches_are_poissons():
    sampler = Poisson(60, generator("poisson"))
    drawn = [sampler.next(6) for _ in range(2000)]
    sizes = torch.tensor([len(one) for one in drawn], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(6, abs=0.25)
    assert float(sizes.var()) == pytest.approx(60 * 0.1 * 0.9, rel=0.15)
    assert torch.bincount(torch.cat(drawn), minlength=60).min() > 120


@pytest.mark.parametrize(("noise", "rate", "steps", "expected"), [(1.0, 0.01, 1000, 2.10137), (2.0, 0.1, 100, 2.58057)])
def test_epsilon(noise: float, rate: float, steps: int, expected: float):
    assert epsilon(noise, rate, steps, 1e-5) == pytest.approx(expected, rel=1e-4)


def run(noise: float, seed: int = 0) -> Ran:
    return simulate(
        algorithm={"name": "tests.sketches.dp_sgd:PrivateAveraging", "noise": noise, "clip": 5.0},
        task={"name": "digits", "model": {"name": "mlp", "width": 16}},
        optimizer={"name": "sgd", "lr": 0.5},
        data={"batch_size": 64},
        rounds=12,
        nodes=3,
        seed=seed,
        evaluation={"every_rounds": 0},
    )


def test_it_learns_and_more_noise_is_worse():
    quiet, noisy = (run(noise).summary for noise in (0.3, 20.0))
    assert quiet is not None
    assert noisy is not None
    assert quiet.metrics["accuracy"] > 0.8
    assert noisy.metrics["accuracy"] < 0.6


def test_every_node_has_a_ledger_of_its_own():
    ran = run(1.0)
    assert [one.local["steps"] for one in ran.replicas.values()] == [60, 60, 60]
    assert run(1.0).digest == ran.digest != run(1.0, seed=1).digest
