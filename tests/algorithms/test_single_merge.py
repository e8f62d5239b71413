"""A single merge, exactly: tests H1 to H5 of its specification."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starling.actors.tasks import TensorSamples
from starling.actors.tasks.digits import Digits
from starling.actors.tasks.quadratic import Quadratic
from starling.algorithms.api import all_reduce_bytes
from starling.algorithms.gossip.single_merge import SingleMerge
from starling.algorithms.topologies.random_matching import RandomMatching
from tests.toys import Ran, Toy, simulate


def run(*, nodes: int = 4, rounds: int = 6, task: Any = None, lr: float = 0.1, **algorithm: Any) -> Ran:
    task = task or Toy()
    keys = {key: algorithm.pop(key) for key in ("faults", "network", "data") if key in algorithm}
    return simulate(
        {"data": {"batch_size": 8}} | keys,
        algorithm={"name": "single_merge", "steps": 3} | algorithm,
        task={"name": task.name, **task.model_dump(exclude={"name"})},
        nodes=nodes,
        rounds=rounds,
        optimizer={"name": "sgd", "lr": lr, "precision": "fp64"},
        evaluation={"every_rounds": 0},
    )


def models(ran: Ran) -> Tensor:
    return torch.stack([one.parameters for one in ran.replicas.values()])


# --- H1: all together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["mlp", "batch_norm"])
def test_h1_the_merge_makes_all_equal_to_their_mean(nodes: int, kind: Any):
    apart = run(nodes=nodes, rounds=3, neighbors=0.0, merge=False, task=Toy(model=kind))
    merged = run(nodes=nodes, rounds=3, neighbors=0.0, task=Toy(model=kind))
    total = models(apart)[0].clone()
    for one in models(apart)[1:]:
        total += one
    assert all(torch.equal(one, total / nodes) for one in models(merged))
    assert len({one.model_digest() for one in merged.replicas.values()}) == 1


def test_as_many_neighbors_as_there_are_others_are_all():
    full = run(nodes=4, rounds=2, neighbors=3.0, merge=False)
    assert all(torch.equal(one, models(full)[0]) for one in models(full))
    capped = run(nodes=4, rounds=2, neighbors=31.0, merge=False)
    assert torch.equal(models(capped), models(full))


# --- H2: the mean, and the distance from it -------------------------------------------------------------------------


@given(nodes=st.integers(1, 9), matchings=st.integers(1, 9), number=st.integers(0, 50), missing=st.integers(0, 511))
def test_h2_the_mean_is_kept_and_the_distance_shrinks_by_rho(nodes: int, matchings: int, number: int, missing: int):
    members = tuple(range(nodes))
    there = {node for node in members if not missing >> node & 1}
    mixing = RandomMatching(matchings=matchings).mixing(members, number, 0, there)
    values = np.random.default_rng(number).standard_normal((nodes, 3))
    mixed = mixing.matrix() @ values
    assert np.allclose(mixed.mean(axis=0), values.mean(axis=0), rtol=0, atol=1e-12)
    before, after = (float(((one - values.mean(axis=0)) ** 2).sum()) for one in (values, mixed))
    assert after <= mixing.rho**2 * before + 1e-12
    assert mixing.is_symmetric


def test_a_matching_is_one_of_all():
    """N even: each has k neighbours, and N - 1 matchings are the complete graph; in other rounds other pairs."""
    for nodes, matchings in ((4, 1), (6, 3), (8, 7)):
        mixing = RandomMatching(matchings=matchings).mixing(tuple(range(nodes)), 3, 1)
        assert {len(row) for row in mixing.weights.values()} == {matchings + 1}
        assert mixing.num_messages == matchings * nodes
    odd = RandomMatching(matchings=2).mixing(tuple(range(5)), 3, 1)
    assert odd.num_messages == 2 * 4
    met = {
        (node, other)
        for number in range(60)
        for node, row in RandomMatching().mixing(tuple(range(6)), number, 0).weights.items()
        for other in row
    }
    assert len(met) == 36


def test_pairs_shrink_the_distance_as_they_should_on_average():
    """E‖W x - x̄‖² = ½ (N - 2)/(N - 1) ‖x - x̄‖², of 2000 rounds."""
    values = np.random.default_rng(0).standard_normal(8)
    values -= values.mean()
    left = [
        float(((RandomMatching().mixing(tuple(range(8)), number, 0).matrix() @ values) ** 2).sum())
        for number in range(2000)
    ]
    assert np.mean(left) / float((values**2).sum()) == pytest.approx(0.5 * 6 / 7, rel=0.03)


# --- H3: schedules --------------------------------------------------------------------------------------------------


def counts(nodes: int, rounds: int, **fields: Any) -> list[int]:
    algorithm = SingleMerge.model_validate(fields)
    return [algorithm.num_neighbors(number, nodes, rounds) for number in range(rounds)]


def test_h3_truncate_is_dense_as_often_as_it_says():
    found = counts(32, 100, schedule="truncate", neighbors=0.2, begin=0.95, merge=False)
    assert found[95:] == [31] * 5
    assert sum(found[:95]) == 19  # 95 · 0.2
    assert set(found[:95]) == {0, 1}


def test_h3_window_opens_and_closes():
    found = counts(8, 20, schedule="window", neighbors=0.0, late_neighbors=7.0, begin=0.25, width=0.2, merge=False)
    assert found == [0] * 5 + [7] * 4 + [0] * 11


def test_h3_budgets_are_spent():
    for schedule in ("fixed", "linear", "cosine"):
        algorithm = SingleMerge.model_validate({"schedule": schedule, "neighbors": 0.3, "late_neighbors": 2.0})
        budget = sum(algorithm.budget(number, 40) for number in range(39))
        found = counts(16, 40, schedule=schedule, neighbors=0.3, late_neighbors=2.0)
        assert abs(sum(found[:39]) - budget) < 1
        assert found[39] == 15
    assert [SingleMerge(schedule="linear", late_neighbors=1.2).budget(number, 4) for number in range(4)] == (
        pytest.approx([0.2, 0.45, 0.7, 0.95])
    )
    cosine = SingleMerge(schedule="cosine", late_neighbors=1.2)
    assert [cosine.budget(number, 2) for number in (0, 1, 2)] == pytest.approx([0.2, 0.7, 1.2])


def test_five_fifths_are_one():
    assert counts(4, 10, neighbors=0.2, merge=False) == [0, 0, 0, 0, 1] * 2


@pytest.mark.parametrize("nodes", [2, 4, 5])
@pytest.mark.parametrize("width", [16, 300])
def test_h3_bytes(nodes: int, width: int):
    ran = simulate(
        algorithm={"name": "single_merge", "steps": 1, "schedule": "truncate", "neighbors": 0.5, "begin": 0.7},
        task={"name": "digits", "model": {"name": "mlp", "width": width}},
        nodes=nodes,
        rounds=10,
        evaluation={"every_rounds": 0, "max_batches": 1},
    )
    nbytes = ran.replicas[0].layout.nbytes
    sent = [record.payload_bytes for record in ran.rounds]
    assert sent == [ran.planned_bytes(number) for number in range(10)]
    assert sent[7:] == [all_reduce_bytes(nbytes, nodes)] * 3
    assert sum(sent[:7]) == 3 * (nodes - nodes % 2) * nbytes


# --- H4: quadratics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"neighbors": 0.0}, {"neighbors": 0.5}, {"schedule": "linear", "late_neighbors": 3.0}]
)
def test_h4_merged_is_centralized_where_the_curvature_is_shared(fields: dict[str, Any]):
    """Steps and mixing are affine with one matrix: the mean goes its own way, whoever mixes with whom."""
    task = Quadratic(dimension=5)
    ran = run(task=task, rounds=7, lr=0.3, **fields)
    center = torch.stack([task.center(node) for node in range(4)]).mean(0)
    distance = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 0.3 * task.curvature(0), 3 * 7) @ -center
    torch.testing.assert_close(ran.parameters, center + distance, rtol=1e-12, atol=1e-12)


# --- H5: digits of different nodes ----------------------------------------------------------------------------------


class Skewed(Digits, name="test_skewed"):
    """Digits whose owners were drawn digit by digit, from a Dirichlet distribution with α = 0.1."""

    def train_samples(self, num_nodes: int) -> Any:
        samples = super().train_samples(num_nodes)
        inputs, labels = samples.batch(torch.arange(len(samples)))
        rng = np.random.default_rng(0)
        owners = torch.zeros(len(labels), dtype=torch.int64)
        for digit in range(10):
            places = (labels == digit).nonzero().flatten()
            owners[places] = torch.from_numpy(rng.choice(num_nodes, len(places), p=rng.dirichlet([0.1] * num_nodes)))
        owners[:num_nodes] = torch.arange(num_nodes)  # everybody has something
        return TensorSamples(inputs, labels, owners=owners)


def skewed(**algorithm: Any) -> Ran:
    return simulate(
        algorithm={"name": "single_merge", "steps": 10} | algorithm,
        task={"name": "test_skewed", "model": {"name": "mlp", "width": 32}},
        nodes=8,
        rounds=30,
        optimizer={"name": "sgd", "lr": 0.1},
        data={"batch_size": 16},
        evaluation={"every_rounds": 0},
    )


def accuracies(ran: Ran) -> list[float]:
    """Each node's own, on all held-out digits."""
    held_out = Skewed().validation_samples(8)
    return [one.evaluate(held_out, None)["accuracy"] for one in ran.replicas.values()]


