"""The replica: flat parameters, training, and going back to the last commit."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.data import Position
from starling.actors.host.batched import settle_all
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import Interrupted, NonFiniteLossError
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Node, Train, View
from starling.algorithms.errors import ProgramError, StarlingError
from tests.toys import INPUTS, OUTPUTS, Program, Toy, begin, replica

NO_FENCE = threading.Event()


def train(one: Replica, steps: int | None = 1, epochs: int | None = None) -> Any:
    return one.trainer.train(Train(steps=steps, epochs=epochs), NO_FENCE)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(autouse=True)
def global_generator():
    """Nothing that a replica does touches torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# --- the flat parameters --------------------------------------------------------------------------------------------


def test_parameters_are_views_into_one_tensor():
    one = replica(task=Toy(model="mlp"))
    assert one.parameters.shape == (6 * 8 + 8 + 8 * 3 + 3,)
    module = one.trainer.module
    for entry, (name, parameter) in zip(one.layout.entries, module.named_parameters(), strict=True):
        assert entry.name == name
        assert entry.shape == tuple(parameter.shape)
        assert storage(parameter) == storage(one.parameters)
        assert torch.equal(one.parameters[entry.start : entry.stop].view(entry.shape), parameter)
    one.parameters.zero_()
    assert all(not parameter.any() for parameter in module.parameters())


def test_layout():
    layout = replica(task=Toy(model="mlp")).layout
    assert [(entry.name, entry.start, entry.stop, entry.block) for entry in layout.entries] == [
        ("0.weight", 0, 48, "0"),
        ("0.bias", 48, 56, "0"),
        ("2.weight", 56, 80, "2"),
        ("2.bias", 80, 83, "2"),
    ]
    assert (layout.num_values, layout.nbytes, layout.num_buffer_values) == (83, 332, 0)
    assert replica(precision="fp64").layout.nbytes == 664
    assert [entry.block for entry in replica(task=Toy(model="linear")).layout.entries] == ["", ""]
    assert {entry.block for entry in replica(task=Toy(model="tied")).layout.entries} == {"encoder", "head"}


def test_initial_parameters_depend_on_the_seed_alone():
    assert torch.equal(replica(0).parameters, replica(3, num_nodes=4).parameters)
    assert not torch.equal(replica(seed=0).parameters, replica(seed=1).parameters)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(replica().parameters, replica().parameters)


def test_tied_weights_are_one_entry_and_stay_tied():
    one = replica(task=Toy(model="tied"))
    assert [entry.name for entry in one.layout.entries] == [
        "encoder.weight",
        "encoder.bias",
        "head.weight",
        "head.bias",
    ]
    module: Any = one.trainer.module
    begin(one)
    train(one, 3)
    assert module.decoder.weight is module.encoder.weight
    assert storage(module.decoder.weight) == storage(one.parameters)
    # As a plain loop over the module gives it.
    assert torch.equal(one.parameters, flat(reference(Toy(model="tied"), steps=3)))


def test_frozen_parameters_are_not_trained():
    one = replica(task=Toy(model="frozen"))
    assert [entry.name for entry in one.layout.entries] == ["1.weight", "1.bias"]
    module: Any = one.trainer.module
    before = module[0].weight.clone()
    begin(one)
    train(one, 2)
    assert torch.equal(module[0].weight, before)


def test_buffers_are_views_too():
    one = replica(task=Toy(model="batch_norm"))
    norm: Any = one.trainer.module[1]  # type: ignore[index]
    assert one.layout.num_buffer_values == 10
    assert one.buffers.tolist() == [0.0] * 5 + [1.0] * 5
    begin(one)
    train(one, 2)
    assert storage(norm.running_mean) == storage(one.buffers)
    assert torch.equal(one.buffers, torch.cat([norm.running_mean, norm.running_var]))
    assert norm.running_mean.any()
    one.buffers.fill_(2.0)
    assert norm.running_mean.tolist() == [2.0] * 5


def test_module_at_another_point():
    one = replica(task=Toy(model="linear"))
    inputs = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(0))
    at = torch.arange(21.0)
    expected = inputs @ at[:18].view(OUTPUTS, INPUTS).T + at[18:]
    before = one.parameters.clone()
    torch.testing.assert_close(one.module(at)(inputs), expected)
    assert torch.equal(one.parameters, before)
    assert torch.equal(one.module()(inputs), one.module(before)(inputs))
    at.requires_grad_(True)
    one.module(at)(inputs).sum().backward()
    assert at.grad is not None


