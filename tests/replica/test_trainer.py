"""The operations that compute without training: batches, gradients, losses, evaluations."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.data import Position
from starling.actors.host.batched import settle_all
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import NonFiniteLossError
from starling.algorithms.api import SERVER, Batch, Evaluate, Gradient, GradientReport, Loss, Node, Step, Train
from starling.algorithms.errors import ProgramError
from starling.algorithms.rules import DataBatch
from starling.algorithms.seeds import generator
from tests.host.test_batched import Closed
from tests.toys import Program, Toy, begin, replica
from tests.training.test_shared_module import colocated, enter

NO_FENCE = threading.Event()


def node(task: Toy | None = None, **keys: Any) -> Replica:
    """Node 1 of 3, in round 4, with 16 samples."""
    one = colocated(3, task, **keys)[1]
    begin(one, 4, (0, 1, 2))
    return one


def flat_gradient(module: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, [one for one in module.parameters() if one.requires_grad])
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def equal(one: DataBatch, other: DataBatch) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(one.tensors, other.tensors, strict=True))


# --- batches --------------------------------------------------------------------------------------------------------


def test_own_batches_are_those_of_training():
    one, other = node(batch_size=3, accumulate=2), node(batch_size=3, accumulate=2)
    assert other.data._draws is not None
    for size, expected in [(None, 6), (4, 4), (100, 6), (None, 6)]:
        batch = one.data.batch(Batch(size=size))
        assert batch.num_samples == len(batch.tensors[0]) == expected
        indices = other.data._draws.next(6 if size is None else size)
        assert equal(batch, DataBatch(other.data.samples.batch(indices), expected))
    one.rollback()
    assert one.data.position == Position(0, 0)


def test_batches_of_a_part_are_the_same_on_all_nodes():
    replicas = colocated(3, nodes=(SERVER, 0, 1, 2))
    enter(replicas, 4)
    first = [one.data.batch(Batch(part=2, size=5)) for one in replicas]
    others = [one.data.batch(Batch(part=1, size=5)) for one in replicas]
    second = [one.data.batch(Batch(part=2, size=5)) for one in replicas]
    for draws in (first, others, second):
        assert all(equal(draws[0], one) for one in draws)
    assert not equal(first[0], second[0])
    parts = replicas[0].data.parts
    assert parts is not None
    for count, batch in enumerate((first[0], second[0])):
        places = torch.randperm(16, generator=generator(0, 4, "part", 2, count))[:5]
        assert equal(batch, DataBatch(replicas[0].data.samples.batch(parts[2][places]), 5))
    # Another round, other samples; the same round again, the same ones.
    one = replicas[1]
    enter([one], 5)
    assert not equal(one.data.batch(Batch(part=2, size=5)), first[0])
    enter([one], 4)
    assert equal(one.data.batch(Batch(part=2, size=5)), first[0])
    assert one.data.position == Position(0, 0)
    whole = one.data.batch(Batch(part=2, size=99))
    assert whole.num_samples == 16
    assert len(whole.tensors[0].unique(dim=0)) == 16


def test_batches_with_a_key_can_be_drawn_again():
    replicas = colocated(3, nodes=(SERVER, 0, 1, 2))
    enter(replicas, 4)
    parts = replicas[0].data.parts
    assert parts is not None
    places = torch.randperm(16, generator=generator(0, "part", 2, "job 7"))[:5]
    expected = DataBatch(replicas[0].data.samples.batch(parts[2][places]), 5)
    for number, draws in ((4, 3), (5, 1), (0, 0)):
        enter(replicas, number)
        for one in replicas[: draws + 1]:
            for _ in range(draws):
                one.data.batch(Batch(part=2, size=5))
            assert equal(one.data.batch(Batch(part=2, size=5, key="job 7")), expected)
            assert equal(one.data.batch(Batch(part=2, size=5, key="job 7")), expected), "twice in a round"
    one = replicas[1]
    assert not equal(one.data.batch(Batch(part=2, size=5, key="job 8")), expected)
    assert not equal(one.data.batch(Batch(part=1, size=5, key="job 7")), expected)
    assert one.data.batch(Batch(part=2, size=99, key="job 7")).num_samples == 16


def test_draws_with_a_key_leave_the_others_alone():
    one, other = node(), node()
    one.data.batch(Batch(part=2, size=5, key="job 7"))
    assert equal(one.data.batch(Batch(part=2, size=5)), other.data.batch(Batch(part=2, size=5)))
    assert one.data.position == Position(0, 0)


def test_another_run_draws_others_with_a_key():
    one, other = node(), node()
    other.data._spec = replace(other.spec, seed=1)
    keyed = Batch(part=2, size=5, key="job 7")
    assert not equal(one.data.batch(keyed), other.data.batch(keyed))


def test_a_key_without_a_part():
    with pytest.raises(ValueError, match=r"^Batch\(key='job 7'\) needs a part: only what is drawn from one can be"):
        Batch(key="job 7")


def test_batches_of_held_out_data():
    replicas = colocated(2, nodes=(SERVER, 0, 1))
    enter(replicas, 4)
    draws = [one.data.batch(Batch("validation", size=7)) for one in replicas]
    assert all(equal(draws[0], one) for one in draws)
    again = replicas[0].data.batch(Batch("validation", size=7))
    assert again.num_samples == 7
    assert not equal(draws[0], again)
    assert replicas[0].data.batch(Batch("validation", size=1000)).num_samples == 20


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Batch(size=0), "Batch takes a size of at least 1; got 0"),
        (Batch(part=3), r"Batch\(part=3\): there is no such part \(there are: 0 to 2\)"),
        (Batch(part=-1), "there is no such part"),
        (Batch("validation", part=1), "held-out data have no parts"),
    ],
)
def test_batches_that_there_are_not(operation: Batch, message: str):
    with pytest.raises(ProgramError, match=message):
        node().data.batch(operation)


def test_a_process_without_the_data():
    one = replica()
    begin(one)
    with pytest.raises(ProgramError, match=r"there is no such part \(there are: none\)"):
        one.data.batch(Batch(part=0))
    with pytest.raises(ProgramError, match="this process has no held-out data"):
        one.data.batch(Batch("validation"))
    with pytest.raises(ProgramError, match="this process has no held-out data"):
        one.evaluate_at(Evaluate())


def test_the_servers_data():
    server = colocated(2, nodes=(SERVER, 0))[0]
    with pytest.raises(ProgramError, match="the server has no training data: it can await no Batch without a part"):
        server.data.batch(Batch())
    with pytest.raises(ProgramError, match="no training data"):
        server.trainer.gradient(Gradient())
    report = server.trainer.gradient(Gradient(batch=server.data.batch(Batch(part=1))))
    assert report.gradient.any()
    assert math.isfinite(server.evaluate_at(Evaluate())["loss"])


# --- gradients and losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        (Toy(model="mlp"), {}),
        (Toy(model="tied"), {}),
        (Toy(model="frozen"), {"precision": "fp64"}),
        (Closed(), {}),
        (Closed(), {"accumulate": 2, "batch_size": 3}),
    ],
    ids=str,
)
def test_gradients_and_losses(task: Toy, keys: dict[str, Any]):
    one = node(task, **keys)
    before = one.parameters.clone()
    point = before + torch.randn(before.shape, dtype=before.dtype, generator=torch.Generator().manual_seed(0))
    for at in (None, point):
        batch = one.data.batch(Batch())
        report, loss = one.trainer.gradient(Gradient(at, batch)), one.trainer.loss(Loss(at, batch))
        with one.bench.shared.at(one.tensors, at):
            expected = task.loss(one.bench.shared.module, batch.tensors)
            torch.testing.assert_close(report.gradient, flat_gradient(one.bench.shared.module, expected))
        assert report.num_samples == batch.num_samples
        assert report.loss == pytest.approx(expected.item(), rel=1e-6)
        assert loss == pytest.approx(report.loss, rel=1e-6)
        assert torch.equal(one.parameters, before)
        kept = report.gradient.clone()
        one.trainer.gradient(Gradient(at, one.data.batch(Batch(part=0))))
        assert torch.equal(report.gradient, kept)  # the program's own


@pytest.mark.parametrize("task", [Toy(model="mlp"), Toy(model="batch_norm"), Closed()], ids=str)
def test_a_step_by_hand_is_a_step_of_training(task: Toy):
    one, same = node(task), node(task)
    for _ in range(3):
        report = one.trainer.gradient(Gradient())
        one.parameters.add_(report.gradient, alpha=-0.1)
        trained = same.trainer.train(Train(steps=1), NO_FENCE)
        assert (trained.loss, trained.num_samples) == (report.loss, report.num_samples)
    assert torch.equal(one.parameters, same.parameters)
    assert torch.equal(one.buffers, same.buffers)
    assert one.data.position == same.data.position


@pytest.mark.parametrize("inner", [{"name": "sgd", "momentum": 0.9}, {"name": "adamw", "grad_clip": 0.02}])
def test_steps_along_gradients_are_training(inner: dict[str, Any]):
    """Moments, clipping and the schedule go on; what the optimizer knew is gone with ``fresh``."""
    keys = inner | {"schedule": {"name": "linear", "warmup_steps": 2}}
    trained, stepped = node(**keys), node(**keys)
    trained.trainer.train(Train(steps=4), NO_FENCE)
    for _ in range(4):
        report = stepped.trainer.gradient(Gradient())
        done = stepped.trainer.step(Step(report.gradient, report))
        assert (done.loss, done.num_samples, done.num_steps) == (report.loss, report.num_samples, 0)
    assert torch.equal(stepped.parameters, trained.parameters)
    forgetful = node(**keys)
    for number in range(4):
        report = forgetful.trainer.gradient(Gradient())
        forgetful.trainer.step(Step(report.gradient, report, fresh=number == 2))
    assert not torch.equal(forgetful.parameters, trained.parameters)
    assert forgetful.optimizer.age == 2


def test_a_step_along_something_else_is_refused():
    one = node()
    report = GradientReport(torch.zeros(3), 1.0, 1)
    with pytest.raises(ProgramError, match=r"Step takes a gradient of shape \[\d+\], not \[3\]"):
        one.trainer.step(Step(report.gradient, report))
    with pytest.raises(NonFiniteLossError, match="parameters are not finite after a Step"):
        one.trainer.step(Step(torch.full_like(one.parameters, torch.inf), report))


def test_they_draw_afresh_and_leave_the_schedule():
    one = node(schedule="linear", rounds=100)
    rate = one.schedule.rate()
    one.trainer.gradient(Gradient())
    assert one.data.position == Position(0, 8)
    one.trainer.loss(Loss())
    assert one.data.position == Position(1, 0)
    assert one.schedule.rate() == rate


def test_another_point_moves_no_statistics():
    one = node(Toy(model="batch_norm"))
    before = one.buffers.clone()
    batch = one.data.batch(Batch())
    elsewhere = one.parameters + 1
    one.trainer.gradient(Gradient(elsewhere, batch))
    one.trainer.loss(Loss(elsewhere, batch))
    assert torch.equal(one.buffers, before)
    one.trainer.loss(Loss(batch=batch))
    assert not torch.equal(one.buffers, before)


def test_one_mask_for_all_points_at_one_batch():
    """Else a difference of gradients, or of losses, would be one of dropout masks."""
    one = node(Toy(model="dropout"))
    batch = one.data.batch(Batch())
    first = one.trainer.gradient(Gradient(batch=batch)).gradient
    loss = one.trainer.loss(Loss(batch=batch))
    assert torch.equal(one.trainer.gradient(Gradient(one.parameters.clone(), batch)).gradient, first)
    assert one.trainer.loss(Loss(one.parameters.clone(), batch)) == loss
    one.data.batch(Batch())
    assert not torch.equal(one.trainer.gradient(Gradient(batch=batch)).gradient, first)
    begin(one, 5, (0, 1, 2))
    assert one.trainer.loss(Loss(batch=batch)) != loss


def test_a_point_in_the_middle_of_something_larger():
    one = node(Toy(model="mlp"))
    batch = one.data.batch(Batch())
    cut = torch.randn(90, generator=torch.Generator().manual_seed(0))[5:88]
    expected = one.trainer.gradient(Gradient(cut.clone(), batch))
    for at in (cut, cut.double(), cut.clone().requires_grad_(True)):
        report = one.trainer.gradient(Gradient(at, batch))
        assert torch.equal(report.gradient, expected.gradient)
        assert report.loss == expected.loss


@pytest.mark.parametrize("operation", [Gradient, Loss])
def test_points_of_another_shape(operation: Any):
    one = node()
    message = r"a model of 83 parameters cannot be computed at a tensor of shape \[1, 83\]"
    with pytest.raises(ProgramError, match=message):
        (one.trainer.gradient if operation is Gradient else one.trainer.loss)(operation(torch.zeros(1, 83)))


def test_mixed_precision():
    one, single = node(precision="bf16"), node()
    batch = one.data.batch(Batch())
    report, exact = one.trainer.gradient(Gradient(batch=batch)), single.trainer.gradient(Gradient(batch=batch))
    assert report.gradient.dtype == torch.float32
    assert report.loss == one.trainer.loss(Loss(batch=batch))
    assert not torch.equal(report.gradient, exact.gradient)
    torch.testing.assert_close(report.gradient, exact.gradient, rtol=0.1, atol=0.02)


def test_a_batch_without_samples():
    one = node()
    nothing = DataBatch(one.data.samples.batch(torch.empty(0, dtype=torch.int64)), 0)
    assert not one.trainer.gradient(Gradient(batch=nothing)).gradient.any()
    assert one.trainer.loss(Loss(batch=nothing)) == 0.0


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Toy(model="mlp"), Closed()], ids=["autograd", "closed form"])
def test_what_is_not_finite_stops(task: Toy):
    one = node(task)
    with pytest.raises(NonFiniteLossError, match=r"node 1, round 4: loss is nan in a Gradient; lower optimizer\.lr"):
        one.trainer.gradient(Gradient(torch.full_like(one.parameters, torch.nan)))
    with pytest.raises(NonFiniteLossError, match=r"node 1, round 4: loss is inf in a Loss; .* on_nan: skip"):
        one.trainer.loss(Loss(torch.full_like(one.parameters, 1e30)))


def test_a_gradient_that_is_not_finite_stops():
    class Steep(Closed):
        def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            gradients, losses = super().gradients(parameters, batch)
            return gradients * torch.inf, losses

    with pytest.raises(NonFiniteLossError, match="the gradient is not finite in a Gradient"):
        node(Steep()).trainer.gradient(Gradient())


def test_what_is_not_finite_skips():
    one = node(skip_nan=True)
    one.parameters.add_(1)
    report = one.trainer.gradient(Gradient(torch.full_like(one.parameters, torch.nan)))
    assert one.guard.skipping
    assert math.isnan(report.loss)
    assert (report.num_samples, report.gradient.tolist()) == (0, [0.0] * 83)
    assert torch.equal(one.parameters, node().parameters)
    begin(one, 5, (0, 1, 2))
    assert math.isnan(one.trainer.loss(Loss(torch.full_like(one.parameters, torch.nan))))
    assert one.guard.skipping


# --- evaluation -----------------------------------------------------------------------------------------------------


class Averaged(Program, name="test_averaged"):
    """Its model is in its shared state, scaled by a local number."""

    def model(self, node: Node) -> Tensor:
        model, scale = node.shared["model"], node.local["scale"]
        assert isinstance(model, Tensor)
        assert isinstance(scale, float)
        return model * scale


def test_evaluation_at_a_point():
    task = Toy(model="linear")
    one = node(task)
    samples = task.validation_samples(3)
    assert one.evaluate_at(Evaluate()) == one.evaluate(samples, None)
    elsewhere = one.evaluate_at(Evaluate(torch.zeros_like(one.parameters)))
    assert elsewhere["loss"] == pytest.approx(samples.tensors[1].square().mean().item(), rel=1e-6)
    assert one.evaluate_at(Evaluate()) == one.evaluate(samples, None)


def test_evaluate_is_at_the_current_parameters_and_not_the_algorithms_model():
    one = replica(algorithm=Averaged(), task=Toy(model="linear"))
    one.data.validation = Toy().validation_samples(1)
    one.shared["model"], one.local["scale"] = torch.zeros(21), 1.0
    assert one.evaluate_at(Evaluate()) != one.evaluate(one.data.validation, None)
    assert one.evaluate_at(Evaluate()) == one.evaluate(one.data.validation, None, one.parameters)


def test_the_committed_model_is_made_of_the_committed_state():
    one = replica(algorithm=Averaged(), task=Toy(model="linear"))
    one.shared["model"], one.local["scale"] = torch.ones(21), 2.0
    one.commit()
    begin(one, 0)
    one.shared["model"], one.local["scale"] = torch.zeros(21), 3.0
    one.stage()
    assert one.committed_model()[0].tolist() == [2.0] * 21
    assert one.spec.algorithm.model(one).tolist() == [0.0] * 21
    settle_all([one], 0)
    assert one.committed_model()[0].tolist() == [0.0] * 21
