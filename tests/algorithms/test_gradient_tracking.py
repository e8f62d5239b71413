"""Gradient tracking, exactly: the recursion of x and y, its invariant, the optimum, and changes of membership."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.actors.tasks.quadratic import Quadratic
from starling.orchestrator.errors import ConfigError
from tests.membership import models, scripted
from tests.toys import Toy, simulate

PROBLEM: dict[str, Any] = {"dimension": 4, "condition": 2, "curvature_heterogeneity": 1.0}
TASK = Quadratic(**PROBLEM, samples_per_node=1)
RATE = 0.2
RING_OF_5 = torch.tensor(
    [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], dtype=torch.float64
).div(3)
ALL = (0, 1, 2, 3, 4)


def track(views: Sequence[tuple[int, ...]], task: Quadratic = TASK, **keys: Any) -> list[tuple[Tensor, Tensor]]:
    """x and the corrections d of all nodes after each round, shapes (N, P)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_: int, replicas: Any) -> None:
        corrections = [replicas[node].local["correction"] for node in sorted(replicas)]
        seen.append((models(replicas), torch.stack(corrections)))

    others = {key: keys.pop(key) for key in ("data", "on_nan") if key in keys}
    rate = keys.pop("rate", RATE)
    scripted(
        views,
        watch,
        algorithm={"name": "gradient_tracking"} | keys,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        optimizer={"name": "sgd", "lr": rate, "precision": "fp64"},
        **others,
    )
    return seen


def gradients(x: Tensor, task: Quadratic = TASK) -> Tensor:
    return torch.stack([task.curvature(node) @ (point - task.center(node)) for node, point in enumerate(x)])


def optimum(nodes: tuple[int, ...], task: Quadratic = TASK) -> Tensor:
    curvatures = [task.curvature(node) for node in nodes]
    pulls = [curvature @ task.center(node) for node, curvature in zip(nodes, curvatures, strict=True)]
    return torch.linalg.solve(torch.stack(curvatures).sum(0), torch.stack(pulls).sum(0))


def test_definition():
    """x ← W (x − η y), y ← W y + g⁺ − g, from y = g: as the textbooks have it, with y and g kept."""
    x = torch.zeros(5, 4, dtype=torch.float64)
    gradient = gradients(x)
    y = gradient
    for after, _ in track([ALL] * 30):
        x = RING_OF_5 @ (x - RATE * y)
        torch.testing.assert_close(after, x, rtol=0, atol=1e-12)
        previous, gradient = gradient, gradients(x)
        y = RING_OF_5 @ y + gradient - previous
    assert y.norm() < 0.5 * gradient.norm(), "gradients of the nodes differ at the optimum; what they track is small"


@pytest.mark.parametrize("steps", [1, 3])
def test_the_mean_of_what_is_tracked_is_the_mean_gradient(steps: int):
    """That mean is mean (g + d) = mean g + mean d."""
    seen = track([ALL] * 40, steps=steps)
    assert seen[0][1].abs().max() > 0.1
    for _, corrections in seen:
        assert corrections.mean(0).abs().max() < 7e-15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "rounds"),
    [
        ({"steps": 3, "rate": 0.07}, 200),
        ({"topology": "exponential"}, 200),
        ({"topology": "one_peer_exponential", "rate": 0.1}, 400),
    ],
    ids=["three steps", "directed", "time-varying"],
)
def test_it_converges_to_the_optimum(keys: Any, rounds: int):
    x, _ = track([ALL] * rounds, **keys)[-1]
    assert (x - optimum(ALL)).norm(dim=1).max() < 1e-8


def test_it_converges_linearly_where_dsgd_stops():
    errors = [float((x - optimum(ALL)).norm(dim=1).max()) for x, _ in track([ALL] * 200)]
    assert errors[199] < 1e-2 * errors[149] < 1e-4 * errors[99]
    assert errors[199] < 1e-8
    task = {"name": "quadratic", "samples_per_node": 1} | PROBLEM
    optimizer = {"name": "sgd", "lr": RATE, "precision": "fp64"}
    dsgd = simulate(algorithm="dsgd", task=task, nodes=5, rounds=200, optimizer=optimizer)
    assert min((one.parameters - optimum(ALL)).norm() for one in dsgd.replicas.values()) > 1e-3


def test_batches_that_hold_all_samples_are_full_gradients():
    task = Quadratic(**PROBLEM, samples_per_node=8, noise=1.0)
    x, _ = track([ALL] * 200, task, data={"batch_size": 8})[-1]
    assert (x - optimum(ALL, task)).norm(dim=1).max() < 1e-8
    noisy, corrections = track([ALL] * 200, task, data={"batch_size": 2})[-1]
    assert 1e-3 < (noisy - optimum(ALL, task)).norm(dim=1).max() < 1
    assert corrections.mean(0).abs().max() < 1e-13


# --- members --------------------------------------------------------------------------------------------------------


