"""SCAFFOLD, exactly: the update, its invariant c = mean c_i, the optimum, cohorts and changes of membership."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from tests.membership import scripted
from tests.toys import Ran, simulate

PROBLEM: dict[str, Any] = {"dimension": 4, "condition": 2, "curvature_heterogeneity": 2.0}
TASK = Quadratic(**PROBLEM, samples_per_node=1)
RATE, NODES = 0.1, 6
ALL = tuple(range(NODES))
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


@dataclass
class Seen:
    """What nodes hold after a round."""

    model: Tensor
    control: Tensor
    own: Tensor
    """c_i of all nodes, shape (N, P)."""


def control_of(replica: Any) -> Tensor:
    own = replica.local.get("control")
    return torch.zeros_like(replica.parameters) if own is None else own


def run(
    views: Sequence[tuple[int, ...]], *, forget: dict[int, int] | None = None, **keys: Any
) -> tuple[list[Seen], Ran]:
    """``forget``: after which round which node loses what it holds, as a new process in its place."""
    seen: list[Seen] = []

    def watch(number: int, replicas: Any) -> None:
        one = replicas[views[number][0]]
        own = torch.stack([control_of(replicas[node]) for node in sorted(replicas)])
        seen.append(Seen(cast("Tensor", one.shared["model"]), cast("Tensor", one.shared["control"]), own))
        if number in (forget or {}):
            replicas[(forget or {})[number]].local.replace({})

    others = {key: keys.pop(key) for key in ("network", "cluster", "optimizer") if key in keys}
    optimizer = {"name": "sgd", "lr": RATE, "precision": "fp64"} | others.pop("optimizer", {})
    algorithm = {"name": "scaffold", "steps": 5} | keys
    ran = scripted(
        views,
        watch,
        algorithm=algorithm,
        task={"name": "quadratic", "samples_per_node": 1} | PROBLEM,
        optimizer=optimizer,
        **others,
    )
    return seen, ran


def gradient(node: int, point: Tensor) -> Tensor:
    return TASK.curvature(node) @ (point - TASK.center(node))


def optimum(nodes: tuple[int, ...]) -> Tensor:
    curvatures = [TASK.curvature(node) for node in nodes]
    pulls = [curvature @ TASK.center(node) for node, curvature in zip(nodes, curvatures, strict=True)]
    return torch.linalg.solve(torch.stack(curvatures).sum(0), torch.stack(pulls).sum(0))


def check_invariant(after: Seen, members: tuple[int, ...] = ALL) -> None:
    torch.testing.assert_close(after.control, after.own[list(members)].mean(0), rtol=0, atol=1e-14)


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_definition(fraction: float, step: float):
    """Also that c_i⁺ = c_i − c + (x − y_i)/(Kη), which is option II as it is written."""
    seen, ran = run([ALL] * 8, fraction=fraction, outer={"name": "sgd", "lr": step})
    x, c = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    own = torch.zeros(NODES, 4, dtype=torch.float64)
    for event, after in zip(ran.sought("commit"), seen, strict=True):
        cohort = event["closed"][0]
        assert len(cohort) == fraction * NODES
        moves, changes = torch.zeros_like(x), torch.zeros_like(x)
        for node in cohort:
            y = x
            for _ in range(5):
                y = y - RATE * (gradient(node, y) - own[node] + c)
            renewed = own[node] - c + (x - y) / (5 * RATE)
            moves += (y - x) / len(cohort)
            changes += (renewed - own[node]) / NODES
            own[node] = renewed
        x, c = x + step * moves, c + changes
        torch.testing.assert_close(after.model, x, **EXACT)
        torch.testing.assert_close(after.control, c, **EXACT)
        torch.testing.assert_close(after.own, own, **EXACT)


def test_one_step_of_all_is_centralized_descent():
    seen, _ = run([ALL] * 6, steps=1)
    x = torch.zeros(4, dtype=torch.float64)
    for after in seen:
        x = x - RATE * torch.stack([gradient(node, x) for node in ALL]).mean(0)
        torch.testing.assert_close(after.model, x, **EXACT)


def test_control_variates_are_gradients_whatever_the_optimizer_makes_of_them():
    """The learning rate falls and steps are clipped: (x − y)/(Kη) would be no gradient then."""
    keys: dict[str, Any] = {"schedule": {"name": "linear", "total_steps": 9}, "grad_clip": 0.2}
    seen, _ = run([ALL] * 6, steps=1, optimizer=keys)
    before = torch.zeros(4, dtype=torch.float64)
    for after in seen:
        torch.testing.assert_close(after.own, torch.stack([gradient(node, before) for node in ALL]), **EXACT)
        before = after.model


# --- E3: the optimum ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_converges_to_the_optimum_where_fedavg_does_not(fraction: float):
    rounds = 150 if fraction == 1.0 else 400
    seen, ran = run([ALL] * rounds, fraction=fraction)
    for after in seen:
        check_invariant(after)
    assert (seen[-1].model - optimum(ALL)).norm() < 1e-8
    assert torch.equal(ran.parameters, seen[-1].model)
    for node in ALL:
        torch.testing.assert_close(seen[-1].own[node], gradient(node, optimum(ALL)), rtol=0, atol=1e-7)
    fedavg = simulate(
        algorithm={"name": "fedavg", "steps": 5, "fraction": fraction},
        task={"name": "quadratic", "samples_per_node": 1} | PROBLEM,
        nodes=NODES,
        rounds=150,
        optimizer={"name": "sgd", "lr": RATE, "precision": "fp64"},
    )
    assert (fedavg.parameters - optimum(ALL)).norm() > 1e-2


# --- members --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("forget", [None, {20: 4}])
def test_a_leave_and_a_return(fraction: float, forget: dict[int, int] | None):
    """Nodes 1 and 4 leave after 10 rounds and come back after 120 or 250, node 4 perhaps as a new process."""
    fewer = (0, 2, 3, 5)
    away = 250 if fraction < 1 else 120
    views = [ALL] * 10 + [fewer] * away + [ALL] * away
    seen, ran = run(views, fraction=fraction, forget=forget)
    for number, after in enumerate(seen):
        check_invariant(after, views[number])
    left, back = 10, 10 + away
    assert torch.equal(seen[back - 1].own[1], seen[left - 1].own[1])
    assert seen[left - 1].own[1].any()
    assert (seen[back - 1].model - optimum(fewer)).norm() < 1e-8
    assert (optimum(fewer) - optimum(ALL)).norm() > 0.01
    assert (seen[-1].model - optimum(ALL)).norm() < 1e-8
    assert len({one.shared.digest() for one in ran.replicas.values()}) == 1


def test_a_change_of_members_costs_one_more_exchange():
    _, ran = run([ALL] * 2 + [(0, 2, 3, 5)] * 2, fraction=0.5)
    size = 4 * 8
    usual, repaired = 3 * 5 * 2 * size, 4 * 3 * size + 2 * 3 * 2 * size
    assert [record.payload_bytes for record in ran.rounds] == [usual, usual, repaired, 2 * 3 * 2 * size]


def test_a_late_node_has_no_part_in_c_until_it_is_back():
    """Five steps of node 3 take 5 s, and a round is over after one."""
    network = {"network": {"speeds": {3: 0.01}, "step_ms": 10}, "cluster": {"round_deadline_s": 1}}
    seen, ran = run([ALL] * 20, **network)
    assert len(ran.sought("late")) == len(seen)
    assert not any(after.own[3].any() for after in seen)
    others = tuple(node for node in ALL if node != 3)
    for event, after in zip(ran.sought("commit"), seen, strict=True):
        # It is a member, and in the exchange that repairs c, with c_3 = 0.
        assert event["closed"][max(event["closed"])] == others
        check_invariant(after)


def test_who_skips_a_round_has_no_part_in_c():
    ran = simulate(
        algorithm="scaffold",
        task={"name": "test_toy", "poison": 0},
        nodes=3,
        rounds=3,
        on_nan="skip",
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 16},
    )
    own = torch.stack([control_of(one) for one in ran.replicas.values()])
    assert sum(not row.any() for row in own) == 1
    torch.testing.assert_close(ran.replicas[0].shared["control"], own.sum(0) / 3, rtol=0, atol=1e-14)


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
def test_bytes(nodes: int, fraction: float, model: Any):
    ran = simulate(
        algorithm={"name": "scaffold", "steps": 1, "fraction": fraction},
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    layout = ran.replicas[0].layout
    size = 4 * (2 * layout.num_values + layout.num_buffer_values)
    cohort = -(-nodes * 2 // 5) if fraction < 1 else nodes
    expected = (cohort + nodes - 2) * size if size > 65536 else cohort * (nodes - 1) * size
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [expected] * 2