@pytest.mark.slow
def test_h5_a_single_merge_is_worth_more_than_all_models_alone():
    local = accuracies(skewed(neighbors=0.2, merge=False))
    merged = skewed(neighbors=0.2)
    assert merged.summary is not None
    accuracy = merged.summary.metrics["accuracy"]
    assert accuracies(merged) == pytest.approx([accuracy] * 8)
    assert accuracy > np.mean(local) + 0.15
    assert accuracy > max(local)


@pytest.mark.slow
def test_h5_late_is_better_than_early_at_equal_bytes():
    keys: dict[str, Any] = {"schedule": "window", "neighbors": 0.0, "late_neighbors": 3.0, "width": 0.1, "merge": False}
    early, late = (skewed(begin=begin, **keys) for begin in (0.1, 0.9))
    assert sum(one.payload_bytes for one in early.rounds) == sum(one.payload_bytes for one in late.rounds) > 0
    assert np.mean(accuracies(late)) > np.mean(accuracies(early))


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("phase", ["train", "post", "commit"])
def test_a_loss_ends_nothing(number: int, phase: str):
    faults = {"events": [{"kind": "kill", "node": 1, "round": number, "phase": phase}]}
    ran = run(rounds=6, neighbors=1.0, faults=faults, network={"start_s": 0.01, "latency_ms": 1})
    assert ran.summary is not None
    assert (ran.summary.rounds, ran.summary.nodes["lost"]) == (6, 1)
    assert ran.summary.metrics["loss"] < 2
