"""FedBuff, exactly: its first step is FedAvg's, alone it is local SGD, and in between it follows its definition."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import SERVER, Left, Message, Receive, Send, Train
from starling.algorithms.asynchronous.fedbuff import FedBuff
from tests.toys import Ran, Toy, begin, replica, simulate

STEPS = 3


def run(task: Any = None, *, nodes: int, rounds: int, speeds: Any = None, **keys: Any) -> Ran:
    task = task or Toy()
    return simulate(
        algorithm={"name": "fedbuff", "steps": STEPS} | keys,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
        network={"speeds": speeds or {}, "latency_ms": 1},
    )


def model(ran: Ran) -> Tensor:
    return ran.replicas[SERVER].parameters


def messages(ran: Ran) -> list[tuple[int, int, int]]:
    """(receiver, sender, the sender's round) of all messages, in the order in which they were received."""
    return [(event["node"], *event["outcome"][:2]) for event in ran.sought("received")]


def ages(ran: Ran) -> list[tuple[int, int]]:
    """(worker, staleness) of all updates, found from who received what when."""
    heard: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    version = 0
    for event in ran.events:
        if event["event"] == "commit" and event["node"] == SERVER:
            version += 1
        if event["event"] == "received":
            sender, number, _ = event["outcome"]
            if event["node"] == SERVER:
                found.append((sender, version - heard.get(sender, 0)))
            else:
                heard[event["node"]] = number
    return found


def reference(ran: Ran, task: Toy, nodes: int) -> Tensor:
    """The model after the run, worked out from the order of its messages and from nothing else."""
    algorithm: Any = ran.config.algorithm
    keep = float("inf") if algorithm.max_staleness is None else algorithm.max_staleness
    workers = [replica(node, task=task, num_nodes=nodes, precision="fp64") for node in range(nodes)]
    models = [workers[0].parameters.clone()]
    given = dict.fromkeys(range(nodes), 0)
    buffer: list[Tensor] = []
    for receiver, sender, number in messages(ran):
        if receiver != SERVER:
            given[receiver] = number
            continue
        one = workers[sender]
        one.parameters.copy_(models[given[sender]])
        begin(one, number, tuple(range(nodes)))
        one.trainer.train(Train(steps=algorithm.steps), threading.Event())
        staleness = len(models) - 1 - given[sender]
        if staleness <= keep:
            update = models[given[sender]] - one.parameters
            buffer.append(update / (1.0 + staleness) ** algorithm.staleness_exponent)
        if len(buffer) == algorithm.buffer_size:
            models.append(models[-1] - algorithm.outer.lr * torch.stack(buffer).mean(0))
            buffer = []
    return models[-1]


# --- at its ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "batch_norm"])
def test_first_step_with_everybody_is_fedavgs(kind: Any):
    """All come from version 0, so nobody's update is discounted, and the mean is over all."""
    ours = run(Toy(model=kind), nodes=3, rounds=1, buffer_size=3)
    theirs = simulate(
        algorithm={"name": "fedavg", "steps": STEPS, "weighting": "uniform"},
        task={"name": "test_toy", "model": kind},
        nodes=3,
        rounds=1,
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 8},
    )
    assert torch.equal(model(ours), theirs.parameters)
    assert torch.equal(ours.replicas[SERVER].buffers, theirs.replicas[0].buffers)
    assert (model(ours) - replica(task=Toy(model=kind), precision="fp64").parameters).norm() > 0.01


def test_one_worker_with_a_buffer_of_one_is_local_sgd():
    ran = run(nodes=1, rounds=4, buffer_size=1)
    alone = replica(precision="fp64")
    begin(alone)
    alone.trainer.train(Train(steps=4 * STEPS), threading.Event())
    torch.testing.assert_close(model(ran), alone.parameters, rtol=1e-12, atol=1e-12)


def test_order_within_a_buffer_does_not_matter():
    one, other = (run(nodes=3, rounds=1, buffer_size=3, speeds=speeds) for speeds in ({0: 0.9, 1: 0.8}, {2: 0.7}))
    assert [worker for worker, _ in ages(one)] == [2, 0, 1]
    assert [worker for worker, _ in ages(other)] == [0, 1, 2]
    torch.testing.assert_close(model(one), model(other), rtol=1e-12, atol=1e-12)


# --- in between -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"buffer_size": 2},
        {"buffer_size": 2, "staleness_exponent": 0.0},
        {"buffer_size": 1, "staleness_exponent": 2.0, "outer": {"name": "sgd", "lr": 0.7}},
        {"buffer_size": 5},
        {"buffer_size": 2, "max_staleness": 2},
    ],
    ids=str,
)
def test_definition(keys: dict[str, Any]):
    ran = run(nodes=3, rounds=8, speeds={0: 0.23, 1: 0.71}, **keys)
    assert max(staleness for _, staleness in ages(ran)) >= 1
    torch.testing.assert_close(model(ran), reference(ran, Toy(), 3), rtol=1e-12, atol=1e-12)


