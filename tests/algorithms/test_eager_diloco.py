"""Eager DiLoCo, exactly: against its formula written down once more, node by node."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import Train
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, Slope, Toy, begin, replica, simulate

STEPS = 3
OUTERS = [{"name": "sgd", "lr": 0.9}, {"name": "nesterov", "lr": 0.7, "momentum": 0.9}]


def run(*, nodes: int = 3, rounds: int = 5, outer: Any = OUTERS[1], task: Any = None, **keys: Any) -> Ran:
    task = task or Toy()
    return simulate(
        algorithm={"name": keys.pop("name", "eager_diloco"), "inner_steps": STEPS, "outer": outer},
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
        **keys,
    )


def reference(nodes: int, rounds: int, outer: dict[str, Any]) -> list[Tensor]:
    """The models of all nodes, each with its own momentum and the whole of Δ̃."""
    workers = [replica(node, num_nodes=nodes, precision="fp64") for node in range(nodes)]
    models = [one.parameters.clone() for one in workers]
    velocity = [torch.zeros_like(models[0]) for _ in workers]
    sent = [torch.zeros_like(models[0]) for _ in workers]
    momentum = outer.get("momentum", 0.0)
    for number in range(rounds):
        mean = torch.stack(sent).mean(0)
        for node, one in enumerate(workers):
            one.parameters.copy_(models[node])
            begin(one, number, tuple(range(nodes)))
            one.trainer.train(Train(steps=STEPS), threading.Event())
            gradient = models[node] - one.parameters
            eager = mean + (gradient - sent[node]) / nodes
            velocity[node] = momentum * velocity[node] + eager
            models[node] = models[node] - outer["lr"] * (eager + momentum * velocity[node])
            sent[node] = gradient
    return models


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_models_follow_the_formula(nodes: int, outer: dict[str, Any]):
    ran = run(nodes=nodes, outer=outer)
    for node, expected in enumerate(reference(nodes, 5, outer)):
        torch.testing.assert_close(ran.replicas[node].parameters, expected, rtol=1e-11, atol=1e-12)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


@pytest.mark.parametrize("outer", OUTERS)
def test_alone_nothing_is_late(outer: dict[str, Any]):
    """N = 1: Δ̃ = Δ, so that the node's model is DiLoCo's."""
    eager, plain = run(nodes=1, outer=outer), run(nodes=1, outer=outer, name="diloco")
    torch.testing.assert_close(eager.parameters, plain.parameters, rtol=1e-11, atol=1e-12)


def test_equal_nodes_with_a_constant_gradient_are_late_once():
    """Then Δ̃ = Δ from the second round on, whatever N; in the first it is Δ / N."""
    task, nodes = Quadratic(dimension=4, heterogeneity=0), 4
    ran = run(nodes=nodes, rounds=1, outer=OUTERS[0], task=task)
    plain = run(nodes=nodes, rounds=1, outer=OUTERS[0], task=task, name="diloco")
    start = run(nodes=1, rounds=1, outer={"name": "sgd", "lr": 1e-12}, task=task).parameters
    torch.testing.assert_close(ran.parameters - start, (plain.parameters - start) / nodes, rtol=1e-6, atol=1e-9)


def test_models_do_not_drift_apart():
    """What a node's model differs in from the common one is its last news, and not a sum of all."""
    ran = run(nodes=4, rounds=12, outer=OUTERS[0], task=Quadratic(dimension=5))
    algorithm: Any = ran.config.algorithm
    for one in ran.replicas.values():
        news = one.local["pending"]
        assert isinstance(news, Tensor)
        torch.testing.assert_close(one.parameters, algorithm.model(one) - 0.9 / 4 * news, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_a_joiner_begins_at_the_common_model(phase: str):
    """Its first steps begin at θ: in a run that ends there, θ_m - θ is what one round adds, -η Δ_m / N."""
    faults = {"events": [{"kind": "kill", "node": 1, "round": 2, "phase": phase}]}
    ran = run(rounds=4, faults=faults, network={"start_s": 0.0}, outer=OUTERS[0])
    (transfer,) = ran.sought("transfer")
    assert transfer["node"] == 1
    algorithm: Any = ran.config.algorithm
    joiner = ran.replicas[1]
    news = joiner.local["pending"]
    assert isinstance(news, Tensor)
    torch.testing.assert_close(joiner.parameters, algorithm.model(joiner) - 0.9 / 3 * news, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rounds", [5, 6, 8])
def test_a_joiner_is_in_no_mean_before_it_has_news(rounds: int):
    """All news are 3 steps of 0.1; but for the first round θ moves by η of that, whoever comes in round 3."""
    late = {"events": [{"kind": "late_join", "node": 2, "round": 3}]}
    ran = run(rounds=rounds, outer=OUTERS[0], task=Slope(), faults=late, network={"start_s": 0.0})
    assert [one["node"] for one in ran.sought("transfer")] == [2]
    algorithm: Any = ran.config.algorithm
    for one in ran.replicas.values():
        assert algorithm.model(one).tolist() == pytest.approx([-(rounds - 1) * 0.9 * 0.3] * 2, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("outer", [OUTERS[0], {"name": "nesterov", "lr": 0.4, "momentum": 0.9}])
@pytest.mark.parametrize("kills", [1, 12])
def test_after_losses_it_comes_to_the_optimum(kills: int, outer: dict[str, Any]):
    """Nothing remains of a loss: the fixed point is that of a calm run, the optimum of the mean."""
    problem = Quadratic(dimension=4, condition=5)
    events = [{"kind": "kill", "node": 1 + place % 3, "round": 5 + 4 * place} for place in range(kills)]
    ran = run(nodes=4, rounds=300, outer=outer, task=problem, faults={"events": events}, network={"start_s": 0.3})
    assert ran.summary is not None
    assert ran.summary.nodes["lost"] == kills
    algorithm: Any = ran.config.algorithm
    gap = problem.objective(algorithm.model(ran.replicas[0]), 4) - problem.objective(problem.optimum(4), 4)
    assert gap < 1e-10


def test_an_outer_step_that_is_not_linear_is_refused():
    with pytest.raises(ConfigError, match="outer: adam is not linear in the gradient; take sgd or nesterov"):
        parse({"algorithm": {"name": "eager_diloco", "outer": "adam"}, "task": "digits"})
