"""FedProx, exactly: FedAvg's bits without the term, the recursion with it, its fixed point, and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, simulate

PROBLEM: dict[str, Any] = {"dimension": 4, "condition": 2, "curvature_heterogeneity": 2.0}
TASK = Quadratic(**PROBLEM)
RATE, NODES = 0.2, 4


def run(rounds: int, *, nodes: int = NODES, name: str = "fedprox", **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": name} | keys,
        task={"name": "quadratic"} | PROBLEM,
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": RATE, "precision": "fp64"},
        evaluation={"every_rounds": 0},
    )


def local(node: int, start: Tensor, steps: int, mu: float) -> Tensor:
    y = start
    for _ in range(steps):
        y = y - RATE * (TASK.curvature(node) @ (y - TASK.center(node)) + mu * (y - start))
    return y


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_definition(mu: float):
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        x = torch.stack([local(node, x, 5, mu) for node in range(NODES)]).mean(0)
    torch.testing.assert_close(run(3, steps=5, mu=mu).parameters, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "optimizer", [{"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.01, "grad_clip": 0.1, "accumulate": 2}]
)
@pytest.mark.parametrize("keys", [{}, {"fraction": 0.5, "epochs": 2}, {"steps": 3, "outer": {"name": "nesterov"}}])
def test_without_the_term_it_is_fedavg(optimizer: Any, keys: Any):
    task = {"name": "test_toy", "model": "dropout"}
    prox, average = (
        simulate(algorithm=one | keys, task=task, nodes=4, rounds=3, optimizer=optimizer, data={"batch_size": 4})
        for one in ({"name": "fedprox", "mu": 0}, {"name": "fedavg"})
    )
    assert prox.digest == average.digest
    assert prox.events == average.events


def test_a_single_step_is_fedavgs():
    """At y = x the term has no gradient."""
    torch.testing.assert_close(
        run(5, steps=1, mu=1.0).parameters,
        run(5, steps=1, name="fedavg").parameters,
        rtol=0,
        atol=1e-13,
    )


def test_the_term_holds_back_the_drift():
    """The fixed point is biased as FedAvg's, and less so with a stronger pull."""
    errors = [float((run(40, steps=8, mu=mu).parameters - TASK.optimum(NODES)).norm()) for mu in (0.0, 2.0, 5.0)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0.1


@pytest.mark.parametrize("mu", [0.01, 0.7])
def test_the_cohort_and_weights_are_fedavgs(mu: float):
    """Two of five nodes with unequal shares; the anchor is the model that all begin with."""
    common: dict[str, Any] = {"task": "test_toy", "nodes": 5, "rounds": 1, "data": {"batch_size": 4}}
    keys = {"fraction": 0.4, "epochs": 2}
    prox = simulate(algorithm={"name": "fedprox", "mu": mu} | keys, **common)
    average = simulate(algorithm={"name": "fedavg"} | keys, **common)
    assert prox.sought("commit")[0]["closed"] == average.sought("commit")[0]["closed"]
    assert len(prox.sought("commit")[0]["closed"][0]) == 2
    assert not torch.equal(prox.parameters, average.parameters)


@pytest.mark.parametrize("nodes", [1, 2, 5])
@pytest.mark.parametrize("width", [16, 300])
def test_bytes(nodes: int, width: int):
    ran = simulate(
        algorithm={"name": "fedprox", "steps": 1, "fraction": 0.5, "result_codec": "bf16"},
        task={"name": "digits", "model": {"name": "mlp", "width": width}},
        nodes=nodes,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    values, cohort = ran.replicas[0].layout.num_values, -(-nodes // 2)
    sent = cohort * (nodes - 1) * 4 * values if width == 16 else (cohort - 1) * 4 * values + (nodes - 1) * 2 * values
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [sent] * 2


def test_a_negative_pull_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.mu should be greater than or equal to 0, got -0.1"):
        run(1, mu=-0.1)
