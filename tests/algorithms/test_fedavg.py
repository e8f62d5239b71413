"""FedAvg, exactly: centralized descent, weights, drift, cohorts and bytes."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.data import EpochSampler
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Train, View
from starling.algorithms.codecs import Codec
from starling.algorithms.federated.fedavg import FedAvg
from tests.toys import Ran, Toy, begin, replica, simulate


def run(task: Any, *, nodes: int, rounds: int, batch: int = 8, optimizer: Any = None, **keys: Any) -> Ran:
    others = {key: keys.pop(key) for key in ("on_nan", "network", "seed") if key in keys}
    return simulate(
        algorithm={"name": "fedavg"} | keys,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": 0.1} | (optimizer or {}),
        data={"batch_size": batch},
        evaluation={"every_rounds": 0},
        **others,
    )


def descent(task: Toy, rate: float, steps: int) -> Tensor:
    """Gradient descent on all samples at once, in double precision."""
    one = replica(task=task, precision="fp64")
    module: Any = one.trainer.module
    samples = tuple(tensor.double() for tensor in task.train_samples(1).tensors)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(module, samples).backward()
        optimizer.step()
    return one.parameters


# --- one step -------------------------------------------------------------------------------------------------------


def test_one_step_of_all_is_centralized_descent():
    ran = run(Toy(), nodes=4, rounds=5, steps=1, batch=12, weighting="uniform", optimizer={"precision": "fp64"})
    torch.testing.assert_close(ran.parameters, descent(Toy(), 0.1, 5), rtol=1e-12, atol=1e-12)


def test_weights_by_samples_make_up_for_unequal_shares():
    """48 samples on five nodes are 10, 10, 10, 9 and 9; each node's step is on all of its own."""
    options = {"precision": "fp64"}
    ran = run(Toy(), nodes=5, rounds=5, epochs=1, batch=10, optimizer=options)
    assert [ran.replicas[node].num_samples for node in range(5)] == [10, 10, 10, 9, 9]
    expected = descent(Toy(), 0.1, 5)
    torch.testing.assert_close(ran.parameters, expected, rtol=1e-12, atol=1e-12)
    uniform = run(Toy(), nodes=5, rounds=5, epochs=1, batch=10, weighting="uniform", optimizer=options)
    assert not torch.allclose(uniform.parameters, expected, rtol=1e-6, atol=1e-6)


def test_server_step_size():
    """γ < 1 goes a part of the way: x ← x − γ mean Δ."""
    full, half = (run(Toy(), nodes=2, rounds=1, outer={"name": "sgd", "lr": lr}) for lr in (1.0, 0.5))
    start = replica(task=Toy()).parameters
    torch.testing.assert_close(half.parameters - start, (full.parameters - start) / 2, rtol=1e-4, atol=1e-6)


def test_server_momentum_is_kept_from_round_to_round():
    """On ½ ‖y − c_i‖² one step of rate η brings back Δ = η (x − mean c); torch's Nesterov goes along it."""
    task = Quadratic(dimension=3, condition=1, heterogeneity=2.0, samples_per_node=1)
    outer = {"name": "nesterov", "lr": 0.7, "momentum": 0.9}
    ran = run(task, nodes=3, rounds=4, steps=1, outer=outer, optimizer={"lr": 0.5, "precision": "fp64"})
    center = torch.stack([task.center(node) for node in range(3)]).mean(0)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    server = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(4):
        x.grad = 0.5 * (x.detach() - center)
        server.step()
    torch.testing.assert_close(ran.parameters, x.detach(), rtol=0, atol=1e-12)


def test_the_last_batch_of_an_epoch_is_a_step_however_small():
    """48 samples on five nodes are 10, 10, 10, 9 and 9: three batches of 4, twice in a round."""
    ran = run(Toy(), nodes=5, rounds=3, epochs=2, batch=4)
    algorithm: Any = ran.config.algorithm
    assert {one.schedule.step for one in ran.replicas.values()} == {3 * 2 * 3}
    assert [algorithm.steps_per_round(count, 4) for count in (10, 9, 8)] == [6, 6, 4]
    assert FedAvg(steps=7).steps_per_round(10, 4) == 7


# --- many steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3])
def test_definition(epochs: int):
    """x ← x − γ Σ w_i Δ_i, with Δ_i and the weights added up in the order of the nodes."""
    task, nodes = Toy(model="dropout"), 5
    ran = run(task, nodes=nodes, rounds=3, epochs=epochs, batch=4)
    replicas = [replica(node, task=task, num_nodes=nodes, batch_size=4) for node in range(nodes)]
    model = replicas[0].parameters.clone()
    for number in range(3):
        total = torch.zeros(())
        for one in replicas:
            one.parameters.copy_(model)
            begin(one, number, tuple(range(nodes)))
            one.trainer.train(Train(epochs=epochs), threading.Event())
            term = (model - one.parameters) * float(one.num_samples)
            total = term if one.id == 0 else total + term
        model = model - total / 48.0
    assert torch.equal(ran.parameters, model)


