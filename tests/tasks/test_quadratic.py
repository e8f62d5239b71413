"""Quadratic: the closed forms, held against autograd."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from starling.actors.tasks import Task, TensorSamples
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.registry import find

NODES = 4
PLAIN = Quadratic(dimension=6)
RICH = Quadratic(dimension=6, heterogeneity=0.7, curvature_heterogeneity=2.0, condition=50.0, problem_seed=3)


def at(task: Quadratic, parameters: Tensor) -> nn.Module:
    module = task.build().double()
    cast("nn.Parameter", module.theta).data.copy_(parameters)
    return module


def gradient(task: Quadratic, parameters: Tensor, samples: TensorSamples, indices: Tensor) -> Tensor:
    module = at(task, parameters)
    task.loss(module, samples.batch(indices)).backward()
    return cast("Tensor", cast("nn.Parameter", module.theta).grad)


def owned(samples: TensorSamples, node: int) -> Tensor:
    assert samples.owners is not None
    return (samples.owners == node).nonzero().flatten()


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task", [PLAIN, RICH])
@pytest.mark.parametrize("node", range(NODES))
def test_gradient(task: Quadratic, node: int, theta: Tensor):
    samples = task.train_samples(NODES)
    expected = task.curvature(node) @ (theta - task.center(node))
    for indices in (owned(samples, node), owned(samples, node)[3:8]):
        actual = gradient(task, theta, samples, indices)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_noise_moves_no_optimum(theta: Tensor):
    task = RICH.model_copy(update={"noise": 0.5})
    samples = task.train_samples(NODES)
    for node in range(NODES):
        expected = task.curvature(node) @ (theta - task.center(node))
        mine = owned(samples, node)
        torch.testing.assert_close(gradient(task, theta, samples, mine), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(gradient(task, theta, samples, mine[:5]), expected)
        centers, _ = samples.batch(mine)
        assert float(centers.std()) > 0.25


@pytest.mark.parametrize("task", [PLAIN, RICH])
def test_validation_loss_and_optimum(task: Quadratic, theta: Tensor):
    samples = task.validation_samples(NODES)
    everything = torch.arange(len(samples))
    loss = task.loss(at(task, theta), samples.batch(everything))
    assert float(loss.detach()) == pytest.approx(task.objective(theta, NODES), rel=1e-13)

    optimum = task.optimum(NODES)
    assert gradient(task, optimum, samples, everything).abs().max() < 1e-13
    assert task.baselines(NODES) == {"optimum": task.objective(optimum, NODES)}
    assert task.objective(optimum, NODES) < task.objective(theta, NODES)


def test_optimum_of_a_shared_curvature_is_the_mean_center():
    centers = torch.stack([PLAIN.center(node) for node in range(NODES)])
    torch.testing.assert_close(PLAIN.optimum(NODES), centers.mean(0), rtol=1e-13, atol=1e-13)


def test_curvature():
    eigenvalues = torch.linalg.eigvalsh(PLAIN.curvature(0))
    torch.testing.assert_close(eigenvalues, 10 ** torch.linspace(-1, 0, 6, dtype=torch.float64))
    assert torch.equal(PLAIN.curvature(0), PLAIN.curvature(3))
    assert torch.equal(Quadratic(dimension=3, condition=1).curvature(1), torch.eye(3, dtype=torch.float64))
    for node in range(NODES):
        curvature = RICH.curvature(node)
        assert torch.equal(curvature, curvature.T)
        extra = torch.linalg.eigvalsh(
            curvature - PLAIN.model_copy(update=RICH.model_dump() | {"curvature_heterogeneity": 0}).curvature(node)
        )
        assert 0 < extra[-1] < 2
        assert extra[:-1].abs().max() < 1e-13
    assert not torch.equal(RICH.curvature(0), RICH.curvature(1))


def test_no_heterogeneity():
    task = Quadratic(heterogeneity=0)
    assert torch.equal(task.center(0), task.center(5))
    assert task.baselines(3)["optimum"] == pytest.approx(0, abs=1e-28)


def test_a_node_does_not_depend_on_how_many_there_are():
    task = RICH.model_copy(update={"noise": 0.1})
    few, many = task.train_samples(2), task.train_samples(5)
    for node in range(2):
        for one, other in zip(few.batch(owned(few, node)), many.batch(owned(many, node)), strict=True):
            assert torch.equal(one, other)


def test_seeds_make_different_problems():
    assert not torch.equal(Quadratic(problem_seed=0).center(0), Quadratic(problem_seed=1).center(0))


def test_model_starts_at_zero_and_shapes():
    assert find(Task, "quadratic") is Quadratic
    (theta,) = PLAIN.build().parameters()
    assert (theta.shape, theta.dtype, float(theta.detach().abs().sum())) == ((6,), torch.float32, 0.0)
    samples = PLAIN.train_samples(NODES)
    assert len(samples) == NODES * PLAIN.samples_per_node
    assert all(tensor.dtype == torch.float64 for tensor in samples.batch(torch.arange(2)))


def test_one_dimension():
    task = Quadratic(dimension=1, condition=1, curvature_heterogeneity=1)
    assert task.curvature(0).shape == (1, 1)
    assert task.curvature(0) != task.curvature(1)


def test_per_sample_gradients_by_vmap(theta: Tensor):
    module = at(RICH, theta)
    batch = RICH.train_samples(NODES).batch(torch.tensor([0, 70, 140]))

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, inputs)

        return RICH.loss(cast("nn.Module", call), tuple(row.unsqueeze(0) for row in sample))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))({"theta": theta}, *batch)["theta"]
    expected = [RICH.curvature(node) @ (theta - RICH.center(node)) for node in range(3)]
    torch.testing.assert_close(each, torch.stack(expected), rtol=1e-12, atol=1e-12)