def test_after_a_change_of_members_all_begin_to_track_anew():
    """Node 2 leaves after 20 rounds and comes back after 200 with the model of another."""
    fewer = (0, 1, 3, 4)
    views = [ALL] * 20 + [fewer] * 200 + [ALL] * 200
    seen = track(views)
    # The first step after a change is along the own gradient: as if the run began there.
    ring = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.float64) / 3
    before, (after, corrections) = seen[19][0], seen[20]
    stepped = (before - RATE * gradients(before))[list(fewer)]
    torch.testing.assert_close(after[list(fewer)], ring @ stepped, rtol=0, atol=1e-13)
    assert torch.equal(after[2], before[2])
    for number in (20, 21, 219):
        assert seen[number][1][list(fewer)].mean(0).abs().max() < 7e-15
    assert corrections[2].any(), "who is away is told of nothing"
    assert (seen[219][0][list(fewer)] - optimum(fewer)).norm(dim=1).max() < 1e-8
    assert (optimum(fewer) - optimum(ALL)).norm() > 0.01
    for number in (220, 221, 419):
        assert seen[number][1].mean(0).abs().max() < 7e-15
    assert (seen[-1][0] - optimum(ALL)).norm(dim=1).max() < 1e-8


def test_who_skips_a_round_keeps_its_correction():
    ran = simulate(
        algorithm={"name": "gradient_tracking", "topology": "complete"},
        task={"name": "test_toy", "poison": 0},
        nodes=3,
        rounds=4,
        on_nan="skip",
        optimizer={"name": "sgd", "lr": 0.1, "precision": "fp64"},
        data={"batch_size": 16},
    )
    corrections = torch.stack([one.local["correction"] for one in ran.replicas.values()])  # type: ignore[misc]
    assert corrections.isfinite().all()
    assert corrections.abs().max() > 1e-3
    assert corrections.sum(0).abs().max() < 1e-14
    assert sum(not row.any() for row in corrections) == 1


class Outlier(Toy, name="test_outlier"):
    """A target so large that its squared error overflows, though not its gradient."""

    def loss(self, module: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        return super().loss(module, (inputs, targets.nan_to_num(nan=1e200)))


def test_who_skips_a_round_keeps_its_correction_beside_a_huge_gradient():
    """Of (g + d) - g nothing would be left of d, and Σ d = 0 be lost. In each epoch of two rounds one node skips."""
    keys: dict[str, Any] = {"algorithm": "gradient_tracking", "nodes": 3, "data": {"batch_size": 8}, "on_nan": "skip"}
    keys |= {"task": {"name": "test_outlier", "poison": 0}}
    keys |= {"optimizer": {"name": "sgd", "lr": 0.1, "precision": "fp64"}}
    before, kept = torch.zeros(3, 83, dtype=torch.float64), 0
    for rounds in range(1, 7):
        ran = simulate(rounds=rounds, **keys)
        after = torch.stack([one.local["correction"] for one in ran.replicas.values()])  # type: ignore[misc]
        assert after.sum(0).abs().max() < 1e-14
        kept += sum(map(torch.equal, after, before))
        before = after
    assert kept == 3
    assert all(row.any() for row in before)


# --- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "edges"), [(1, 0), (2, 2), (3, 6), (5, 10)])
@pytest.mark.parametrize("model", [{"name": "mlp", "width": 16}, {"name": "mlp", "width": 300}, {"name": "cnn"}])
def test_bytes(nodes: int, edges: int, model: Any):
    ran = simulate(
        algorithm="gradient_tracking",
        task={"name": "digits", "model": model},
        nodes=nodes,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    layout = ran.replicas[0].layout
    expected = edges * 4 * (2 * layout.num_values + layout.num_buffer_values)
    assert [record.payload_bytes for record in ran.rounds] == [ran.expected_bytes] * 2 == [expected] * 2


def test_it_refuses_weights_that_do_not_keep_the_mean(tmp_path: Any):
    (tmp_path / "star.txt").write_text("0 1\n1 0\n0 2\n2 0\n")
    topology = {"name": "file", "path": str(tmp_path / "star.txt"), "directed": True, "allow_row_stochastic": True}
    with pytest.raises(ConfigError, match="gradient_tracking needs doubly stochastic weights") as caught:
        simulate(algorithm={"name": "gradient_tracking", "topology": topology}, task="quadratic", nodes=3)
    assert "\n" not in str(caught.value)


def test_by_default_it_is_diging_on_a_ring():
    """The paper's method of one step, in closed form: x ← W (x − η (g + d)), d ← W (g + d) − g."""
    nodes, rounds, rate = 5, 4, 0.1
    task = Quadratic(dimension=3, condition=1, samples_per_node=1)
    ran = simulate(
        algorithm="gradient_tracking",
        task={"name": "quadratic", "dimension": 3, "condition": 1, "samples_per_node": 1},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": rate, "precision": "fp64"},
    )
    ring = torch.tensor([[abs(i - j) in (0, 1, nodes - 1) for j in range(nodes)] for i in range(nodes)]).double().div(3)
    centers = torch.stack([task.center(node) for node in range(nodes)])
    x = d = torch.zeros(nodes, 3, dtype=torch.float64)
    for _ in range(rounds):
        g = x - centers
        x, d = ring @ (x - rate * (g + d)), ring @ (g + d) - g
    found = torch.stack([ran.replicas[node].parameters for node in range(nodes)])
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