def test_gradient_is_allocated_when_it_is_needed():
    one = replica()
    assert one.bench.gradients.values is None
    begin(one)
    train(one)
    assert one.bench.gradients.values is not None
    # What backward left at the parameters is gone: there are not two of them.
    assert all(parameter.grad is None for parameter in one.trainer.module.parameters())
    assert one.bench.optimizers.trained[0].grad is one.bench.gradients.values
    kept = one.bench.gradients.values
    train(one)
    assert one.bench.gradients.values is kept


# --- training -------------------------------------------------------------------------------------------------------


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters() if parameter.requires_grad])


def reference(task: Toy, steps: int, *, batch_size: int = 8, make: Any = None, clip: float | None = None) -> nn.Module:
    """The same training as a plain loop over a module."""
    like = replica(task=task, batch_size=batch_size)
    with torch.random.fork_rng():
        module = task.build()
    for parameter, mine in zip(module.parameters(), like.trainer.module.parameters(), strict=True):
        parameter.data.copy_(mine)
    module.train()
    optimizer = make(module.parameters()) if make else torch.optim.SGD(module.parameters(), lr=0.1)
    samples = task.train_samples(1)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(module, samples.batch(like.data._draws.next(batch_size))).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.01}, None),
        ({"name": "adamw", "weight_decay": 0.1}, None),
        ({"name": "muon", "lr": 0.02}, "per tensor"),
        ({"name": "adafactor", "lr": 0.02}, "per tensor"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_same_bits_as_a_plain_loop(options: dict[str, Any], make: str | None):
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        "muon": lambda p: torch.optim.Muon(p, lr=0.02),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    }
    # Muon is for matrices alone.
    task = Toy(model="linear") if options["name"] != "muon" else NoBias()
    one = replica(task=task, **options)
    assert (len(one.bench.optimizers.trained) == 1 and one.bench.optimizers.trained[0].dim() == 1) == (make is None)
    begin(one)
    train(one, 7)
    assert torch.equal(one.parameters, flat(reference(task, 7, make=kinds[options["name"]])))


class NoBias(Toy, name="test_no_bias"):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, 4, bias=False), nn.Linear(4, OUTPUTS, bias=False))


def test_report():
    one = replica(batch_size=10)
    begin(one)
    report = train(one, 6)
    assert (report.num_steps, report.num_samples) == (6, 48 + 10)  # the epoch of 48 ends with a batch of 8
    assert math.isfinite(report.loss)
    report = train(one, None, epochs=2)
    assert report.num_steps == 2 * 5


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulated_batches_are_one_larger_batch(accumulate: int):
    # 48 samples do not divide by 5 · 8: the last step of an epoch is smaller, and its batches are not of one size.
    few = replica(accumulate=accumulate, batch_size=8, precision="fp64")
    large = replica(batch_size=8 * accumulate, precision="fp64")
    for one in (few, large):
        begin(one)
    for _ in range(2):
        one, other = (train(each, None, epochs=1) for each in (few, large))
        assert (one.num_steps, one.num_samples) == (other.num_steps, other.num_samples)
        assert one.num_samples == 48
        assert one.loss == pytest.approx(other.loss, rel=1e-13)
    torch.testing.assert_close(few.parameters, large.parameters, rtol=1e-13, atol=1e-13)


def test_accumulation_with_a_smaller_last_batch():
    few, large = (replica(accumulate=3, batch_size=10, precision="fp64"), replica(batch_size=30, precision="fp64"))
    for one in (few, large):
        begin(one)
        assert train(one, 4).num_samples == 96
    torch.testing.assert_close(few.parameters, large.parameters, rtol=1e-13, atol=1e-13)


def test_gradient_is_clipped_over_all_parameters():
    one = replica(grad_clip=0.05, task=Toy(model="linear"))
    begin(one)
    train(one, 3)
    expected = flat(reference(Toy(model="linear"), 3, clip=0.05))
    torch.testing.assert_close(one.parameters, expected, rtol=1e-6, atol=1e-7)
    before = one.parameters.clone()
    train(one)
    assert (one.parameters - before).norm().item() <= 0.1 * 0.05 * (1 + 1e-5)


