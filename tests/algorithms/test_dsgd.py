"""D-SGD, exactly: matrices written by hand, centralized descent, consensus, bias, bytes and time."""

from __future__ import annotations

import threading
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Train
from starling.algorithms.topologies import Topology
from starling.algorithms.topologies.one_peer_exponential import OnePeerExponential
from tests.membership import models, scripted
from tests.toys import Ran, Toy, begin, replica, simulate

PROBLEM: dict[str, Any] = {"dimension": 4, "condition": 2, "curvature_heterogeneity": 1.0, "samples_per_node": 1}
TASK = Quadratic(**PROBLEM)
RATE = 0.2
ATOL: dict[str, Any] = {"rtol": 0, "atol": 1e-12}

# The learning rate is 0 from the second step on: what is left of a round is its mixing.
MIXING_ONLY = {"schedule": {"name": "linear", "total_steps": 1}}

RING_OF_5 = torch.tensor(
    [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], dtype=torch.float64
).div(3)
EXPONENTIAL_OF_5 = torch.tensor(
    [[1, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 0, 1, 1]], dtype=torch.float64
).div(4)
GRAPHS: dict[str, Tensor] = {"ring": RING_OF_5, "exponential": EXPONENTIAL_OF_5}


def history(rounds: int, *, nodes: int = 5, optimizer: Any = None, task: Any = TASK, **keys: Any) -> list[Tensor]:
    """Parameters of all nodes before the first round and after each, shapes (N, P)."""
    others = {key: keys.pop(key) for key in ("network", "cluster", "seed") if key in keys}
    seen: list[Tensor] = []
    scripted(
        [tuple(range(nodes))] * rounds,
        lambda _, replicas: seen.append(models(replicas)),
        algorithm={"name": "dsgd"} | keys,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        optimizer={"name": "sgd", "lr": RATE, "precision": "fp64"} | (optimizer or {}),
        **others,
    )
    return [torch.zeros_like(seen[0]), *seen]


def gradients(x: Tensor, task: Quadratic = TASK) -> Tensor:
    """Those of each node at its own point, shape (N, d)."""
    return torch.stack([task.curvature(node) @ (point - task.center(node)) for node, point in enumerate(x)])


