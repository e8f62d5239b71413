"""The workbench: nodes that take turns at one module have the bits of nodes that have one each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.data import Iid, assign
from starling.actors.host.build import RunData, build_replicas
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import ReplicaSpec
from starling.actors.tasks import Task
from starling.actors.training.optimizers import OptimizerConfig
from starling.actors.training.slab import Slab, aligned
from starling.algorithms.api import SERVER, Train, View
from starling.algorithms.errors import ProgramError, SettingsError
from tests.toys import INPUTS, OUTPUTS, Silent, Toy, replica


class Never:
    def is_set(self) -> bool:
        return False


def colocated(
    num_nodes: int,
    task: Task | None = None,
    *,
    nodes: tuple[int, ...] | None = None,
    batch_size: int = 8,
    skip_nan: bool = False,
    rounds: int = 10,
    **optimizer: Any,
) -> list[Replica]:
    """Replicas of one process, by default of all nodes, in round 0."""
    task = task or Toy()
    config = OptimizerConfig.model_validate({"lr": 0.1} | optimizer)
    spec = ReplicaSpec(Silent(), task, config, batch_size, 0, rounds, skip_nan)
    samples = task.train_samples(num_nodes)
    data = RunData(samples, task.validation_samples(num_nodes), assign(samples, Iid(), num_nodes, 0))
    nodes = nodes or tuple(range(num_nodes))
    replicas = build_replicas(nodes, spec, data, [torch.device("cpu")] * len(nodes))
    enter(replicas, 0)
    return replicas


def enter(replicas: list[Replica], number: int) -> None:
    members = tuple(sorted(one.id for one in replicas))
    for one in replicas:
        one.begin(number, View(0, members), members)


def train(one: Replica, steps: int = 1) -> None:
    one.trainer.train(Train(steps=steps), Never())


# --- taking turns ---------------------------------------------------------------------------------------------------


def test_one_module_for_all():
    replicas = colocated(3)
    assert len({id(one.bench.shared.module) for one in replicas}) == 1
    assert len({one.parameters.data_ptr() for one in replicas}) == 3
    lonely = replica(2, num_nodes=3)
    assert all(torch.equal(one.parameters, lonely.parameters) for one in replicas)
    assert lonely.layout == replicas[0].layout


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("mlp", {"name": "sgd", "momentum": 0.9}),
        ("mlp", {"name": "adamw"}),
        ("mlp", {"name": "rmsprop"}),
        ("mlp", {"name": "lion"}),
        ("mlp", {"name": "adafactor"}),
        ("linear", {"name": "sgd", "precision": "bf16"}),
        ("batch_norm", {"name": "sgd"}),
        ("cumulative", {"name": "adam"}),
        ("dropout", {"name": "sgd"}),
        ("tied", {"name": "adam", "accumulate": 2}),
        ("frozen", {"name": "sgd", "grad_clip": 0.1}),
    ],
)
def test_turns_are_not_noticed(model: Any, optimizer: dict[str, Any]):
    task = Toy(model=model)
    replicas = colocated(3, task, **optimizer)
    lonely = [replica(node, task=task, num_nodes=3, **optimizer) for node in range(3)]
    enter(lonely, 0)
    for steps in (1, 2, 3):
        for one, other in zip(replicas, lonely, strict=True):
            train(one, steps)
            train(other, steps)
    for one, other in zip(replicas, lonely, strict=True):
        assert one.model_digest() == other.model_digest()
        assert one.evaluate(task.validation_samples(3), None) == other.evaluate(task.validation_samples(3), None)
    assert len({one.model_digest() for one in replicas}) == 3


def test_counters_and_statistics_are_each_nodes_own():
    one, other = colocated(2, Toy(model="batch_norm"))
    train(one, 3)
    train(other, 1)
    counted = [int(each.model_tensors()["1.num_batches_tracked"]) for each in (one, other)]
    assert counted == [3, 1]
    one.rollback()
    assert int(one.model_tensors()["1.num_batches_tracked"]) == 0
    assert one.buffers.tolist() == [0.0] * 5 + [1.0] * 5
    assert other.buffers.tolist() != one.buffers.tolist()


def test_a_module_that_a_program_keeps_is_its_nodes_own():
    one, other = colocated(2, Toy(model="linear"))
    inputs = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(0))
    mine, its = one.module(), other.module()
    one.parameters.fill_(1.0)
    other.parameters.fill_(2.0)
    expected = inputs.sum(dim=1, keepdim=True).expand(4, OUTPUTS) + 1
    for _ in range(2):
        torch.testing.assert_close(mine(inputs), expected)
        torch.testing.assert_close(its(inputs), 2 * expected)
    torch.testing.assert_close(one.module(torch.zeros(21))(inputs), torch.zeros(4, OUTPUTS))


def test_a_programs_module_is_a_function():
    """Neither dropout nor statistics: else what it gives would depend on the global generator and on who called it."""
    one = replica(task=Toy(model="dropout"))
    inputs = torch.ones(2, INPUTS)
    assert torch.equal(one.module()(inputs), one.module()(inputs))
    norm = replica(task=Toy(model="batch_norm"))
    norm.module()(inputs)
    assert norm.buffers.tolist() == [0.0] * 5 + [1.0] * 5


def test_a_graph_does_not_outlive_the_turn():
    one, other = colocated(2, Toy(model="mlp"))
    output = one.module()(torch.ones(2, INPUTS)).sum()
    other.module()(torch.ones(2, INPUTS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_write_to_one_node_is_none_to_another():
    one, other = colocated(2)
    version = other.parameters._version
    one.parameters.add_(1)
    assert other.parameters._version == version
    assert not torch.equal(one.parameters, other.parameters)


@pytest.mark.parametrize("model", ["linear", "batch_norm", "mlp"])
def test_rows_begin_where_tensors_begin(model: Any):
    for one in colocated(3, Toy(model=model)):
        assert one.parameters.is_contiguous()
        assert one.parameters.data_ptr() % 64 == 0
        committed = one.committed_tensors()
        assert committed.parameters.data_ptr() % 64 == 0
        assert torch.equal(committed.parameters, one.parameters)
        assert torch.equal(committed.buffers, one.buffers)


def test_aligned():
    values = torch.arange(64.0)
    assert aligned(values) is values
    assert aligned(values[16:]).data_ptr() == values[16:].data_ptr()
    moved = aligned(values[3:])
    assert torch.equal(moved, values[3:])
    assert moved.data_ptr() % 64 == 0


def test_an_optimizer_that_does_not_fit_is_refused_before_training():
    with pytest.raises(SettingsError, match="optimizer: muon"):
        replica(task=Toy(model="linear"), name="muon")


def test_the_server_has_a_model_and_no_data():
    server, one = colocated(2, nodes=(SERVER, 1))
    assert torch.equal(server.parameters, one.parameters)
    assert server.num_samples == 0
    with pytest.raises(ProgramError, match="the server has no training data"):
        train(server)
    server.commit()
    server.rollback()


# --- other points ---------------------------------------------------------------------------------------------------


def test_other_points_leave_the_node_alone():
    one = replica(task=Toy(model="batch_norm"))
    parameters, buffers = one.parameters.clone(), one.buffers.clone()
    with one.bench.shared.at(one.tensors, torch.zeros_like(parameters)) as point:
        assert not point.any()
        one.bench.shared.mode(training=True)
        one.bench.shared.module(torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(1)))
        assert all(not parameter.any() for parameter in one.bench.shared.module.parameters())
    assert torch.equal(one.parameters, parameters)
    assert torch.equal(one.buffers, buffers)
    module: Any = one.trainer.module
    assert module[0].weight.data_ptr() == one.parameters.data_ptr()
    # At the node's own parameters its statistics move.
    with one.bench.shared.at(one.tensors, one.parameters):
        one.bench.shared.module(torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(one.buffers, buffers)


def test_other_points_end_with_an_exception():
    one = replica()
    with pytest.raises(KeyError), one.bench.shared.at(one.tensors, torch.zeros_like(one.parameters)):
        raise KeyError
    module: Any = one.trainer.module
    assert module[0].weight.data_ptr() == one.parameters.data_ptr()


def test_a_point_of_another_shape():
    one = replica()
    with pytest.raises(ProgramError, match=r"a model of 83 parameters cannot be computed at a tensor of shape \[82\]"):
        one.evaluate(Toy().validation_samples(1), None, torch.zeros(82))
    with pytest.raises(ProgramError, match="a model of 0 buffers"):
        one.evaluate(Toy().validation_samples(1), None, None, torch.zeros(1))


def test_evaluation_of_another_model():
    task = Toy(model="batch_norm")
    one, other = colocated(2, task)
    train(one, 3)
    train(other, 2)
    samples = task.validation_samples(2)
    expected, digest = one.evaluate(samples, None), one.model_digest()
    assert other.evaluate(samples, None) != expected
    counter = other.tensors.counters[0]
    counter.copy_(one.tensors.counters[0])
    assert other.evaluate(samples, None, one.parameters, one.buffers) == expected
    assert other.evaluate(samples, None, one.parameters.double(), one.buffers.double()) == expected
    assert other.model_digest(one.parameters, one.buffers) == digest
    tensors = other.model_tensors(one.parameters, one.buffers)
    assert list(tensors) == list(one.model_tensors())
    assert all(torch.equal(value, tensors[name]) for name, value in one.model_tensors().items())


# --- the gradient ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_somebody_dropped_is_put_back():
    one, same = replica(), replica()
    for each in (one, same):
        enter([each], 0)
        train(each)
    for parameter in one.bench.shared.module.parameters():
        parameter.grad = None
    train(one)
    train(same)
    assert torch.equal(one.parameters, same.parameters)


class Crooked(Toy, name="test_crooked"):
    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return parameters[:, 1:], parameters[:, 0]


def test_a_closed_form_of_another_shape():
    one = replica(task=Crooked(model="linear"))
    enter([one], 0)
    message = r"task tests\.\S+:Crooked: gradients gives shapes \[1, 20\] and \[1\] instead of \[1, 21\] and \[1\]"
    with pytest.raises(ProgramError, match=message):
        train(one)


class Undecided(Toy, name="test_undecided"):
    """Has no closed form after all."""

    def gradients(self, parameters: Tensor, batch: tuple[Tensor, ...]) -> None:
        return None


def test_no_closed_form_after_all():
    one, same = replica(task=Undecided()), replica()
    enter([one, same], 0)
    train(one, 3)
    train(same, 3)
    assert torch.equal(one.parameters, same.parameters)


def test_initial_values_of_a_late_comer():
    """A second slab at a bench at which others have been trained."""
    (one,) = colocated(1)
    train(one, 3)
    late = Slab(one.bench, 2)
    fresh = replica()
    assert all(torch.equal(tensors.parameters, fresh.parameters) for tensors in late.current)
