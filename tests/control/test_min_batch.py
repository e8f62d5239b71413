"""A least size of batches: rests join the batch before them, and each sample is still drawn once per epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from starling.actors.data import DataConfig, Epoch
from starling.actors.data.plans import Place, PlannedDraws, Segment
from starling.actors.data.samplers import Position, piece_sizes, planned_samples
from starling.actors.replica.node_data import DataSource
from starling.actors.replica.replica import Replica
from starling.algorithms.errors import DataError
from starling.orchestrator.config.schema import parse
from tests.toys import simulate


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_an_epoch_has_each_sample_once_and_no_small_batch(count: int, size: int, data: st.DataObject):
    least = data.draw(st.integers(1, size))
    draws = Epoch().begin(torch.arange(count), 0, 0)
    draws.min_batch = least
    for epoch in range(2):
        batches = [draws.draw(size) for _ in range(draws.steps_per_epoch(size))]
        assert sorted(index for batch in batches for index in batch.tolist()) == list(range(count))
        assert [len(batch) for batch in batches] == piece_sizes(count, size, least)
        assert min(map(len, batches)) >= min(least, count)
        assert draws.position == Position(epoch + 1)
    assert -(-planned_samples(count, size, least) // size) == len(piece_sizes(count, size, least))


def planned(own: int | None, extras: tuple[Segment, ...]) -> PlannedDraws:
    parts = {0: torch.arange(10), 1: torch.arange(10, 20)}
    mine = None if own is None else Epoch().begin(parts[own], 0, own)
    draws = PlannedDraws(mine, parts[0], 0, 0, lambda part: Epoch().begin(parts[part], 0, part))  # pyright: ignore[reportArgumentType]
    draws.min_batch = 2
    if mine is not None:
        mine.min_batch = 2
    draws.plan(Place(extras))
    return draws


def test_a_rest_of_what_was_handed_joins_the_batch_before_it():
    draws = planned(0, (Segment(1, 0, 0, 3), Segment(1, 0, 8, 10)))
    assert [len(draws.draw(4)) for _ in range(3)] == [5, 4, 4]
    assert draws.position == Position(0, 8, 5)


def test_one_sample_that_was_handed_is_drawn_with_a_nodes_own():
    draws = planned(0, (Segment(1, 0, 9, 10),))
    first = draws.draw(4)
    assert (len(first), draws.position) == (5, Position(0, 4, 1))
    assert (first >= 10).sum() == 1


def test_one_sample_waits_where_a_node_has_none_of_its_own():
    draws = planned(None, (Segment(1, 0, 9, 10),))
    assert (len(draws.draw(4)), draws.position) == (0, Position())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_batch": 9, "batch_size": 8}, "min_batch .9. is more than batch_size .8."),
        ({"min_batch": 2, "sampler": "poisson"}, "min_batch cannot be kept by the sampler poisson"),
    ],
)
def test_what_cannot_be_kept(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(keys)


NORM = {"task": {"name": "test_toy", "model": "batch_norm", "num_samples": 27}, "rounds": 6}


@pytest.mark.parametrize("algorithm", ["test_silent", {"name": "fedavg", "epochs": 1}, "ddp"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batch_norm_trains_whatever_is_left(algorithm: Any, accumulate: int):
    keys = NORM | {"algorithm": algorithm, "optimizer": {"accumulate": accumulate}}
    ran = simulate(keys | {"data": {"batch_size": 4, "min_batch": 2}}, nodes=3)
    assert ran.summary is not None
    assert ran.summary.rounds == 6


def test_batch_norm_trains_while_parts_change_hands():
    faults = {"events": [{"kind": "kill", "node": node, "round": node + 1, "phase": "train"} for node in range(3)]}
    keys = NORM | {"algorithm": {"name": "fedavg", "steps": 2}, "rounds": 12, "faults": faults}
    simulate(keys | {"data": {"batch_size": 4, "min_batch": 2}}, nodes=4)


def test_a_node_with_fewer_samples_is_told():
    config = parse({"algorithm": "test_silent", "task": "test_toy", "data": {"batch_size": 4, "min_batch": 2}})
    samples = config.task.train_samples(1)
    with pytest.raises(DataError, match=r"data: node 1 has 1 samples, fewer than data.min_batch \(2\); lower that"):
        Replica(1, config.replica_spec(), DataSource(samples, torch.tensor([3])))
