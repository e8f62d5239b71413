"""Many nodes at once: the bits of one after another, whatever else happens on the way."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.host import batched
from starling.actors.host.batched import commit_all, settle_all, train_together
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import Interrupted, NonFiniteLossError
from starling.actors.replica.staged_state import same_bits
from starling.actors.tasks.logistic import Logistic
from starling.actors.training.updates import update_of
from starling.algorithms.api import SERVER, Train, TrainReport
from starling.algorithms.errors import ProgramError
from starling.algorithms.rules.proximal import Proximal
from tests.toys import INPUTS, OUTPUTS, Toy
from tests.training.test_shared_module import colocated, enter

NO_FENCE = threading.Event()
SIZES: list[int] = []
"""How many nodes each call of ``Closed.gradients`` was for."""


@pytest.fixture(autouse=True)
def sizes():
    SIZES.clear()


class Closed(Toy, name="test_closed"):
    """Linear least squares; the gradient in closed form, by sums that do not depend on the number of rows."""

    def build(self) -> nn.Module:
        return nn.Linear(INPUTS, OUTPUTS)

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        SIZES.append(len(parameters))
        inputs, targets = batch
        weight = parameters[:, : INPUTS * OUTPUTS].unflatten(1, (OUTPUTS, INPUTS))
        outputs = (inputs.unsqueeze(2) * weight.unsqueeze(1)).sum(3) + parameters[:, None, INPUTS * OUTPUTS :]
        residuals = (outputs - targets) * (2 / (OUTPUTS * inputs.shape[1]))
        slopes = (residuals.unsqueeze(3) * inputs.unsqueeze(2)).sum(1).flatten(1)
        losses = (outputs - targets).square().sum(2).sum(1) / (OUTPUTS * inputs.shape[1])
        return torch.cat([slopes, residuals.sum(1)], dim=1), losses


def outcomes(replicas: list[Replica], operation: Train) -> list[Any]:
    return train_together([(one, operation, NO_FENCE) for one in replicas])


def alone(replicas: list[Replica], operation: Train) -> list[Any]:
    return [one.trainer.train(operation, NO_FENCE) for one in replicas]


def assert_same(some: list[Replica], others: list[Replica]) -> None:
    for one, other in zip(some, others, strict=True):
        # Not torch.equal, for which NaN is not NaN.
        assert same_bits({"": one.parameters}, {"": other.parameters})
        assert one.data.position == other.data.position
        assert one.schedule.step == other.schedule.step
        assert one.optimizer.age == other.optimizer.age
        assert same_bits(one.optimizer.moments, other.optimizer.moments)


def plain(reports: list[Any]) -> list[tuple[float, int, int]]:
    return [(one.loss, one.num_samples, one.num_steps) for one in reports]


OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "momentum": 0.5, "dampening": 0.1, "maximize": True, "lr": 1e-3},
    {"name": "adam", "weight_decay": 0.01},
    {"name": "adamw", "amsgrad": True, "betas": (0.8, 0.9)},
    {"name": "sgd", "grad_clip": 0.05},
    {"name": "adam", "accumulate": 2, "grad_clip": 10.0},
    {"name": "sgd", "momentum": 0.9, "precision": "fp64"},
    {"name": "sgd", "schedule": {"name": "cosine", "warmup_steps": 3, "total_steps": 20}},
]


OPERATIONS = [Train(steps=3), Train(epochs=2), Train(epochs=1, batch_size=5, lr_factor=0.3)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=["steps", "epochs", "size and factor"])
def test_the_bits_of_one_after_another(optimizer: dict[str, Any], operation: Train):
    # 97 samples: some nodes have 20 and some 19, so that the last batch of an epoch has 4 samples or 3.
    task = Closed(num_samples=97)
    some, others = (colocated(5, task, **optimizer) for _ in range(2))
    for number in range(3):
        enter(some, number)
        enter(others, number)
        expected = alone(others, operation)
        assert max(SIZES) == 1
        SIZES.clear()
        assert plain(outcomes(some, operation)) == plain(expected)
        assert max(SIZES) > 1
        SIZES.clear()
        assert_same(some, others)
    assert not torch.equal(some[0].parameters, some[1].parameters)


def test_a_closed_form_stands_for_autograd():
    some, others = colocated(2, Closed()), colocated(2, Toy(model="linear"))
    closed, derived = (outcomes(replicas, Train(steps=5)) for replicas in (some, others))
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.parameters, other.parameters)
    assert [one.loss for one in closed] == pytest.approx([one.loss for one in derived], rel=1e-5)


def test_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batched, "_MAX_ROWS", 2)
    some, others = (colocated(5, Closed(), name="adam") for _ in range(2))
    assert plain(outcomes(some, Train(steps=2))) == plain(alone(others, Train(steps=2)))
    assert_same(some, others)


def test_any_order_and_any_subset():
    """Moments go from rows to nodes and back; those who sat out are in a group of their own."""
    some, others = (colocated(6, Closed(), name="adamw") for _ in range(2))
    for places in ([3, 1, 5], [0, 1, 2, 3, 4, 5], [4], [5, 4, 3, 2, 1, 0], [2, 3]):
        mine, theirs = ([replicas[place] for place in places] for replicas in (some, others))
        SIZES.clear()
        outcomes(mine, Train(steps=2))
        alone(theirs, Train(steps=2))
        assert_same(some, others)
    assert len({one.optimizer.age for one in some}) > 1


def test_logistic():
    some, others = (colocated(40, Logistic(dimension=7, samples_per_node=10)) for _ in range(2))
    for _ in range(3):
        assert plain(outcomes(some, Train(epochs=1))) == plain(alone(others, Train(epochs=1)))
    assert_same(some, others)


def test_requests_of_different_kinds():
    some, others = (colocated(6, Closed()) for _ in range(2))
    small, slow = Train(steps=2, batch_size=4), Train(steps=2, lr_factor=0.5)
    operations = [Train(steps=1), Train(steps=2), Train(epochs=1), Train(steps=2), small, slow]
    reports = train_together([(one, two, NO_FENCE) for one, two in zip(some, operations, strict=True)])
    expected = [one.trainer.train(two, NO_FENCE) for one, two in zip(others, operations, strict=True)]
    assert plain(reports) == plain(expected)
    assert_same(some, others)


@pytest.mark.parametrize(
    ("task", "optimizer", "rule"),
    [
        (Toy(model="linear"), {"name": "sgd"}, False),
        (Closed(), {"name": "rmsprop"}, False),
        (Closed(), {"name": "adafactor"}, False),
        (Closed(), {"name": "sgd", "foreach": False}, False),
        (Closed(), {"name": "sgd", "precision": "bf16"}, False),
        (Closed(), {"name": "sgd"}, True),
    ],
    ids=["autograd", "object", "per tensor", "option", "autocast", "rule"],
)
def test_what_is_trained_one_by_one(task: Toy, optimizer: dict[str, Any], rule: bool):
    some, others = (colocated(3, task, **optimizer) for _ in range(2))
    turns: list[int] = []
    anchor = some[0].parameters.clone()
    operation = Train(steps=2, rule=Proximal(0.1, anchor) if rule else None)
    reports = train_together([(one, operation, NO_FENCE) for one in some], turns.append)
    assert turns == [0, 1, 2]
    assert plain(reports) == plain(alone(others, operation))
    assert_same(some, others)
    assert max(SIZES, default=1) == 1


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("skip", [False, True])
def test_one_loss_is_not_finite(step: int, skip: bool):
    order = colocated(3, Closed(num_samples=48))[1].data._draws
    assert order is not None
    task = Closed(num_samples=48, poison=int(order.draw(16)[8 * step]))
    some, others = (colocated(3, task, name="adam", skip_nan=skip) for _ in range(2))
    expected: list[Any] = []
    for one in others:
        try:
            expected.append(one.trainer.train(Train(steps=2), NO_FENCE))
        except NonFiniteLossError as error:
            expected.append(error)
    results = outcomes(some, Train(steps=2))
    assert_same(some, others)
    assert [one.guard.skipping for one in some] == [False, skip, False] == [one.guard.skipping for one in others]
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, TrainReport):
            assert repr(plain([result])) == repr(plain([wanted]))
        else:
            assert str(result) == str(wanted)
            assert f"after inner step {step}" in str(result)
    assert isinstance(results[1], TrainReport) == skip


def test_parameters_that_the_last_step_spoiled():
    some = colocated(3, Closed(), lr=1e-3, skip_nan=True)
    some[1].parameters.fill_(1e38)
    results = outcomes(some, Train(steps=1))
    assert [math.isnan(one.loss) for one in results] == [False, True, False]
    assert [one.guard.skipping for one in some] == [False, True, False]
    assert all(one.parameters.isfinite().all() for one in some)


def test_fences():
    some, others = (colocated(3, Closed()) for _ in range(2))
    up = threading.Event()
    up.set()
    results = train_together([(one, Train(steps=2), up if one.id == 1 else NO_FENCE) for one in some])
    assert isinstance(results[1], Interrupted)
    alone([others[0], others[2]], Train(steps=2))
    assert_same(some, others)


class Picky(Closed, name="test_picky"):
    """Refuses a batch with a certain sample."""

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if batch[1].isnan().any():
            message = "not this one"
            raise KeyError(message)
        return super().gradients(parameters, batch)


def test_one_node_raises():
    order = colocated(3, Closed())[2].data._draws
    assert order is not None
    some, others = (colocated(3, Picky(poison=int(order.draw(8)[0]))) for _ in range(2))
    results = outcomes(some, Train(steps=2))
    assert isinstance(results[2], KeyError)
    assert plain(results[:2]) == plain(alone(others[:2], Train(steps=2)))
    assert_same(some[:2], others[:2])


def test_the_server_does_not_train():
    server, one = colocated(2, Closed(), nodes=(SERVER, 1))
    refused, report = outcomes([server, one], Train(steps=1))
    assert isinstance(refused, ProgramError)
    assert isinstance(report, TrainReport)


def test_nothing_to_do():
    assert train_together([]) == []
    commit_all([])
    assert settle_all([], 3) == []


# --- commits --------------------------------------------------------------------------------------------------------


def test_settling_some():
    replicas = colocated(7, Toy(model="batch_norm"))
    enter(replicas, 4)
    alone(replicas, Train(steps=1))
    moved = [one.parameters.clone() for one in replicas]
    moved_buffers = [one.buffers.clone() for one in replicas]
    due = [replicas[place] for place in (5, 1, 2, 4)]
    for one in due:
        one.local["x"] = one.id
        one.stage()
    assert settle_all(replicas, 3) == []
    assert settle_all(replicas, 4) == sorted(due, key=lambda one: one.id)
    assert settle_all(replicas, 4) == []
    fresh = colocated(1, Toy(model="batch_norm"))[0]
    for one, parameters, buffers in zip(replicas, moved, moved_buffers, strict=True):
        one.rollback()
        committed = one in due
        assert torch.equal(one.parameters, parameters if committed else fresh.parameters)
        assert torch.equal(one.buffers, buffers if committed else fresh.buffers)
        assert int(one.tensors.counters[0]) == committed
        assert one.local.get("x") == (one.id if committed else None)
        assert one.schedule.step == committed
        assert one.committed_round == (4 if committed else -1)


# --- updates --------------------------------------------------------------------------------------------------------


def test_updates_are_those_of_torch():
    rng = torch.Generator().manual_seed(0)
    makers: list[tuple[str, Any, dict[str, Any]]] = [
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        ("adam", torch.optim.Adam, {}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}),
        ("adamw", torch.optim.AdamW, {"betas": (0.5, 0.6), "maximize": True}),
    ]
    for name, make, options in makers:
        update = update_of(name, options)
        assert update is not None
        # 37 values: rows begin anywhere in a vector register.
        values = torch.randn(5, 37, generator=rng)
        parameters = [nn.Parameter(row.clone()) for row in values]
        optimizers = [make([parameter], lr=0.1, **options) for parameter in parameters]
        moments: dict[str, Tensor] = {}
        for age in range(5):
            gradient = torch.randn(5, 37, generator=rng)
            for row, optimizer in enumerate(optimizers):
                parameters[row].grad = gradient[row].clone()
                optimizer.param_groups[0]["lr"] = 0.1 / (age + 1)
                optimizer.step()
            update(values, gradient, moments, age, 0.1 / (age + 1))
            assert torch.equal(values, torch.stack([parameter.detach() for parameter in parameters]))


def test_optimizers_that_take_an_object():
    assert update_of("lion", {}) is None
    assert update_of("sgd", {"foreach": True}) is None
    assert update_of("adam", {"capturable": True}) is None