def test_a_slow_workers_updates_are_old():
    ran = run(nodes=3, rounds=24, buffer_size=2, speeds={0: 0.1})
    oldest = {worker: max(staleness for one, staleness in ages(ran) if one == worker) for worker in range(3)}
    assert oldest[0] >= 8
    assert max(oldest[1], oldest[2]) <= 1


def test_updates_that_are_too_old_are_dropped():
    ran = run(nodes=3, rounds=24, buffer_size=2, max_staleness=3, speeds={0: 0.1})
    dropped = [worker for worker, staleness in ages(ran) if staleness > 3]
    assert dropped
    assert set(dropped) == {0}
    assert len(ages(ran)) == 24 * 2 + len(dropped)
    answered = [receiver for receiver, sender, _ in messages(ran) if sender == SERVER]
    assert answered.count(0) == len(dropped), "a worker whose update is dropped gets the current model all the same"


def test_nobody_waits_for_the_slowest():
    """Twenty steps of two fast workers take as long as with one of their kind instead of the slow one."""
    slow, even = (run(nodes=3, rounds=20, buffer_size=2, speeds=speeds) for speeds in ({0: 0.001}, {}))
    assert {worker for worker, _ in ages(slow)} == {1, 2}
    assert slow.virtual_seconds <= 1.5 * even.virtual_seconds + 1e-9


def test_server_momentum_is_kept_from_step_to_step():
    """One worker on ½ ‖y − c‖², and a step of rate η: torch's Nesterov goes along η (x − c)."""
    task = Quadratic(dimension=3, condition=1, samples_per_node=1)
    ran = simulate(
        algorithm={"name": "fedbuff", "steps": 1, "buffer_size": 1, "outer": {"name": "nesterov"}},
        task={"name": "quadratic", **task.model_dump(exclude={"name"})},
        nodes=1,
        rounds=4,
        optimizer={"name": "sgd", "lr": 0.5, "precision": "fp64"},
        evaluation={"every_rounds": 0},
    )
    outer: Any = ran.config.algorithm.outer  # type: ignore[attr-defined]
    assert outer.momentum > 0
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    server = torch.optim.SGD([x], lr=outer.lr, momentum=outer.momentum, nesterov=True)
    for _ in range(4):
        x.grad = 0.5 * (x.detach() - task.center(0))
        server.step()
    torch.testing.assert_close(model(ran), x.detach(), rtol=0, atol=1e-12)


def test_discount():
    values = [FedBuff().discount(staleness) for staleness in range(6)]
    assert values[0] == 1.0
    assert values[3] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 6
    assert {FedBuff(staleness_exponent=0).discount(staleness) for staleness in range(6)} == {1.0}


def test_bytes():
    """Two models for each update, but that the last worker of a run is not answered; nothing else was under way."""
    ran = run(nodes=3, rounds=8, buffer_size=2, speeds={0: 0.01})
    layout = ran.replicas[SERVER].layout
    assert ran.expected_bytes == 2 * 2 * layout.nbytes
    assert sum(record.payload_bytes for record in ran.rounds) == 8 * ran.expected_bytes - layout.nbytes


# --- losses ---------------------------------------------------------------------------------------------------------


def drive(answers: list[Any], **keys: Any) -> tuple[Any, list[Any]]:
    """One round of the server with a model of two values, and what it awaited."""
    algorithm = FedBuff(**keys)
    view = SimpleNamespace(members=(0, 1, 2))
    node: Any = SimpleNamespace(id=SERVER, parameters=torch.zeros(2), buffers=torch.zeros(0), local={}, view=view)
    algorithm.init(node)
    program = algorithm.server(node)
    awaited = [program.send(None)]
    try:
        for answer in answers:
            while isinstance(awaited[-1], Send):
                awaited.append(program.send(None))
            awaited.append(program.send(answer))
        while True:
            awaited.append(program.send(None))
    except StopIteration:
        return node, awaited


def update(sender: int, value: float, staleness: int = 0) -> Message:
    return Message(sender, {"parameters": torch.full((2,), value), "buffers": torch.zeros(0)}, staleness)


def test_a_worker_that_is_gone_is_not_waited_for():
    node, awaited = drive([update(0, -1.0), Left(1), Left(0), update(2, -3.0)], buffer_size=2)
    assert node.parameters.tolist() == [2.0, 2.0]
    assert [one.to for one in awaited if isinstance(one, Send)] == [0]
    assert node.local["waiting"] == 2
    assert sum(isinstance(one, Receive) for one in awaited) == 4


def test_too_old_and_left():
    node, awaited = drive([update(0, -9.0, 4), Left(0), update(1, -2.0, 3)], buffer_size=1, max_staleness=3)
    assert node.parameters.tolist() == [1.0, 1.0]
    assert [one.to for one in awaited if isinstance(one, Send)] == [0]
