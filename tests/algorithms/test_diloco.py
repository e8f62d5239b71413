"""DiLoCo, exactly: tests D1 to D7 of its specification, and its bytes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.replica.replica import Replica
from starling.actors.tasks import Task
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Train
from starling.algorithms.low_communication.diloco import DiLoCo
from starling.algorithms.outer import SGD, Nesterov
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests import codecs
from tests.toys import Ran, Slope, Toy, begin, replica, simulate

assert codecs  # imported for the name that it enters into the table
AVERAGING = {"name": "sgd", "lr": 1.0}


def run(task: Task, *, nodes: int, rounds: int, steps: int, outer: Any, batch: int = 8, **keys: Any) -> Ran:
    optimizer = {"name": "sgd", "lr": 0.1} | keys.pop("optimizer", {})
    return simulate(
        algorithm={"name": "diloco", "inner_steps": steps, "outer": outer},
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer=optimizer,
        data={"batch_size": batch},
        evaluation={"every_rounds": 0},
        **keys,
    )


def trained(one: Replica, start: Tensor, number: int, nodes: int, steps: int) -> Tensor:
    """A node's parameters after its inner steps."""
    one.parameters.copy_(start)
    begin(one, number, tuple(range(nodes)))
    one.trainer.train(Train(steps=steps), threading.Event())
    return one.parameters


# --- D1: averaging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 5])
@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (4, 0.1)])
def test_d1_outer_descent_of_one_is_averaging(nodes: int, steps: int, rate: float):
    task = Toy(model="dropout")
    ran = run(task, nodes=nodes, rounds=3, steps=steps, outer=AVERAGING, optimizer={"lr": rate})
    replicas = [replica(node, task=task, num_nodes=nodes, lr=rate) for node in range(nodes)]
    anchor = replicas[0].parameters.clone()
    for number in range(3):
        local = [trained(one, anchor, number, nodes, steps).clone() for one in replicas]
        gradient = anchor - local[0]
        for parameters in local[1:]:
            gradient = gradient + (anchor - parameters)
        anchor = anchor - gradient / nodes
        torch.testing.assert_close(anchor, torch.stack(local).mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(ran.parameters, anchor)


# --- D2: one step is data-parallel gradient descent -----------------------------------------------------------------


def test_d2_one_inner_step_is_descent_on_the_concatenated_batch():
    task, nodes, rate = Toy(), 4, 0.2
    ran = run(
        task, nodes=nodes, rounds=6, steps=1, outer=AVERAGING, batch=4, optimizer={"lr": rate, "precision": "fp64"}
    )
    together = replica(task=task, precision="fp64")
    module: Any = together.trainer.module
    samplers = [replica(node, task=task, num_nodes=nodes).data.own("test") for node in range(nodes)]
    samples = task.train_samples(nodes)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(6):
        optimizer.zero_grad()
        indices = torch.cat([sampler.next(4) for sampler in samplers])
        task.loss(module, tuple(one.double() for one in samples.batch(indices))).backward()
        optimizer.step()
    torch.testing.assert_close(ran.parameters, together.parameters, rtol=1e-12, atol=1e-12)


# --- D3: alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [{"name": "sgd"}, {"name": "adamw", "lr": 0.01}])
def test_d3_one_node_is_plain_training(inner: dict[str, Any]):
    """Also with Adam: the inner optimizer's moments live on from round to round."""
    ran = run(Toy(), nodes=1, rounds=4, steps=5, outer=AVERAGING, optimizer=inner | {"precision": "fp64"})
    alone = replica(**inner, precision="fp64")
    trained(alone, alone.parameters.clone(), 0, 1, 20)
    torch.testing.assert_close(ran.parameters, alone.parameters, rtol=1e-11, atol=1e-13)
    assert ran.summary is not None
    assert ran.summary.bytes["payload"] == 0


# --- D4: equal gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_d4_equal_outer_gradients_are_as_one(nodes: int):
    task = Quadratic(dimension=5, heterogeneity=0)
    outer = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
    one, many = (run(task, nodes=count, rounds=5, steps=3, outer=outer) for count in (1, nodes))
    if nodes == 3:
        torch.testing.assert_close(many.parameters, one.parameters, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(many.parameters, one.parameters)  # a sum of equals of a power of two is exact


# --- D5: Nesterov's sequence ----------------------------------------------------------------------------------------


def test_d5_constant_outer_gradient():
    outer = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
    expected = [-1.33, -3.227, -5.6343, -8.50087, -11.780783]
    for rounds, value in enumerate(expected, start=1):
        options = {"lr": 1.0, "precision": "fp64"}
        ran = run(Slope(), nodes=3, rounds=rounds, steps=1, outer=outer, optimizer=options)
        assert ran.parameters.tolist() == pytest.approx([value, value], rel=1e-13)


# --- D6: order ------------------------------------------------------------------------------------------------------


def test_d6_order_of_arrival_does_not_matter():
    digests = set()
    for speeds in ({}, {0: 0.1}, {0: 0.1, 1: 3.0, 2: 0.5, 3: 7.0}, {3: 0.01, 2: 0.02}):
        network = {"speeds": speeds, "bandwidth_mbps": 5, "latency_ms": 1}
        ran = run(Toy(), nodes=4, rounds=3, steps=2, outer={"name": "nesterov"}, network=network)
        digests.add(ran.digest)
    assert len(digests) == 1


class Relabelled(Quadratic, name="test_relabelled"):
    """Node k has the problem of node ``order[k]``."""

    order: tuple[int, ...]

    def _normal(self, *labels: int | str) -> Tensor:
        *rest, last = labels
        return super()._normal(*rest, self.order[last] if isinstance(last, int) else last)


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 3, 1), (4, 3, 2, 1, 0)])
def test_d6_names_of_nodes_do_not_matter(order: tuple[int, ...]):
    nodes = len(order)
    outer = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
    straight, shuffled = (
        run(Relabelled(dimension=6, samples_per_node=1, order=one), nodes=nodes, rounds=4, steps=3, outer=outer)
        for one in (tuple(range(nodes)), order)
    )
    torch.testing.assert_close(shuffled.parameters, straight.parameters, rtol=1e-5, atol=1e-6)
    assert torch.equal(shuffled.parameters, straight.parameters) or nodes > 2


