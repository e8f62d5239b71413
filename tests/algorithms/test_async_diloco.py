"""Asynchronous DiLoCo, exactly: tests A1 to A5 of its specification, and dynamic steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starling.algorithms.api import SERVER, Message
from starling.algorithms.asynchronous.async_diloco import AsyncDiLoCo
from starling.algorithms.outer import Nesterov
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.toys import Ran, simulate

TICK = 1000 / 1024
"""Milliseconds that are a power of two of a second: sums of them are exact, and ties are ties."""

STEPS = 4


def run(*, nodes: int = 4, rounds: int = 8, speeds: Any = None, network: Any = None, **algorithm: Any) -> Ran:
    return simulate(
        algorithm={"name": "async_diloco", "inner_steps": STEPS} | algorithm,
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "adamw", "lr": 0.01},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
        network={"speeds": speeds or {}, "step_ms": TICK} | (network or {}),
    )


# --- A1: with patience it is DiLoCo ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["delayed_sgd", "delayed_nesterov"])
@pytest.mark.parametrize("nodes", [1, 3, 4])
def test_a1_equal_speeds_and_grace_are_diloco(rule: str, nodes: int):
    ours = run(nodes=nodes, rounds=5, rule=rule, grace_s=1e6, lr=0.7, momentum=0.9)
    theirs = simulate(
        algorithm={"name": "diloco", "inner_steps": STEPS, "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9}},
        nodes=nodes,
        rounds=5,
        optimizer={"name": "adamw", "lr": 0.01},
        data={"batch_size": 8},
        evaluation={"every_rounds": 0},
    )
    if rule == "delayed_sgd":
        assert ours.digest == theirs.digest
    torch.testing.assert_close(ours.replicas[SERVER].parameters, theirs.parameters, rtol=1e-5, atol=1e-6)


def test_grace_ends_when_all_are_in_or_time_is_up():
    """The slow one is not there: two are answered when the grace is over, and the third later."""
    patient = run(nodes=3, rounds=1, speeds={2: 0.25}, grace_s=1e6)
    assert patient.virtual_seconds == 4 * STEPS / 1024
    hasty = run(nodes=3, rounds=1, speeds={2: 0.25}, grace_s=2 / 1024)
    assert hasty.virtual_seconds == (STEPS + 2) / 1024


# --- A2, A3: delayed Nesterov ---------------------------------------------------------------------------------------


def pushed(algorithm: AsyncDiLoCo, updates: list[Tensor], size: int, *, after_each: Any = None) -> Any:
    """A server's state after ``updates``, of which each arrives alone."""
    start = torch.zeros_like(updates[0])
    local: dict[str, Any] = {}
    node: Any = SimpleNamespace(id=SERVER, parameters=start, buffers=torch.empty(0), local=local, now=0.0)
    algorithm.init(node)
    for worker, update in enumerate(updates):
        payload = {"update": update, "buffers": torch.empty(0), "speed": 0.0}
        algorithm._apply(node, Message(worker % size, payload, 0), size)
        if after_each:
            after_each(node)
    return node


def random_updates(count: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(count)]


