"""Rules: their gradients by hand, and a rule that changes nothing changes no bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import NonFiniteLossError
from starling.algorithms.api import Train
from starling.algorithms.errors import ProgramError
from starling.algorithms.rules import DataBatch, GradientFunction, LocalProblem, Rule
from starling.algorithms.rules.control_variate import ControlVariate
from starling.algorithms.rules.proximal import Proximal
from tests.host.test_batched import Closed
from tests.toys import Toy, begin, replica

NO_FENCE = threading.Event()


def train(one: Replica, rule: Rule | None = None, steps: int = 4, number: int = 0) -> Any:
    begin(one, number)
    return one.trainer.train(Train(steps=steps, rule=rule), NO_FENCE)


def by_hand(task: Toy, steps: int, change: Any, **keys: Any) -> list[Tensor]:
    """θ ← θ - 0.1 · change(θ, g), by autograd on a module of its own; θ before each step and after the last."""
    like = replica(task=task, **keys)
    assert like.data._draws is not None
    module = task.build()
    values = like.parameters.clone()
    samples = task.train_samples(1)
    path = [values.clone()]
    for _ in range(steps):
        batch = samples.batch(like.data._draws.next(like.spec.samples_per_step))
        values = values - 0.1 * change(values, gradient_at(task, module, values, batch))
        path.append(values.clone())
    return path


def gradient_at(task: Toy, module: torch.nn.Module, values: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    start = 0
    for parameter in module.parameters():
        parameter.data = values[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    gradients = torch.autograd.grad(task.loss(module, batch), list(module.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


# --- proximal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Toy(model="mlp"), Closed()], ids=["autograd", "closed form"])
def test_proximal(task: Toy):
    one = replica(task=task)
    anchor = torch.randn(one.layout.num_values, generator=torch.Generator().manual_seed(0))
    kept = anchor.clone()
    train(one, Proximal(0.3, anchor))
    path = by_hand(task, 4, lambda values, gradient: gradient + 0.3 * (values - anchor))
    torch.testing.assert_close(one.parameters, path[-1], rtol=1e-5, atol=1e-6)
    assert torch.equal(anchor, kept)


KINDS: list[tuple[Toy, dict[str, Any]]] = [
    (Toy(model="mlp"), {}),
    (Toy(model="batch_norm"), {"name": "adam"}),
    (Toy(model="dropout"), {"momentum": 0.9}),
    (Toy(model="tied"), {"name": "adafactor"}),
    (Toy(model="frozen"), {"accumulate": 3, "batch_size": 5}),
    (Toy(model="mlp"), {"grad_clip": 0.1, "accumulate": 2}),
    (Toy(model="linear"), {"precision": "bf16"}),
    (Toy(model="linear"), {"precision": "fp64", "name": "lion"}),
    (Closed(), {"momentum": 0.9, "accumulate": 2}),
]


@pytest.mark.parametrize(("task", "keys"), KINDS, ids=str)
def test_rules_without_effect_change_no_bit(task: Toy, keys: dict[str, Any]):
    same = replica(task=task, **keys)
    report = train(same)
    zeros = torch.zeros_like(same.parameters)
    for rule in (Rule(), Proximal(0.0, zeros + torch.inf), ControlVariate(zeros)):
        one = replica(task=task, **keys)
        ruled = train(one, rule)
        assert one.model_digest() == same.model_digest()
        assert (ruled.loss, ruled.num_samples, ruled.num_steps) == (report.loss, report.num_samples, report.num_steps)
        assert one.data.position == same.data.position


# --- control variate ------------------------------------------------------------------------------------------------


def test_control_variate():
    task = Toy(model="mlp")
    one = replica(task=task)
    correction = 0.1 * torch.randn(one.layout.num_values, generator=torch.Generator().manual_seed(0))
    kept = correction.clone()
    seen: list[Tensor] = []

    def change(values: Tensor, gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient + correction

    path = by_hand(task, 4, change)
    rule = ControlVariate(correction)
    assert not rule.mean_gradient.any()
    train(one, rule)
    assert rule.num_gradients == 4
    torch.testing.assert_close(one.parameters, path[-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.mean_gradient, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(correction, kept)


def test_mean_gradient_is_that_of_the_steps():
    """Under plain gradient descent without a correction it is (x - y) / (K η)."""
    one = replica(precision="fp64")
    before = one.parameters.clone()
    rule = ControlVariate(torch.zeros_like(before))
    train(one, rule, steps=5)
    torch.testing.assert_close(rule.mean_gradient, (before - one.parameters) / (5 * 0.1), rtol=1e-10, atol=1e-12)


def test_a_gradient_of_one_step_is_not_overwritten_by_the_next():
    rule = ControlVariate(torch.ones(83))
    one = replica()
    train(one, rule, steps=1)
    first = rule.mean_gradient.clone()
    kept = rule.mean_gradient
    train(one, Proximal(1.0, torch.zeros(83)), steps=2)
    assert torch.equal(kept, first)


# --- rules of a user ------------------------------------------------------------------------------------------------


class Sharpness(Rule):
    """SAM: the gradient at y + r g / ‖g‖."""

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            own, loss = problem.gradient(parameters, batch)
            return problem.gradient(parameters + 0.05 * own / own.norm(), batch)[0], loss

        return gradient


@pytest.mark.parametrize("task", [Toy(model="mlp"), Closed()], ids=["autograd", "closed form"])
def test_a_rule_that_looks_elsewhere(task: Toy):
    one = replica(task=task, batch_size=6, accumulate=2)
    train(one, Sharpness())
    module = task.build()
    like = replica(task=task)
    values = like.parameters.clone()
    sampler = replica(task=task, batch_size=6, accumulate=2).data._draws
    assert sampler is not None
    for _ in range(4):
        batch = task.train_samples(1).batch(sampler.next(12))
        gradient = gradient_at(task, module, values, batch)
        values = values - 0.1 * gradient_at(task, module, values + 0.05 * gradient / gradient.norm(), batch)
    torch.testing.assert_close(one.parameters, values, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_nodes_own_model():
    one, same = (replica(task=Toy(model="batch_norm")) for _ in range(2))
    train(one, Sharpness(), steps=1)
    train(same, steps=1)
    assert torch.equal(one.buffers, same.buffers)
    assert torch.equal(one.tensors.counters[0], same.tensors.counters[0])
    assert not torch.equal(one.parameters, same.parameters)


class Scaled(Rule):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            own, loss = problem.gradient(parameters, batch)
            return own * self.factor, loss

        return gradient


def test_clipping_comes_after_the_rule():
    one = replica(grad_clip=0.01)
    before = one.parameters.clone()
    train(one, Scaled(100.0), steps=1)
    assert float((one.parameters - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


class PerSample(Rule):
    """The mean of gradients that are taken sample by sample, by function transforms on the task's loss."""

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        names = [entry.name for entry in problem.layout.entries]

        class Lifted(torch.nn.Module):
            def __init__(self, values: dict[str, Tensor]) -> None:
                super().__init__()
                self.values = values

            def forward(self, inputs: Tensor) -> Tensor:
                return torch.func.functional_call(problem.module, self.values, (inputs,))

        def loss(values: dict[str, Tensor], *sample: Tensor) -> Tensor:
            batch = DataBatch(tuple(one.unsqueeze(0) for one in sample), 1)
            return problem.loss(Lifted(values), batch)

        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            values = {name: one.detach() for name, one in problem.module.named_parameters()}
            assert all(one.untyped_storage().data_ptr() == parameters.data_ptr() for one in values.values())
            axes = (None, *(0 for _ in batch.tensors))
            each, losses = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=axes)(values, *batch.tensors)
            return torch.cat([each[name].mean(0).reshape(-1) for name in names]), losses.mean()

        return gradient


