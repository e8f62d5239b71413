"""Logistic: the closed forms held against autograd, the optimum, and rows that do not depend on one another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from starling.actors.tasks import Task, TensorSamples, logistic
from starling.actors.tasks.logistic import Logistic
from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import find

NODES = 4
PLAIN = Logistic(dimension=6)
RICH = Logistic(dimension=6, heterogeneity=3.0, feature_shift=2.0, condition=50.0, noise=0.2, l2=0.05, problem_seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(task: Logistic, parameters: Tensor) -> nn.Module:
    module = task.build().to(parameters.dtype)
    cast("nn.Parameter", module.theta).data.copy_(parameters)
    return module


def everything(samples: TensorSamples, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in samples.tensors)


def owned(samples: TensorSamples, node: int) -> Tensor:
    assert samples.owners is not None
    return (samples.owners == node).nonzero().flatten()


def by_autograd(task: Logistic, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gradient and loss of one node."""
    module = at(task, parameters)
    loss = task.loss(module, batch)
    loss.backward()
    return cast("Tensor", cast("nn.Parameter", module.theta).grad), loss.detach()


def draw(nodes: int, size: int, dimension: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1000 * size + dimension)
    parameters = torch.randn(nodes, dimension, dtype=torch.float64, generator=rng)
    features = torch.randn(nodes, size, dimension, dtype=torch.float64, generator=rng)
    labels = torch.randint(0, 2, (nodes, size), generator=rng) * 2.0 - 1
    return parameters.to(dtype), features.to(dtype), labels.to(dtype)


# --- the problem ----------------------------------------------------------------------------------------------------


def test_loss_is_the_formula(theta: Tensor):
    features, labels = everything(RICH.train_samples(NODES))
    expected = torch.log(1 + torch.exp(-labels * (features @ theta))).mean() + 0.025 * theta.square().sum()
    loss = RICH.loss(at(RICH, theta), (features, labels))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert RICH.objective(theta, NODES) == pytest.approx(float(expected), rel=1e-12)


def test_model_starts_at_zero_and_shapes():
    assert find(Task, "logistic") is Logistic
    (parameters,) = Logistic().build().parameters()
    assert (parameters.shape, parameters.dtype, float(parameters.detach().abs().sum())) == ((100,), torch.float32, 0.0)
    samples = PLAIN.train_samples(NODES)
    features, labels = samples.tensors
    assert len(samples) == NODES * PLAIN.samples_per_node
    assert (features.shape, features.dtype) == ((256, 6), torch.float32)
    assert (labels.shape, labels.dtype, set(labels.tolist())) == ((256,), torch.float32, {-1.0, 1.0})
    assert [len(owned(samples, node)) for node in range(NODES)] == [64] * NODES
    assert PLAIN.objective(torch.zeros(6), NODES) == pytest.approx(math.log(2), rel=1e-15)


def test_a_node_does_not_depend_on_how_many_there_are():
    few, many = RICH.train_samples(2), RICH.train_samples(5)
    for node in range(2):
        for one, other in zip(few.batch(owned(few, node)), many.batch(owned(many, node)), strict=True):
            assert torch.equal(one, other)


def test_seeds_and_nodes_differ():
    features, _ = PLAIN.train_samples(2).tensors
    assert not torch.equal(features[:64], features[64:])
    assert not torch.equal(PLAIN.model_copy(update={"problem_seed": 1}).train_samples(2).tensors[0], features)


def test_variances_of_features():
    task = Logistic(dimension=3, condition=100, samples_per_node=20000)
    features, _ = task.train_samples(1).tensors
    torch.testing.assert_close(features.var(dim=0), torch.tensor([1.0, 0.1, 0.01]), rtol=0.05, atol=0)
    assert (features.mean(dim=0) / features.std(dim=0)).abs().max() < 0.03


def test_feature_shift_moves_each_node_elsewhere():
    task = Logistic(dimension=400, feature_shift=2.0, samples_per_node=2000)
    features, _ = task.train_samples(2).tensors
    scaled = features.view(2, 2000, 400) * 10 ** torch.linspace(0, 0.5, 400)
    means = scaled.mean(dim=1)
    torch.testing.assert_close(means.std(dim=1), torch.tensor([2.0, 2.0]), rtol=0.15, atol=0)
    assert abs(float(torch.corrcoef(means)[0, 1])) < 0.2
    torch.testing.assert_close(scaled.std(dim=1), torch.ones(2, 400), rtol=0.1, atol=0)