def trained(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = x - RATE * gradients(x)
    return x


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("topology", GRAPHS)
@pytest.mark.parametrize("order", ["atc", "cta"])
def test_definition(order: Literal["atc", "cta"], topology: str, steps: int):
    mixing, x = GRAPHS[topology], torch.zeros(5, 4, dtype=torch.float64)
    for after in history(6, topology=topology, steps=steps, order=order)[1:]:
        x = mixing @ trained(x, steps) if order == "atc" else mixing @ x + trained(x, steps) - x
        torch.testing.assert_close(after, x, **ATOL)


def test_combine_then_adapt_of_one_step_takes_the_gradient_at_the_own_model():
    x = torch.zeros(5, 4, dtype=torch.float64)
    for after in history(8, order="cta")[1:]:
        x = RING_OF_5 @ x - RATE * gradients(x)
        torch.testing.assert_close(after, x, **ATOL)


def test_the_orders_are_different_algorithms():
    adapt_first, combine_first = (history(3, order=order)[-1] for order in ("atc", "cta"))
    assert (adapt_first - combine_first).abs().max() > 0.01


@pytest.mark.parametrize("order", ["atc", "cta"])
def test_buffers_are_mixed_and_optimizers_are_not(order: Literal["atc", "cta"]):
    """Batch statistics, and momentum that each node keeps for itself."""
    task, nodes, options = Toy(model="batch_norm"), 5, {"momentum": 0.9, "precision": "fp64"}
    ran = simulate(
        algorithm={"name": "dsgd", "order": order, "steps": 2},
        task={"name": "test_toy", "model": "batch_norm"},
        nodes=nodes,
        rounds=3,
        optimizer={"name": "sgd", "lr": 0.1} | options,
        data={"batch_size": 5},
    )
    replicas = [replica(node, task=task, num_nodes=nodes, batch_size=5, **options) for node in range(nodes)]
    for number in range(3):
        before = [{name: getattr(node, name).clone() for name in ("parameters", "buffers")} for node in replicas]
        for node in replicas:
            begin(node, number, tuple(range(nodes)))
            node.trainer.train(Train(steps=2), threading.Event())
        for name in ("parameters", "buffers"):
            after = torch.stack([getattr(node, name) for node in replicas])
            start = torch.stack([values[name] for values in before])
            mixed = RING_OF_5 @ after if order == "atc" else RING_OF_5 @ start + after - start
            for node, row in zip(replicas, mixed, strict=True):
                getattr(node, name).copy_(row)
    assert replicas[0].buffers.numel()
    for node in replicas:
        torch.testing.assert_close(ran.replicas[node.id].parameters, node.parameters, **ATOL)
        torch.testing.assert_close(ran.replicas[node.id].buffers, node.buffers, **ATOL)


# --- A1.3, A1.4 and E1: the complete graph --------------------------------------------------------------------------


def test_e1_on_a_complete_graph_it_is_centralized_descent():
    x = torch.zeros(4, dtype=torch.float64)
    for after in history(20, topology="complete")[1:]:
        x = x - RATE * gradients(x.expand(5, -1)).mean(0)
        torch.testing.assert_close(after, x.expand(5, -1), **ATOL)


@pytest.mark.parametrize("rounds", [1, 20])
def test_e1_on_a_complete_graph_it_is_fedavg_and_all_reduce_sgd(rounds: int):
    """On a neural network; that FedAvg of one step is descent on all samples is in ``test_fedavg``."""
    common: dict[str, Any] = {
        "task": "test_toy",
        "nodes": 4,
        "rounds": rounds,
        "optimizer": {"name": "sgd", "lr": 0.1, "precision": "fp64"},
        "data": {"batch_size": 12},
    }
    gossip = simulate(algorithm={"name": "dsgd", "topology": "complete"}, **common)
    outer = {"name": "sgd", "lr": 1.0}
    fedavg = simulate(algorithm={"name": "fedavg", "steps": 1, "weighting": "uniform"}, **common)
    all_reduce = simulate(algorithm={"name": "diloco", "inner_steps": 1, "outer": outer}, **common)
    assert not torch.equal(gossip.parameters, replica(precision="fp64").parameters)
    for one in gossip.replicas.values():
        torch.testing.assert_close(one.parameters, fedavg.parameters, **ATOL)
        torch.testing.assert_close(one.parameters, all_reduce.parameters, **ATOL)


def test_alone_it_is_plain_descent():
    for order in ("atc", "cta"):
        (_, *after) = history(3, nodes=1, order=order)
        torch.testing.assert_close(after[-1], trained(torch.zeros(1, 4, dtype=torch.float64), 3), **ATOL)


# --- A1.2, A1.5 and A1.6: mixing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "nodes"),
    [
        *(("ring", 7), ("exponential", 7), ("one_peer_exponential", 6)),
        *(({"name": "erdos_renyi", "probability": 0.5}, 8), ({"name": "torus", "rows": 3}, 9)),
    ],
)
@pytest.mark.parametrize("order", ["atc", "cta"])
def test_mixing_keeps_the_mean_and_brings_models_together(topology: Any, nodes: int, order: str):
    _, first, *later = history(9, nodes=nodes, topology=topology, order=order, optimizer=MIXING_ONLY)
    mean = first.mean(0)
    part = Topology.model_validate(topology)
    assert (first - mean).norm() > 0.1
    before = first
    for number, after in enumerate(later, start=1):
        torch.testing.assert_close(after.mean(0), mean, rtol=0, atol=1e-14)
        rho = part.mixing(range(nodes), number, 0).rho
        assert (after - mean).norm() <= rho * (before - mean).norm() + 1e-14
        before = after
    assert (before - mean).norm() < 0.9 * (first - mean).norm()