def test_schedule_is_applied_and_goes_on_from_round_to_round():
    """θ ← θ − lr_t (θ − c): the distance to the optimum is a product over the steps."""
    task = Quadratic(dimension=3, condition=1)
    schedule = {"name": "linear", "warmup_steps": 2, "total_steps": 8}
    one = replica(task=task, lr=0.5, precision="fp64", schedule=schedule)
    distance = 1.0
    step = 0
    for number, steps in enumerate((1, 3, 2)):
        begin(one, number)
        train(one, steps)
        for _ in range(steps):
            distance *= 1 - 0.5 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 6)
            step += 1
        torch.testing.assert_close(one.parameters, task.center(0) * (1 - distance), rtol=1e-13, atol=1e-13)


class Epochs(Program, name="test_epochs"):
    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return -(-num_samples // batch_size)


@pytest.mark.parametrize(("accumulate", "total"), [(1, 18), (4, 6)])
def test_planned_steps_are_optimizer_steps(accumulate: int, total: int):
    one = replica(algorithm=Epochs(), rounds=3, accumulate=accumulate, schedule="linear", lr=1.0)
    rates = []
    for number in range(3):
        begin(one, number)
        train(one, None, epochs=1)
        rates.append(one.schedule.rate(-1))
    assert one.schedule.step == total
    assert rates[-1] == pytest.approx(1 / total)


def test_mixed_precision_keeps_single_precision_weights():
    mixed, single = replica(precision="bf16"), replica()
    for one in (mixed, single):
        begin(one)
        assert math.isfinite(train(one, 5).loss)
    assert mixed.parameters.dtype == torch.float32
    assert mixed.bench.gradients.values is not None
    assert mixed.bench.gradients.values.dtype == torch.float32
    assert not torch.equal(mixed.parameters, single.parameters)
    torch.testing.assert_close(mixed.parameters, single.parameters, rtol=0.05, atol=0.01)
    # More than bf16's eight bits are in use.
    assert not torch.equal(mixed.parameters, mixed.parameters.bfloat16().float())


def test_double_precision():
    one = replica(precision="fp64", task=Toy(model="batch_norm"))
    begin(one)
    train(one, 2)
    assert one.parameters.dtype == one.buffers.dtype == torch.float64
    assert one.layout.dtype == torch.float64
    single = replica(task=Toy(model="batch_norm"))
    assert torch.equal(single.parameters.double(), replica(precision="fp64", task=Toy(model="batch_norm")).parameters)


# --- randomness -----------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_round_and_node():
    def parameters(number: int, node: int = 0, seed: int = 0) -> Tensor:
        one = replica(node, task=Toy(model="dropout", num_samples=8), num_nodes=2, batch_size=4, seed=seed)
        one.data.samples = Toy(num_samples=4).train_samples(1)
        one.data._draws._indices = torch.arange(4)
        one.parameters.copy_(replica(task=Toy(model="dropout")).parameters)
        begin(one, number, (0, 1))
        train(one, 2)
        return one.parameters

    assert torch.equal(parameters(3), parameters(3))
    assert not torch.equal(parameters(3), parameters(4))
    assert not torch.equal(parameters(3), parameters(3, node=1))
    assert not torch.equal(parameters(3), parameters(3, seed=1))


def test_dropout_differs_between_the_trains_of_a_round():
    one = replica(task=Toy(model="dropout", num_samples=8))
    masks: list[Tensor] = []
    one.trainer.module[1].register_forward_hook(lambda _module, _inputs, output: masks.append(output == 0))  # type: ignore[index]
    begin(one)
    train(one)
    train(one)
    assert not torch.equal(masks[0], masks[1])


def test_rng_is_a_pure_function():
    def draw(one: Replica, purpose: str) -> list[float]:
        return torch.rand(4, generator=one.rng(purpose)).tolist()

    one, same, other = replica(), replica(), replica(1, num_nodes=2)
    for each in (one, same, other):
        begin(each, 2, (0, 1))
    first = draw(one, "noise")
    train(one, 2)
    assert draw(one, "noise") == first == draw(same, "noise")
    assert len({tuple(first), *(tuple(values) for values in (draw(one, "mask"), draw(other, "noise")))}) == 3
    begin(one, 3, (0, 1))
    assert draw(one, "noise") != first
    assert torch.rand(4, generator=replica(seed=1).rng("noise")).tolist() != first


# --- rounds ---------------------------------------------------------------------------------------------------------


def test_rollback_restores_bits_and_place():
    one = replica(task=Toy(model="batch_norm"))
    begin(one)
    train(one, 4)
    one.shared["x"] = torch.ones(1)
    one.stage()
    assert settle_all([one], 0)
    norm: Any = one.trainer.module[1]  # type: ignore[index]
    before = (one.parameters.clone(), one.buffers.clone(), norm.num_batches_tracked.item(), one.data._draws.position)
    digest = one.model_digest()

    begin(one, 1)
    train(one, 5)
    one.shared["x"] = torch.zeros(1)
    one.local["y"] = 1
    assert one.model_digest() != digest
    one.rollback()
    assert torch.equal(one.parameters, before[0])
    assert torch.equal(one.buffers, before[1])
    assert norm.num_batches_tracked.item() == before[2] == 4
    assert one.data._draws.position == before[3] == Position(0, 32)
    assert one.schedule.step == 4
    assert one.model_digest() == digest
    assert one.shared["x"] == torch.ones(1)
    assert "y" not in one.local


@pytest.mark.parametrize("model", ["mlp", "dropout", "batch_norm", "cumulative"])
def test_a_repeated_round_gives_the_same_bits(model: Any):
    one = replica(task=Toy(model=model))
    begin(one)
    train(one, 2)
    one.stage()
    settle_all([one], 0)
    begin(one, 1)
    train(one, 3)
    train(one, 2)
    first = one.model_digest()
    one.rollback()
    begin(one, 1)
    train(one, 3)
    train(one, 2)
    assert one.model_digest() == first


def test_settling():
    one = replica()
    begin(one, 4)
    train(one)
    moved = one.parameters.clone()
    assert not settle_all([one], 4)  # not staged yet
    one.stage()
    assert not settle_all([one], 3)
    assert settle_all([one], 4)
    assert not settle_all([one], 4)
    one.rollback()
    assert torch.equal(one.parameters, moved)


def test_stage_finds_writes_in_place():
    one = replica()
    one.shared["x"] = torch.zeros(2)
    one.commit()
    begin(one)
    one.shared["x"].add_(1)  # type: ignore[union-attr]
    with pytest.raises(ProgramError, match=r"node\.shared\['x'\]"):
        one.stage()


def test_aliasing_parameters():
    one = replica(task=Toy(model="batch_norm"))
    for alias in (one.parameters, one.parameters[3:], one.buffers):
        for state in (one.shared, one.local):
            with pytest.raises(ProgramError, match="clone"):
                state["x"] = alias
    one.shared["x"] = one.parameters.clone()


class Half(Program, name="test_half"):
    def participants(self, view: View, rng: torch.Generator) -> tuple[int, ...]:
        order = torch.randperm(len(view.members), generator=rng).tolist()
        return tuple(view.members[index] for index in order[: len(order) // 2])


def test_cohort_is_the_same_on_all_nodes_and_changes():
    members = tuple(range(8))
    replicas = [replica(node, num_nodes=8, algorithm=Half(), batch_size=2) for node in members]
    cohorts = []
    for number in range(4):
        for one in replicas:
            begin(one, number, members)
        cohorts.append(tuple(one.id for one in replicas if one.participates))
    assert {len(cohort) for cohort in cohorts} == {4}
    assert len(set(cohorts)) > 1


def test_fence():
    one = replica()
    begin(one)
    fence = threading.Event()
    fence.set()
    before = one.parameters.clone()
    with pytest.raises(Interrupted):
        one.trainer.train(Train(steps=5), fence)
    assert torch.equal(one.parameters, before)


# --- not finite -----------------------------------------------------------------------------------------------------


def test_nan_stops():
    poisoned = Toy(poison=int(replica(0, num_nodes=2).data._draws._indices[0]))
    one = replica(1, task=poisoned, num_nodes=2, batch_size=24)
    begin(one, 7)
    assert math.isfinite(train(one).loss)
    one = replica(0, task=poisoned, num_nodes=2, batch_size=24, lr=0.25)
    begin(one, 7)
    with pytest.raises(NonFiniteLossError) as caught:
        train(one, 3)
    text = str(caught.value)
    assert text.startswith("node 0, round 7: loss is nan after inner step 0 (lr 0.25)")
    assert "on_nan: skip" in text
    assert isinstance(caught.value, StarlingError)


def test_nan_skips():
    one = replica(task=Toy(poison=3), batch_size=24, skip_nan=True, name="adam")
    begin(one)
    committed = one.parameters.clone()
    report = train(one, 2)
    assert math.isnan(report.loss)
    assert (report.num_steps, report.num_samples) == (0, 0)
    assert one.guard.skipping
    assert torch.equal(one.parameters, committed)
    one.stage()
    settle_all([one], 0)
    # The next round begins anew, with moments that have not seen the NaN.
    one.data.samples = Toy().train_samples(1)
    begin(one, 1)
    assert not one.guard.skipping
    assert math.isfinite(train(one, 2).loss)
    assert one.parameters.isfinite().all()


def test_parameters_that_the_last_step_spoiled():
    one = replica(lr=3e38, weight_decay=1e3)
    begin(one, 2)
    # The loss was finite; what its step made of the parameters must not reach the others.
    with pytest.raises(NonFiniteLossError, match="node 0, round 2: parameters are not finite after inner step 0"):
        train(one, 1)
    one = replica(lr=3e38, weight_decay=1e3, skip_nan=True)
    begin(one)
    committed = one.parameters.clone()
    assert math.isnan(train(one, 1).loss)
    assert torch.equal(one.parameters, committed)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_cuda(precision: str):
    device = torch.device("cuda", 0)
    before = torch.cuda.get_rng_state(device) if torch.cuda.is_initialized() else None
    one, same = (replica(task=Toy(model="dropout"), device=device, precision=precision) for _ in range(2))
    for each in (one, same):
        begin(each)
        assert math.isfinite(train(each, 4).loss)
        each.stage()
        settle_all([each], 0)
    assert one.parameters.device == device
    assert one.model_digest() == same.model_digest()
    begin(one, 1)
    train(one, 2)
    one.rollback()
    assert one.model_digest() == same.model_digest()
    assert (
        one.evaluate(Toy().validation_samples(1), None)["loss"]
        == same.evaluate(Toy().validation_samples(1), None)["loss"]
    )
    assert before is None or torch.equal(torch.cuda.get_rng_state(device), before)
    on_cpu = replica(task=Toy(model="mlp"), precision=precision)
    on_gpu = replica(task=Toy(model="mlp"), device=device, precision=precision)
    for each in (on_cpu, on_gpu):
        begin(each)
        train(each, 3)
    torch.testing.assert_close(on_gpu.parameters.cpu(), on_cpu.parameters, rtol=0.02, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_nan_on_cuda_is_found_at_the_end_of_a_train():
    one = replica(task=Toy(poison=0), batch_size=48, device=torch.device("cuda", 0), skip_nan=True)
    begin(one)
    committed = one.parameters.clone()
    assert math.isnan(train(one, 3).loss)
    assert torch.equal(one.parameters, committed)


# --- results --------------------------------------------------------------------------------------------------------


class Elsewhere(Program, name="test_elsewhere"):
    """Its model is not what is being trained."""

    def model(self, node: Node) -> Tensor:
        return torch.full_like(node.parameters, 0.25)


def test_evaluation_is_of_the_algorithms_model():
    task = Toy(model="linear")
    one = replica(task=task, algorithm=Elsewhere())
    before = one.parameters.clone()
    samples = task.validation_samples(1)
    metrics = one.evaluate(samples, None)
    inputs, targets = samples.batch(torch.arange(20))
    expected = ((inputs.sum(1, keepdim=True) * 0.25 + 0.25 - targets) ** 2).mean()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(one.parameters, before)
    assert {name: set(tensor.flatten().tolist()) for name, tensor in one.model_tensors().items()} == {
        "weight": {0.25},
        "bias": {0.25},
    }


def test_evaluation_is_capped_and_weighted_by_samples():
    task = Toy(num_samples=600)
    one = replica(task=task)
    samples = task.train_samples(1)
    everything = one.evaluate(samples, None)["loss"]
    with torch.no_grad():
        expected = task.loss(one.trainer.module, samples.batch(torch.arange(600))).item()
    assert everything == pytest.approx(expected, rel=1e-6)  # batches of 256, 256 and 88
    assert one.evaluate(samples, 1)["loss"] != everything


def test_evaluation_moves_no_statistics():
    one = replica(task=Toy(model="batch_norm"))
    digest = one.model_digest()
    one.evaluate(Toy().validation_samples(1), None)
    assert one.model_digest() == digest
    begin(one)
    train(one)
    assert one.trainer.module.training