# --- D7: quadratics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_d7_shared_curvature(eta: float):
    """One round maps θ − c̄ to [I − η (I − (I − aA)^H)] (θ − c̄)."""
    task, nodes, rate, steps = Quadratic(dimension=6), 4, 0.3, 5
    center = torch.stack([task.center(node) for node in range(nodes)]).mean(0)
    identity = torch.eye(6, dtype=torch.float64)
    inner = torch.linalg.matrix_power(identity - rate * task.curvature(0), steps)
    contraction = identity - eta * (identity - inner)
    distance = -center
    for rounds in (1, 2, 3):
        distance = contraction @ distance
        options = {"lr": rate, "precision": "fp64"}
        ran = run(task, nodes=nodes, rounds=rounds, steps=steps, outer={"name": "sgd", "lr": eta}, optimizer=options)
        torch.testing.assert_close(ran.parameters, center + distance, rtol=1e-12, atol=1e-12)


def test_d7_fixed_point_is_the_mean_of_the_centers():
    task = Quadratic(dimension=4, condition=2)
    options = {"lr": 0.5, "precision": "fp64"}
    ran = run(task, nodes=3, rounds=25, steps=5, outer=AVERAGING, optimizer=options)
    torch.testing.assert_close(ran.parameters, task.optimum(3), rtol=1e-12, atol=1e-12)


def biased_fixed_point(task: Quadratic, nodes: int, rate: float, steps: int) -> Tensor:
    """Where Σ M_m (θ − c_m) = 0, M_m = I − (I − a A_m)^H."""
    identity = torch.eye(task.dimension, dtype=torch.float64)
    moves = [
        identity - torch.linalg.matrix_power(identity - rate * task.curvature(node), steps) for node in range(nodes)
    ]
    pulls = [move @ task.center(node) for node, move in enumerate(moves)]
    return torch.linalg.solve(torch.stack(moves).sum(0), torch.stack(pulls).sum(0))


def test_d7_different_curvatures_drift():
    task, nodes, rate, steps = Quadratic(dimension=4, condition=2, curvature_heterogeneity=2.0), 3, 0.3, 6
    expected = biased_fixed_point(task, nodes, rate, steps)
    options = {"lr": rate, "precision": "fp64"}
    ran = run(task, nodes=nodes, rounds=40, steps=steps, outer=AVERAGING, optimizer=options)
    torch.testing.assert_close(ran.parameters, expected, rtol=1e-12, atol=1e-12)
    assert (expected - task.optimum(nodes)).norm() > 0.01


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
@pytest.mark.parametrize("codec", ["identity", "test_blockwise"])
def test_bytes(nodes: int, model: Any, codec: str):
    ran = simulate(
        algorithm={"name": "diloco", "inner_steps": 1, "codec": codec},
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0},
    )
    expected = ran.expected_bytes
    assert [record.payload_bytes for record in ran.rounds] == [expected] * 2
    assert ran.summary is not None
    assert (ran.summary.bytes["payload"], ran.summary.bytes["per_round"]) == (2 * expected, expected)
    values = ran.replicas[0].layout.num_values + ran.replicas[0].layout.num_buffer_values
    if codec == "identity":
        assert expected == (2 if 4 * values > 65536 else nodes) * (nodes - 1) * 4 * values