def test_gradients_of_samples():
    one, same = replica(), replica()
    assert train(one, PerSample()).loss == pytest.approx(train(same).loss, rel=1e-6)
    torch.testing.assert_close(one.parameters, same.parameters, rtol=1e-5, atol=1e-6)


class Backward(Rule):
    """Differentiates the task's loss into the parameters' own ``.grad``, as libraries for private training do."""

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            problem.module.zero_grad(set_to_none=True)
            loss = problem.loss(problem.module, batch)
            loss.backward()
            gradients = [parameter.grad for parameter in problem.module.parameters()]
            return torch.cat([one.reshape(-1) for one in gradients if one is not None]), loss

        return gradient


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "adafactor"}, {"precision": "bf16"}], ids=str)
def test_a_rule_with_a_backward_pass_of_its_own(optimizer: dict[str, Any]):
    one, same = replica(**optimizer), replica(**optimizer)
    assert train(one, Backward()).loss == train(same).loss
    assert torch.equal(one.parameters, same.parameters)
    train(one)
    train(same)
    assert torch.equal(one.parameters, same.parameters)


# --- samplers -------------------------------------------------------------------------------------------------------


class Scripted(Rule):
    """Draws what it is told, and notes what comes of it."""

    def __init__(self, *draws: list[int]) -> None:
        self.draws = [torch.tensor(draw, dtype=torch.int64) for draw in draws]
        self.sizes: list[int] = []
        self.batches: list[DataBatch] = []

    def next(self, size: int) -> Tensor:
        self.sizes.append(size)
        return self.draws.pop(0)

    def sampler(self, problem: LocalProblem) -> Scripted:
        return self

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            self.batches.append(batch)
            return problem.gradient(parameters, batch)

        return gradient