@given(size=st.integers(1, 6), periods=st.integers(1, 4), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a2_a_period_is_one_step_of_nesterovs(size: int, periods: int, seed: int):
    updates = random_updates(size * periods, seed)
    node = pushed(AsyncDiLoCo(momentum=0.9), updates, size)
    outer, expected = Nesterov(lr=0.7, momentum=0.9), torch.zeros(5, dtype=torch.float64)
    state = outer.init(expected)
    for period in range(periods):
        step, state = outer.update(torch.stack(updates[size * period : size * (period + 1)]).mean(0), state)
        expected = expected + step
    torch.testing.assert_close(node.parameters, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(node.local["velocity"], state["velocity"], rtol=1e-12, atol=1e-12)


def test_a3_of_a_buffer_of_one_it_is_torchs():
    updates = random_updates(6)
    node = pushed(AsyncDiLoCo(momentum=0.9), updates, 1)
    theirs = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for update in updates:
        theirs.grad = update.clone()
        optimizer.step()
    torch.testing.assert_close(node.parameters, theirs.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("between", [0.0, 0.1, 0.25])
def test_the_formula_with_momentum_in_between(between: float):
    """B, m and θ written down once more; c = 1/N_b gives every step as much of the momentum."""
    updates, size = random_updates(11), 4
    found: list[Tensor] = []
    pushed(
        AsyncDiLoCo(between=between, momentum=0.9),
        updates,
        size,
        after_each=lambda node: found.append(node.parameters.clone()),
    )
    theta, momentum, buffer = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    for number, update in enumerate(updates):
        buffer = buffer + update
        if (number + 1) % size == 0:
            momentum = 0.9 * momentum + buffer / size
            theta = theta - 0.7 * ((1 - between * size + between) * 0.9 * momentum + update / size)
            buffer = torch.zeros_like(buffer)
        else:
            theta = theta - 0.7 * (between * 0.9 * momentum + update / size)
        torch.testing.assert_close(found[number], theta, rtol=1e-12, atol=1e-12)


# --- A4: order ------------------------------------------------------------------------------------------------------


def arrivals(ran: Ran) -> list[tuple[int, int]]:
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


def test_a4_ties_are_broken_by_the_worker():
    one, again = (run(rounds=16, speeds={3: 2.0}) for _ in range(2))
    assert one.digest == again.digest
    assert one.events == again.events
    # At tick 2: 3. At 4: all, in the order of their numbers. From then on the slow ones take half the steps.
    assert [worker for worker, _ in arrivals(one)][:6] == [3, 0, 1, 2, 3, 0]


# --- A5: staleness --------------------------------------------------------------------------------------------------


def test_a5_staleness_by_hand():
    """Workers at 4, 4, 2 and 1 ticks of 4 a push; a version for each push, and ties by number.

    tick 1: 3.  2: 2, 3.  3: 3.  4: 0, 1, 2, 3.  Versions that they come from: 0; 0, 1; 3; 0, 0, 2, 4.
    """
    ran = run(rounds=8, speeds={0: 0.25, 1: 0.25, 2: 0.5}, dynamic_steps=False)
    assert arrivals(ran)[:8] == [(3, 0), (2, 1), (3, 1), (3, 0), (0, 4), (1, 5), (2, 4), (3, 3)]


# --- dynamic steps --------------------------------------------------------------------------------------------------


def test_slow_workers_take_fewer_steps():
    ran = run(nodes=3, rounds=30, speeds={1: 0.5, 2: 0.25}, inner_steps=8)
    assert [ran.replicas[node].local["steps"] for node in range(3)] == [8, 4, 2]
    # From their second round on all take as long: nobody's update is older than two others'.
    assert max(staleness for _, staleness in arrivals(ran)[-12:]) <= 3
    fixed = run(nodes=3, rounds=30, speeds={1: 0.5, 2: 0.25}, inner_steps=8, dynamic_steps=False)
    assert max(staleness for _, staleness in arrivals(fixed)[-12:]) > 3


def test_what_was_measured_is_forgotten():
    algorithm = AsyncDiLoCo(inner_steps=10, speed_timeout_s=5.0)
    speeds = {"0": [8.0, 0.0], "1": [4.0, 3.0], "2": [1.0, 3.0], "3": [0.01, 3.0]}
    node: Any = SimpleNamespace(local={"speeds": speeds}, now=4.0)
    assert [algorithm.steps_of(node, worker) for worker in range(5)] == [10, 5, 1, 1, 10]
    node.now = 6.0  # the fastest has not been heard of since
    assert [algorithm.steps_of(node, worker) for worker in range(4)] == [10, 10, 2, 1]


# --- the rest -------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_an_update_and_an_answer():
    ran = run(nodes=2, rounds=12)
    per_message = ran.replicas[0].layout.nbytes + 8
    assert ran.expected_bytes == 2 * per_message
    assert sum(record.payload_bytes for record in ran.rounds) % per_message == 0


def test_buffers_follow_the_workers():
    ran = simulate(
        algorithm={"name": "async_diloco", "inner_steps": 2},
        task={"name": "test_toy", "model": "batch_norm"},
        nodes=2,
        rounds=6,
    )
    assert ran.replicas[SERVER].buffers.any()


def test_buffers_go_a_part_of_the_way_to_the_workers():
    """b ← b + (b_w − b) / N_b: of 0 and workers at 3 and 9, with N_b = 3, first 1 and then 1 + 8/3."""
    local: dict[str, Any] = {}
    node: Any = SimpleNamespace(id=SERVER, parameters=torch.zeros(1), buffers=torch.zeros(1), local=local, now=0.0)
    algorithm, found = AsyncDiLoCo(), []
    algorithm.init(node)
    for worker, value in enumerate((3.0, 9.0)):
        payload = {"update": torch.zeros(1), "buffers": torch.full((1,), value), "speed": 0.0}
        algorithm._apply(node, Message(worker, payload, 0), 3)
        found.append(float(node.buffers))
    assert found == pytest.approx([1.0, 11 / 3])


@pytest.mark.parametrize("rule", ["delayed_nesterov", "delayed_sgd"])
def test_a_worker_that_joins_counts_from_the_next_buffer_on(rule: Any):
    """Two updates of 2 fill the buffer that two began, and three the one after, with a third worker from the second."""
    local: dict[str, Any] = {}
    node: Any = SimpleNamespace(id=SERVER, parameters=torch.zeros(1), buffers=torch.zeros(0), local=local, now=0.0)
    algorithm = AsyncDiLoCo(rule=rule, lr=1.0, momentum=0.0)
    algorithm.init(node)
    found: list[float] = []
    for number, num_workers in enumerate((2, 3, 3, 3, 3)):
        payload = {"update": torch.full((1,), 6.0), "buffers": torch.zeros(0), "speed": 0.0}
        algorithm._apply(node, Message(number % 2, payload, 0), num_workers)
        found.append(float(node.parameters))
    assert found == ([-3, -6, -8, -10, -12] if rule == "delayed_nesterov" else [0, -6, -6, -6, -12])


def test_too_much_momentum_in_between_is_refused():
    algorithm = {"name": "async_diloco", "between": 0.3}
    with pytest.raises(ConfigError, match=r"algorithm.between: 0.3 is more than 1/4, one for each update"):
        parse({"algorithm": algorithm, "task": "digits", "cluster": {"nodes": {"target": 4}}})
    assert parse({"algorithm": algorithm, "task": "digits", "cluster": {"nodes": {"target": 3}}})


@pytest.mark.parametrize("rule", ["delayed_nesterov", "delayed_sgd"])
def test_its_defaults_converge_on_a_quadratic(rule: str):
    """With ε = 0.7 and any momentum ``delayed_sgd``, whose steps are late by one, would diverge here."""
    task = {"name": "quadratic", "dimension": 10, "condition": 5, "samples_per_node": 1}
    quick = {"task": task, "nodes": 4, "rounds": 64, "evaluation": {"every_rounds": 0}}
    optimizer = {"name": "sgd", "lr": 0.3, "precision": "fp64"}
    ran = simulate(algorithm={"name": "async_diloco", "inner_steps": 10, "rule": rule}, optimizer=optimizer, **quick)
    assert ran.summary is not None
    gap = ran.summary.metrics["loss"] - ran.summary.baselines["optimum"]
    assert gap < 0.3