def test_several_steps_on_different_problems_drift():
    """The fixed point solves Σ M_m (θ − c_m) = 0 with M_m = I − (I − ηA_m)^K, which is not the optimum."""
    task, nodes, rate, steps = Quadratic(dimension=4, condition=2, curvature_heterogeneity=2.0), 4, 0.3, 5
    identity = torch.eye(4, dtype=torch.float64)
    moves = [
        identity - torch.linalg.matrix_power(identity - rate * task.curvature(node), steps) for node in range(nodes)
    ]
    pulls = [move @ task.center(node) for node, move in enumerate(moves)]
    fixed = torch.linalg.solve(torch.stack(moves).sum(0), torch.stack(pulls).sum(0))
    ran = run(task, nodes=nodes, rounds=40, steps=steps, optimizer={"lr": rate, "precision": "fp64"})
    torch.testing.assert_close(ran.parameters, fixed, rtol=1e-12, atol=1e-12)
    assert (fixed - task.optimum(nodes)).norm() > 0.01
    # With one step there is no drift.
    ran = run(task, nodes=nodes, rounds=200, steps=1, optimizer={"lr": rate, "precision": "fp64"})
    torch.testing.assert_close(ran.parameters, task.optimum(nodes), rtol=1e-9, atol=1e-9)


class Shuffled(Quadratic, name="test_shuffled"):
    """Node k has the problem of node ``order[k]``."""

    order: tuple[int, ...]

    def _normal(self, *labels: int | str) -> Tensor:
        *rest, last = labels
        return super()._normal(*rest, self.order[last] if isinstance(last, int) else last)


def test_names_of_nodes_do_not_matter():
    one, other = (
        run(Shuffled(dimension=5, order=order), nodes=4, rounds=4, steps=3, optimizer={"precision": "fp64"})
        for order in ((0, 1, 2, 3), (2, 0, 3, 1))
    )
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("model", ["mlp", "dropout", "batch_norm"])
def test_uniform_fedavg_is_diloco_without_momentum(nodes: int, model: Any):
    federated = run(Toy(model=model), nodes=nodes, rounds=3, steps=4, weighting="uniform")
    diloco = simulate(
        algorithm={"name": "diloco", "inner_steps": 4, "outer": {"name": "nesterov", "lr": 1.0, "momentum": 0.0}},
        task={"name": "test_toy", "model": model},
        nodes=nodes,
        rounds=3,
        optimizer={"name": "sgd", "lr": 0.1},
        data={"batch_size": 8},
    )
    assert federated.digest == diloco.digest


# --- cohorts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "nodes", "size"),
    [(1.0, 7, 7), (0.5, 4, 2), (0.5, 5, 3), (0.01, 10, 1), (0.07, 100, 7), (0.55, 20, 11), (0.1, 30, 3), (0.3, 10, 3)],
)
def test_size_of_the_cohort(fraction: float, nodes: int, size: int):
    algorithm = FedAvg(fraction=fraction)
    assert algorithm.cohort_size(nodes) == size
    members = tuple(range(0, 3 * nodes, 3))
    cohort = algorithm.participants(View(0, members), torch.Generator().manual_seed(1))
    assert len(cohort) == len(set(cohort)) == size
    assert set(cohort) <= set(members)
    assert cohort == tuple(sorted(cohort))


def test_every_node_has_its_turn():
    ran = run(Toy(), nodes=6, rounds=24, steps=1, fraction=0.5)
    cohorts = [tuple(event["closed"][0]) for event in ran.sought("commit")]
    assert {len(cohort) for cohort in cohorts} == {3}
    counts = [sum(node in cohort for cohort in cohorts) for node in range(6)]
    assert min(counts) >= 5
    assert len(set(cohorts)) > 10
    assert all(record.nodes == 6 and record.contributing == 3 for record in ran.rounds)
    # Who sat out holds the model all the same.
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_cohorts_depend_on_the_seed():
    def cohorts(seed: int) -> list[Any]:
        return [event["closed"] for event in run(Toy(), nodes=6, rounds=6, fraction=0.5, seed=seed).sought("commit")]

    assert cohorts(1) == cohorts(1)
    assert cohorts(1) != cohorts(2)