def test_a_rules_sampler():
    one = replica(1, num_nodes=3, batch_size=2, accumulate=2)
    assert one.data._draws is not None
    rule = Scripted([3, 3, 0], [], [15, 1, 2, 3, 4, 5])
    position = one.data.position
    begin(one, 0, (0, 1, 2))
    report = one.trainer.train(Train(steps=3, rule=rule), NO_FENCE)
    assert (report.num_samples, report.num_steps) == (9, 3)
    assert rule.sizes == [4, 4, 4]
    assert one.data.position == position
    inputs = one.data.samples.batch(one.data._draws.indices[torch.tensor([3, 3, 0])])[0]
    assert torch.equal(rule.batches[0].tensors[0], inputs)
    assert [batch.num_samples for batch in rule.batches] == [3, 0, 6]


def test_a_step_without_samples():
    """Its gradient is zero, and its loss counts for nothing."""
    one = replica()
    before = one.parameters.clone()
    report = train(one, Scripted([]), steps=1)
    assert torch.equal(one.parameters, before)
    assert (report.num_samples, report.num_steps) == (0, 1)
    other = replica()
    assert train(other, Scripted([], [1, 2]), steps=2).loss == train(replica(), Scripted([1, 2]), steps=1).loss


@pytest.mark.parametrize(
    "places", [torch.tensor([48]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[1]]), torch.tensor(3)]
)
def test_places_that_are_none(places: Tensor):
    rule = Scripted()
    rule.draws = [places]
    with pytest.raises(
        ProgramError, match=r"the sampler of Scripted must give int64 places of shape \(b,\) in \[0, 48"
    ):
        train(replica(), rule, steps=1)


# --- what rules are given, and what they must give ------------------------------------------------------------------


class Nosy(Rule):
    def __init__(self) -> None:
        self.draws: list[float] = []

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        self.problem = problem
        self.draws.append(torch.rand((), generator=problem.rng).item())
        return problem.gradient


def test_the_problem():
    one = replica(1, num_nodes=3, batch_size=2, accumulate=2)
    rule = Nosy()
    for number in (0, 0, 1):
        begin(one, number, (0, 1, 2))
        one.trainer.train(Train(steps=1, rule=rule), NO_FENCE)
    problem = rule.problem
    assert (problem.num_samples, problem.batch_size, problem.layout) == (16, 4, one.layout)
    assert problem.module is one.bench.shared.module
    again = replica(1, num_nodes=3, batch_size=2, accumulate=2)
    begin(again, 0, (0, 1, 2))
    again.trainer.train(Train(steps=1, rule=rule), NO_FENCE)
    assert rule.draws[3] == rule.draws[0]
    assert len(set(rule.draws)) == 3


class Broken(Rule):
    def __init__(self, gradient: Tensor, loss: Tensor) -> None:
        self.result = gradient, loss

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        return lambda parameters, batch: self.result


@pytest.mark.parametrize(("gradient", "loss"), [((82,), ()), ((1, 83), ()), ((83,), (8,))])
def test_results_of_another_shape(gradient: tuple[int, ...], loss: tuple[int, ...]):
    message = r"Broken gives a gradient of shape .* and a loss of shape .*; they must be \[83\] and \[\]"
    with pytest.raises(ProgramError, match=message):
        train(replica(), Broken(torch.zeros(gradient), torch.zeros(loss)))


def test_results_that_are_not_finite():
    rule = Broken(torch.full((83,), torch.nan), torch.zeros(()))
    with pytest.raises(NonFiniteLossError, match="parameters are not finite after inner step 0"):
        train(replica(), rule, steps=1)
    one = replica(skip_nan=True)
    train(one, rule, steps=1)
    assert one.guard.skipping


def test_gradients_elsewhere_of_another_shape():
    class Cut(Rule):
        def wrap(self, problem: LocalProblem) -> GradientFunction:
            return lambda parameters, batch: problem.gradient(parameters[1:], batch)

    with pytest.raises(ProgramError, match="a model of 83 parameters cannot be computed at a tensor of shape"):
        train(replica(), Cut())