@pytest.mark.parametrize("nodes", [2, 4, 8, 16])
def test_one_peer_exponential_graphs_give_the_exact_mean(nodes: int):
    period = OnePeerExponential().period(nodes)
    seen = history(2 * period, nodes=nodes, topology="one_peer_exponential", optimizer=MIXING_ONLY)
    # The first round trains and mixes; its mean is that of the models before its mixing.
    mean = trained(torch.zeros(nodes, 4, dtype=torch.float64), 1).mean(0)
    torch.testing.assert_close(seen[period], mean.expand(nodes, -1), rtol=0, atol=1e-15 * nodes)
    for number in range(1, period):
        assert (seen[number] - mean).norm() > 1e-3, "that was too early"
    # From any round on, not only from the first of a period.
    torch.testing.assert_close(seen[-1], mean.expand(nodes, -1), rtol=0, atol=1e-15 * nodes)


# --- A1.7: it stops beside the optimum ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", ["atc", "cta"])
def test_a_constant_step_ends_beside_the_optimum(order: str):
    """At the solution of X = W (X − η G(X)), or of X = W X − η G(X), with G(X)_i = A_i (x_i − c_i)."""
    (*_, last) = history(300, order=order)
    mixing = torch.kron(RING_OF_5, torch.eye(4, dtype=torch.float64))
    curvature = torch.block_diag(*(TASK.curvature(node) for node in range(5)))
    pull = RATE * torch.cat([TASK.curvature(node) @ TASK.center(node) for node in range(5)])
    identity = torch.eye(20, dtype=torch.float64)
    if order == "atc":
        fixed = torch.linalg.solve(identity - mixing @ (identity - RATE * curvature), mixing @ pull)
    else:
        fixed = torch.linalg.solve(identity - mixing + RATE * curvature, pull)
    torch.testing.assert_close(last.flatten(), fixed, rtol=0, atol=1e-9)
    assert (last - TASK.optimum(5)).norm(dim=1).min() > 1e-3
    assert (last.mean(0) - TASK.optimum(5)).norm() > 1e-3


def test_the_run_ends_with_the_mean_model():
    ran = simulate(
        algorithm="dsgd",
        task={"name": "quadratic"} | PROBLEM,
        nodes=5,
        rounds=4,
        optimizer={"name": "sgd", "lr": RATE, "precision": "fp64"},
    )
    mean = torch.stack([one.parameters for one in ran.replicas.values()]).mean(0)
    assert ran.summary is not None
    assert ran.summary.metrics["loss"] == pytest.approx(TASK.objective(mean, 5), rel=1e-12)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 5


# --- members --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["atc", "cta"])
def test_a_late_node_is_left_out_on_both_sides(order: str):
    """Node 2 is never in time: the others are a chain, with Metropolis–Hastings weights, and keep their mean."""
    late: dict[str, Any] = {
        "network": {"speeds": {2: 0.01}, "step_ms": 10},
        "cluster": {"round_deadline_s": 0.1, "quorum_fraction": 0.2},
    }
    # Combining first, its model of the round before is out before it trains, and has its weight.
    if order == "cta":
        late["cluster"] |= {"round_deadline_s": 0.5}
    chain = torch.eye(5, dtype=torch.float64)
    weights = {(3, 4): 1 / 3, (4, 0): 1 / 3, (0, 1): 1 / 3}
    for (i, j), weight in weights.items():
        chain[i, j] = chain[j, i] = weight
        chain[i, i] -= weight
        chain[j, j] -= weight
    x = torch.zeros(5, 4, dtype=torch.float64)
    mixing = chain if order == "atc" else RING_OF_5
    seen = history(3, order=order, **late)
    for after in seen[1:]:
        expected = mixing @ trained(x, 1) if order == "atc" else mixing @ x + trained(x, 1) - x
        expected[2] = x[2]
        torch.testing.assert_close(after, expected, **ATOL)
        x = expected
    assert not x[2].any()