def test_who_sits_out_does_not_train():
    ran = run(Toy(), nodes=4, rounds=1, epochs=1, fraction=0.25)
    trained = [one for one in ran.replicas.values() if one.schedule.step]
    assert len(trained) == 1
    # The model is the one participant's own.
    alone = replica(trained[0].id, num_nodes=4)
    begin(alone, 0, (0, 1, 2, 3))
    alone.trainer.train(Train(epochs=1), threading.Event())
    torch.testing.assert_close(ran.parameters, alone.parameters, rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_who_is_there():
    """A node whose loss is NaN drops out of the mean, weight and all."""
    ran = run(Toy(poison=0), nodes=3, rounds=1, epochs=1, batch=16, on_nan="skip", optimizer={"precision": "fp64"})
    (event,) = ran.sought("commit")
    others = event["closed"][0]
    assert len(others) == 2
    moved = []
    for node in others:
        one = ran.replicas[node]
        again = replica(node, task=Toy(), num_nodes=3, batch_size=16, precision="fp64")
        again.data._draws = EpochSampler(one.data.own("test").indices, 0, node)
        begin(again, 0, (0, 1, 2))
        again.trainer.train(Train(epochs=1), threading.Event())
        moved.append(again.parameters)
    torch.testing.assert_close(ran.parameters, torch.stack(moved).mean(0), rtol=1e-12, atol=1e-12)


# --- what travels, and what is made of it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "result_codec"), [("int8", "identity"), ("identity", "bf16"), ("fp16", "int8"), ("identity", "identity")]
)
def test_codecs(codec: str, result_codec: str):
    """x ← x − R(mean C(Δ_i)), where C and R are what comes back from the codecs."""

    def through(name: str, values: Tensor) -> Tensor:
        one = Codec.model_validate(name)
        return one.decode(one.encode(values), values.numel(), values.dtype)

    task, nodes = Toy(), 4
    ran = run(task, nodes=nodes, rounds=3, steps=2, weighting="uniform", codec=codec, result_codec=result_codec)
    replicas = [replica(node, task=task, num_nodes=nodes) for node in range(nodes)]
    model = replicas[0].parameters.clone()
    for number in range(3):
        total = torch.zeros_like(model)
        for one in replicas:
            one.parameters.copy_(model)
            begin(one, number, tuple(range(nodes)))
            one.trainer.train(Train(steps=2), threading.Event())
            total = total + through(codec, model - one.parameters)
        model = model - through(result_codec, total / nodes)
    assert torch.equal(ran.parameters, model)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    plain = run(task, nodes=nodes, rounds=3, steps=2, weighting="uniform")
    assert (ran.digest == plain.digest) == (codec == result_codec == "identity")


@pytest.mark.parametrize("field", ["codec", "result_codec"])
def test_codecs_draw_anew_in_each_round(field: str):
    """Equal values rounded alike in all rounds would be wrong by as much in each, and never right on average."""
    algorithm, values = FedAvg.model_validate({field: "qsgd"}), torch.linspace(-1, 1, 512)
    drawn: list[bytes] = []
    for number in (0, 1, 2, 0):
        shared = {"model": torch.zeros(3)}
        node: Any = SimpleNamespace(round=number, participates=False, shared=shared, buffers=torch.zeros(0))
        reduction: Any = algorithm.round(node).send(None)
        drawn.append(bytes(getattr(reduction, field).encode(values).numpy()))
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


def test_another_aggregator():
    """The median of three nodes' models, coordinate by coordinate; weights do not matter to it."""
    task = Quadratic(dimension=5, condition=1, heterogeneity=2.0)
    options = {"lr": 0.5, "precision": "fp64"}
    ran = run(task, nodes=3, rounds=2, steps=1, aggregator="median", optimizer=options)
    centers = torch.stack([task.center(node) for node in range(3)])
    x = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        x = (x - 0.5 * (x - centers)).median(dim=0).values
    torch.testing.assert_close(ran.parameters, x, rtol=0, atol=1e-13)
    mean = run(task, nodes=3, rounds=2, steps=1, optimizer=options)
    assert (mean.parameters - x).abs().max() > 0.01


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [2, 3, 5])
@pytest.mark.parametrize(
    ("codec", "result_codec"),
    [("int8", "identity"), ("identity", "bf16"), ("bf16", "int8"), ({"name": "int8", "block_size": 100}, "int8")],
)
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
def test_bytes_of_codecs(nodes: int, codec: Any, result_codec: Any, model: Any):
    """One byte a value and four a block, or two a value; the inline limit is on what is encoded."""

    def encoded(name: Any, values: int) -> int:
        match name:
            case "identity":
                return 4 * values
            case "bf16":
                return 2 * values
            case _:
                return values + 4 * -(-values // (100 if isinstance(name, dict) else 256))

    ran = simulate(
        algorithm={"name": "fedavg", "steps": 1, "fraction": 0.5, "codec": codec, "result_codec": result_codec},
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    layout, cohort = ran.replicas[0].layout, -(-nodes // 2)
    sizes = layout.num_values, layout.num_buffer_values
    sent, received = (sum(encoded(one, size) for size in sizes) for one in (codec, result_codec))
    parted = (cohort - 1) * sent + (nodes - 1) * received
    expected = parted if sent > 65536 else cohort * (nodes - 1) * sent
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [expected] * 2


@pytest.mark.parametrize("nodes", [2, 3, 5])
@pytest.mark.parametrize("fraction", [1.0, 0.4, 0.01])
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
def test_bytes(nodes: int, fraction: float, model: Any):
    ran = simulate(
        algorithm={"name": "fedavg", "steps": 1, "fraction": fraction},
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0},
    )
    layout = ran.replicas[0].layout
    size = 4 * (layout.num_values + layout.num_buffer_values)
    cohort = FedAvg(fraction=fraction).cohort_size(nodes)
    expected = (cohort - 1) * size + (nodes - 1) * size if size > 65536 else cohort * (nodes - 1) * size
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [expected] * 2