def test_noise_is_the_share_of_wrong_labels():
    clean = Logistic(dimension=5, noise=0.0, samples_per_node=20000)
    _, right = clean.train_samples(1).tensors
    _, labels = clean.model_copy(update={"noise": 0.3}).train_samples(1).tensors
    assert float((right != labels).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_without_heterogeneity_and_noise_one_plane_divides_all():
    task = Logistic(dimension=5, heterogeneity=0.0, noise=0.0, l2=1e-6, feature_shift=1.0)
    module = at(task, task.optimum(NODES))
    assert float(task.metrics(module, everything(task.train_samples(NODES)))["accuracy"]) == 1.0
    mixed = task.model_copy(update={"heterogeneity": 3.0})
    module = at(mixed, mixed.optimum(NODES))
    assert float(mixed.metrics(module, everything(mixed.train_samples(NODES)))["accuracy"]) < 0.95


def test_metrics(theta: Tensor):
    features = torch.eye(6, dtype=torch.float64)
    labels = theta.sign() * torch.tensor([1, 1, 1, 1, -1, 1])
    metrics = PLAIN.metrics(at(PLAIN, theta), (features, labels))
    assert float(metrics["accuracy"]) == pytest.approx(5 / 6)
    torch.testing.assert_close(metrics["loss"], PLAIN.loss(at(PLAIN, theta), (features, labels)))


# --- the optimum ----------------------------------------------------------------------------------------------------

HARD = [
    PLAIN,
    RICH,
    Logistic(dimension=1),
    Logistic(dimension=30, feature_shift=5.0, condition=1e4),
    Logistic(dimension=40, noise=0.0, heterogeneity=0.0, l2=1e-8, samples_per_node=8),
]


@pytest.mark.parametrize("task", HARD, ids=repr)
def test_optimum(task: Logistic):
    optimum = task.optimum(NODES)
    held_out = everything(task.validation_samples(NODES))
    gradient, loss = by_autograd(task, optimum, held_out)
    assert gradient.norm() < 1e-9
    assert task.baselines(NODES) == {"optimum": task.objective(optimum, NODES)}
    assert float(loss) == pytest.approx(task.baselines(NODES)["optimum"], rel=1e-12)


def test_validation_loss_is_never_below_the_optimum(theta: Tensor):
    optimum, least = RICH.optimum(NODES), RICH.baselines(NODES)["optimum"]
    held_out = everything(RICH.validation_samples(NODES))
    for scale in (1.0, 1e-2, 1e-4):
        loss = float(RICH.loss(at(RICH, optimum + scale * theta), held_out).detach())
        # Strong convexity: f(θ) − f* ≥ ½ l2 ‖θ − θ*‖².
        assert loss - least >= RICH.l2 / 2 * scale**2 * float(theta.square().sum()) * 0.999
        assert loss - least < 10 * scale**2


def test_gradient_descent_gets_there():
    point, batch = torch.zeros(6), everything(RICH.train_samples(NODES), torch.float32)
    for _ in range(1000):
        gradients, _ = RICH.gradients(point.unsqueeze(0), tuple(one.unsqueeze(0) for one in batch))
        point = point - 0.3 * gradients[0]
    assert RICH.objective(point, NODES) == pytest.approx(RICH.baselines(NODES)["optimum"], rel=1e-6)
    torch.testing.assert_close(point.double(), RICH.optimum(NODES), rtol=0, atol=1e-4)


def test_an_optimum_beyond_precision_is_refused():
    for shift in (1e9, 1e200):
        with pytest.raises(SettingsError, match=r"cannot be found .*; lower feature_shift, or raise l2") as caught:
            Logistic(dimension=5, feature_shift=shift, l2=1e-8).optimum(2)
        assert "\n" not in str(caught.value)


def test_without_a_penalty_there_is_no_optimum():
    with pytest.raises(ValidationError):
        Logistic(l2=0.0)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "size", "dimension"), [(5, 16, 100), (3, 1, 1), (2, 7, 33)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_gradients_are_those_of_autograd(nodes: int, size: int, dimension: int, dtype: torch.dtype, tolerance: float):
    task = Logistic(dimension=dimension, l2=0.3)
    parameters, *batch = draw(nodes, size, dimension, dtype)
    gradients, losses = task.gradients(parameters, tuple(batch))
    assert (gradients.shape, gradients.dtype) == ((nodes, dimension), dtype)
    assert (losses.shape, losses.dtype) == ((nodes,), dtype)
    for node in range(nodes):
        gradient, loss = by_autograd(task, parameters[node], tuple(one[node] for one in batch))
        torch.testing.assert_close(gradients[node], gradient, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(losses[node], loss, rtol=5 * tolerance, atol=tolerance)


def test_gradients_convert_the_data():
    parameters, *batch = draw(3, 4, 5, torch.float64)
    task = Logistic(dimension=5)
    single = task.gradients(parameters, tuple(one.float() for one in batch))
    rounded = task.gradients(parameters, tuple(one.float().double() for one in batch))
    assert all(torch.equal(one, other) for one, other in zip(single, rounded, strict=True))
    assert single[0].dtype == torch.float64


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_huge_margins_are_finite(sign: float, dtype: torch.dtype):
    task = Logistic(dimension=1, l2=1e-3)
    parameters = torch.tensor([[1000.0]], dtype=dtype)
    gradients, losses = task.gradients(parameters, (torch.ones(1, 1, 1), torch.full((1, 1), sign)))
    assert gradients.item() == pytest.approx(1.0 if sign > 0 else 2.0, rel=1e-6)
    assert losses.item() == pytest.approx(500.0 if sign > 0 else 1500.0, rel=1e-6)


SHAPES = [(1000, 16, 101), (1000, 16, 100), (1000, 1, 100), (1000, 5, 3), (999, 2, 1), (1000, 1, 1), (200, 33, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("nodes", "size", "dimension"), [*SHAPES, (9, 64, 1000), (3, 300, 2000)])
def test_rows_are_the_same_bits_whatever_the_other_rows_are(nodes: int, size: int, dimension: int, dtype: torch.dtype):
    task = Logistic(dimension=dimension)
    parameters, *batch = draw(nodes, size, dimension, dtype)
    gradients, losses = task.gradients(parameters, tuple(batch))
    for node in range(nodes):
        # Copies: a slice would lie in memory, with respect to vectors, just where the row lies.
        alone = task.gradients(
            parameters[node : node + 1].clone(), tuple(one[node : node + 1].clone() for one in batch)
        )
        assert torch.equal(alone[0], gradients[node : node + 1])
        assert torch.equal(alone[1], losses[node : node + 1])
    some = torch.randperm(nodes, generator=torch.Generator().manual_seed(0))[: nodes // 2 + 1]
    shuffled = task.gradients(parameters[some], tuple(one[some] for one in batch))
    assert torch.equal(shuffled[0], gradients[some])
    assert torch.equal(shuffled[1], losses[some])


def test_rows_do_not_depend_on_how_the_batch_lies_in_memory():
    parameters, features, labels = draw(20, 16, 50)
    task = Logistic(dimension=50)
    transposed = features.transpose(0, 2).contiguous().transpose(0, 2)
    apart = torch.randn(20, 80)
    apart[:, :50] = parameters
    for one, other in zip(
        task.gradients(apart[:, :50], (transposed, labels.T.contiguous().T)),
        task.gradients(parameters, (features, labels)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_arguments_are_not_written_to():
    arguments = draw(10, 16, 50)
    kept = [one.clone() for one in arguments]
    parameters, *batch = arguments
    Logistic(dimension=50).gradients(parameters, tuple(batch))
    assert all(torch.equal(one, before) for one, before in zip(arguments, kept, strict=True))


def test_blocks_of_nodes_change_nothing(monkeypatch: pytest.MonkeyPatch):
    parameters, *batch = draw(30, 4, 10)
    task = Logistic(dimension=10)
    whole = task.gradients(parameters, tuple(batch))
    for at_once in (1, 120, 1000):
        monkeypatch.setattr(logistic, "_AT_ONCE", at_once)
        for one, other in zip(task.gradients(parameters, tuple(batch)), whole, strict=True):
            assert torch.equal(one, other)


def test_per_sample_gradients_by_vmap(theta: Tensor):
    module = at(RICH, theta)
    batch = everything(TensorSamples(*RICH.train_samples(NODES).batch(torch.tensor([0, 70, 140]))))

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> object:
            return torch.func.functional_call(module, parameters, inputs)

        return RICH.loss(cast("nn.Module", call), tuple(row.unsqueeze(0) for row in sample))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))({"theta": theta}, *batch)["theta"]
    expected, _ = RICH.gradients(theta.expand(3, -1), tuple(one.unsqueeze(1) for one in batch))
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