@pytest.mark.parametrize(("codec", "result_codec"), [("identity", "identity"), ("int8", "bf16"), ("bf16", "int8")])
def test_bytes_in_several_parts(codec: str, result_codec: str):
    ran = simulate(
        algorithm={"name": "diloco", "inner_steps": 1, "codec": codec, "result_codec": result_codec},
        task={"name": "digits", "model": {"name": "mlp", "width": 8000}},
        data={"batch_size": 1},
        nodes=3,
        rounds=1,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    values = 75 * 8000 + 10
    sizes = {"identity": 4 * values, "bf16": 2 * values, "int8": values + 4 * -(-values // 256)}
    assert sizes["identity"] > 2 * 2**20
    assert ran.rounds[0].payload_bytes == ran.expected_bytes == 2 * (sizes[codec] + sizes[result_codec])


# --- the rest -------------------------------------------------------------------------------------------------------


def test_defaults():
    assert DiLoCo() == DiLoCo(inner_steps=500, outer=Nesterov(lr=0.7, momentum=0.9))
    assert DiLoCo(outer=SGD()).model_dump()["outer"] == {"name": "sgd", "lr": 1.0, "momentum": 0.0}


@pytest.mark.parametrize("name", ["diloco", "fedavg"])
@pytest.mark.parametrize("codec", ["sign", "top_k", {"name": "random_k", "unbiased": False}])
def test_codecs_that_need_feedback_are_refused(name: str, codec: Any):
    named = codec if isinstance(codec, str) else codec["name"]
    message = f"codec: what {named} leaves out would never be sent; take fp4, int8, bf16 or identity"
    for key in ("codec", "result_codec"):
        with pytest.raises(ConfigError, match=message if key == "codec" else f"result_codec: {named} needs error"):
            parse({"algorithm": {"name": name, key: codec}, "task": "digits"})


def test_random_places_are_others_in_each_round():
    keys: dict[str, Any] = {"task": "test_toy", "nodes": 2, "rounds": 1}
    algorithm = {"name": "diloco", "inner_steps": 2, "codec": {"name": "random_k", "fraction": 0.3}}
    start = replica(task=Toy()).parameters
    one, two = (simulate(algorithm=algorithm, **keys | {"rounds": rounds}).parameters for rounds in (1, 2))
    moved = one != start
    assert 0 < int(moved.sum()) < 0.5 * len(moved)
    assert int((two != start).sum()) > int(moved.sum())


def test_the_aggregator_combines_the_outer_gradients():
    """One inner step of rate 1 makes of each node's outer gradient its gradient, A θ - A c; one outlier of three."""
    task = Quadratic(dimension=6, heterogeneity=30.0)
    for name, combine in (("median", lambda rows: rows.median(0).values), ("mean", lambda rows: rows.mean(0))):
        ran = simulate(
            algorithm={"name": "diloco", "inner_steps": 1, "outer": AVERAGING, "aggregator": name},
            task={"name": task.name, **task.model_dump(exclude={"name"})},
            nodes=3,
            rounds=2,
            optimizer={"name": "sgd", "lr": 0.3, "precision": "fp64"},
            evaluation={"every_rounds": 0},
        )
        anchor = torch.zeros(6, dtype=torch.float64)
        for _ in range(2):
            rows = [0.3 * task.curvature(node) @ (anchor - task.center(node)) for node in range(3)]
            anchor = anchor - combine(torch.stack(rows))
        torch.testing.assert_close(ran.parameters, anchor, rtol=1e-12, atol=1e-12)


def test_all_nodes_end_with_the_anchor():
    ran = run(Toy(model="batch_norm"), nodes=3, rounds=2, steps=2, outer=AVERAGING)
    for one in ran.replicas.values():
        assert torch.equal(one.parameters, ran.parameters)
        assert torch.equal(one.buffers, ran.replicas[0].buffers)
        assert torch.equal(one.shared["anchor"], one.parameters)  # type: ignore[arg-type]
    assert ran.replicas[0].buffers.any()