def test_the_others_of_a_directed_graph_mix_on_without_a_late_node():
    """Node 2 is never in time, and on each cycle of the exponential graph of five: its neighbours close the gaps."""
    task = Quadratic(dimension=4, condition=1, samples_per_node=1)  # A is the identity
    late = {"network": {"speeds": {2: 0.01}, "step_ms": 10}, "cluster": {"round_deadline_s": 0.1}}
    gaps_closed = torch.tensor(
        [[1, 1, 0, 0, 2], [1, 1, 0, 2, 0], [0, 0, 4, 0, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]], dtype=torch.float64
    ).div(4)
    x = torch.zeros(5, 4, dtype=torch.float64)
    for after in history(3, task=task, topology="exponential", steps=1, **late)[1:]:
        moved = torch.stack([point - RATE * (point - task.center(node)) for node, point in enumerate(x)])
        expected = gaps_closed @ moved
        expected[2] = x[2]
        torch.testing.assert_close(after, expected, **ATOL)
        x = expected


@pytest.mark.parametrize("phase", ["post", "secure", "deliver"])
@pytest.mark.parametrize("topology", ["exponential", "one_peer_exponential"])
def test_a_node_of_a_directed_graph_is_lost(topology: str, phase: str):
    """Large contributions: whoever was to have those of node 2 fetches another's in their place."""
    ran = simulate(
        algorithm={"name": "dsgd", "topology": topology, "steps": 1},
        task="digits",  # 77 kB in double precision
        nodes=7,
        rounds=16,
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64", "schedule": {"name": "linear", "total_steps": 3}},
        evaluation={"every_rounds": 0},
        network={"start_s": 1000.0, "latency_ms": 1},
        faults={"events": [{"kind": "kill", "node": 2, "round": 2, "phase": phase}]},
    )
    there = torch.stack([one.parameters for node, one in ran.replicas.items() if node != 2])
    assert there.std(dim=0).max() < 1e-4


def test_a_node_that_skips_a_round_is_left_out_on_both_sides():
    ran = simulate(
        algorithm={"name": "dsgd", "topology": "complete"},
        task={"name": "test_toy", "poison": 0},
        nodes=3,
        rounds=1,
        on_nan="skip",
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 16},
    )
    start = replica(precision="fp64").parameters
    skipped = [node for node, one in ran.replicas.items() if torch.equal(one.parameters, start)]
    assert len(skipped) == 1
    one, other = (ran.replicas[node].parameters for node in ran.replicas if node not in skipped)
    torch.testing.assert_close(one, other, **ATOL)
    assert one.isfinite().all()


# --- bytes and time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "nodes", "edges"),
    [
        *(("ring", 1, 0), ("ring", 2, 2), ("ring", 3, 6), ("ring", 5, 10), ("complete", 4, 12)),
        *(("one_peer_exponential", 5, 5), ("exponential", 5, 15), ({"name": "torus", "rows": 3}, 9, 36)),
    ],
)
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
@pytest.mark.parametrize("order", ["atc", "cta"])
def test_bytes(topology: Any, nodes: int, edges: int, model: Any, order: str):
    ran = simulate(
        algorithm={"name": "dsgd", "topology": topology, "order": order},
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    layout = ran.replicas[0].layout
    expected = edges * 4 * (layout.num_values + layout.num_buffer_values)
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [expected] * 2


def seconds(order: str, **network: Any) -> float:
    ran: Ran = simulate(
        algorithm={"name": "dsgd", "order": order, "steps": 10},
        task={"name": "digits", "model": {"name": "mlp", "width": 300}},
        nodes=4,
        rounds=3,
        network=network,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    return ran.virtual_seconds


def test_combining_first_hides_the_exchange_behind_the_training():
    """Ten steps of 100 ms take a second; a latency of 400 ms comes on top of that, or is over before."""
    assert seconds("atc", step_ms=100, latency_ms=400) == pytest.approx(3 * 1.4)
    assert seconds("cta", step_ms=100, latency_ms=400) == pytest.approx(3 * 1.0)
    assert seconds("cta", step_ms=100, latency_ms=2500) == pytest.approx(3 * 2.5)
