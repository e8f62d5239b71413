"""State transfer: the donor's committed bits, and nothing of its open round."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from starling.actors.data import Place, Position, Segment
from starling.actors.replica.replica import Replica
from starling.actors.replica.state_transfer import (
    StateExport,
    donor_among,
    export_state,
    is_blank,
    load_state,
    snapshot,
    with_shared,
)
from starling.algorithms.api import Train
from starling.algorithms.errors import ProgramError
from tests.toys import Toy, begin, replica

MEMBERS = (0, 1)
NO_FENCE = threading.Event()
STATE: dict[str, Any] = {
    "model": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
    "outer": {"velocity": [torch.ones(2, dtype=torch.float64), {}], "step": 3, "factor": 0.1, "name": "x", "on": True},
    "value": None,
    "tensor": {"tensor": 0},
    "list": [],
}


def donor(**keys: Any) -> Replica:
    one = replica(0, num_nodes=2, **keys)
    for name, value in STATE.items():
        one.shared[name] = value
    one.local["mine"] = 1
    begin(one, 6, MEMBERS)
    one.trainer.train(Train(steps=2), NO_FENCE)
    one.commit()
    return one


def joiner(*, fresh: bool = False, **keys: Any) -> Replica:
    """A node that has been away, or one that is new."""
    one = replica(1, num_nodes=2, **keys)
    if fresh:
        one.local["own"] = torch.ones(2)
        one.commit()
        return one
    one.shared["old"] = 1
    one.local["own"] = torch.ones(2)
    begin(one, 1, MEMBERS)
    one.trainer.train(Train(steps=1), NO_FENCE)
    one.commit()
    begin(one, 2, MEMBERS)
    one.trainer.train(Train(steps=1), NO_FENCE)
    one.local["staged"] = 1
    return one


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def sent(export: StateExport) -> StateExport:
    """As it comes out of an object store: other memory, which is read-only."""
    arrays = [array.copy() for array in export.arrays]
    for array in arrays:
        array.flags.writeable = False
    return StateExport(json.loads(json.dumps(export.meta)), arrays)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("model", ["mlp", "batch_norm"])
def test_a_joiner_has_the_donors_bits(model: Any, fresh: bool):
    one, other = donor(task=Toy(model=model), name="adam"), joiner(fresh=fresh, task=Toy(model=model), name="adam")
    export = export_state(one)
    load_state(other, sent(export))
    for _ in range(2):
        assert torch.equal(other.parameters, one.parameters)
        assert torch.equal(other.buffers, one.buffers)
        assert other.shared.digest() == one.shared.digest()
        assert other.model_digest() == one.model_digest()
        assert dict(other.local).keys() == {"own"}
        assert other.committed_round == 6
        other.rollback()  # changes nothing: it is committed
    assert other.staged_round is None


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("on_join", ["fresh", "donor"])
@pytest.mark.parametrize("name", ["adam", "adafactor", "adopt"])
def test_the_optimizer(fresh: bool, on_join: Any, name: str):
    one, other = donor(name=name, on_join=on_join), joiner(fresh=fresh, name=name, on_join=on_join)
    expected = (one if fresh and on_join == "donor" else other).optimizer.state()
    load_state(other, sent(export_state(one)))
    assert same(other.optimizer.state(), expected)


@pytest.mark.parametrize("name", ["sgd", "adam", "adafactor", "adopt", "prodigy"])
def test_a_successor_goes_on_as_the_node_would_have(name: str):
    options = {"momentum": 0.9} if name == "sgd" else {}
    one, other = donor(name=name, **options), replica(0, num_nodes=2, name=name, **options)
    load_state(other, sent(export_state(one, everything=True)))
    assert dict(other.local) == {"mine": 1}
    assert other.data.position == one.data.position
    for node in (one, other):
        begin(node, 7, MEMBERS)
        node.trainer.train(Train(steps=3), NO_FENCE)
        node.commit()
    assert torch.equal(other.parameters, one.parameters)
    assert same(other.optimizer.state(), one.optimizer.state())


@pytest.mark.parametrize("name", ["adam", "adopt"])
def test_a_rolled_back_optimizer_repeats_its_steps(name: str):
    one = donor(name=name, rollback=True)
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=2), NO_FENCE)
    expected = one.parameters.clone()
    one.rollback()
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=2), NO_FENCE)
    assert torch.equal(one.parameters, expected)


def test_where_a_lost_node_was_in_its_data_its_replacement_goes_on():
    other = joiner()
    load_state(other, export_state(donor()), position=Position(2, 4))
    assert other.data.position == Position(2, 4)


def test_nothing_is_shared_with_the_donor():
    one, other = donor(), joiner()
    load_state(other, export_state(one))
    before, shared = other.parameters.clone(), other.shared.digest()
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=1), NO_FENCE)
    one.shared["model"] = torch.zeros(1)
    one.commit()
    assert torch.equal(other.parameters, before)
    assert other.shared.digest() == shared
    mine, theirs = other.shared["half"], one.shared["half"]
    assert isinstance(mine, Tensor)
    assert isinstance(theirs, Tensor)
    assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("model", ["mlp", "batch_norm"])
def test_a_snapshot_stays_as_it_is(model: Any):
    """It is handed over while the node trains and commits."""
    one = donor(task=Toy(model=model), name="adam")
    taken = snapshot(one)
    before = sent(taken)
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=2), NO_FENCE)
    one.buffers.add_(1.0)
    one.shared["model"] = torch.zeros(1)
    one.local["own"] = torch.ones(1)
    one.stage()
    one.commit()
    assert taken.meta == before.meta
    assert all(map(np.array_equal, taken.arrays, before.arrays))
    assert not all(map(np.array_equal, snapshot(one).arrays, before.arrays))


def test_who_has_been_away_gives_nobody_its_shared_state():
    away, there, without = donor(), donor(), donor()
    there.shared["model"] = torch.zeros(1)
    begin(there, 7, MEMBERS)
    there.stage()
    there.commit()
    saved = {0: snapshot(away), 1: snapshot(there), 2: snapshot(without, shared=False)}
    assert donor_among(saved) is saved[1]
    assert with_shared(saved[2], donor_among(saved)).meta["shared"] is not None


def test_an_open_round_stays_at_home():
    one = donor(task=Toy(model="batch_norm"))
    digest, shared = one.model_digest(), one.shared.digest()
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=1), NO_FENCE)
    one.shared["model"] = torch.zeros(1)
    one.stage()
    other = joiner(task=Toy(model="batch_norm"))
    load_state(other, export_state(one))
    assert other.model_digest() == digest
    assert other.shared.digest() == shared


def test_the_schedule_goes_on_where_the_run_is():
    schedule = {"name": "linear", "total_steps": 100}
    one, other = donor(schedule=schedule), joiner(schedule=schedule)
    other.rollback()
    assert other.schedule.rate() != one.schedule.rate()
    load_state(other, export_state(one))
    assert other.schedule.rate() == one.schedule.rate()
    ahead = joiner(schedule=schedule)
    ahead.trainer.train(Train(steps=5), NO_FENCE)
    ahead.commit()
    rate = ahead.schedule.rate()
    load_state(ahead, export_state(one))
    assert ahead.schedule.rate() == rate


def test_its_place_in_its_own_data_stays():
    one, other = donor(), joiner()
    load_state(other, export_state(one))
    assert other.data.position == Position(0, 8)  # the one committed step's


def test_size():
    one = donor(task=Toy(model="batch_norm"))
    export = export_state(one)
    tensors = 24 + 6 + 8 + 0 + 2 + 16
    assert export.nbytes == one.layout.nbytes + one.layout.buffer_nbytes + 8 + tensors
    assert all(array.dtype == np.uint8 and array.flags.c_contiguous for array in export.arrays)
    # Large arrays are not copied before they are sent.
    assert export.arrays[0].ctypes.data == one.committed_tensors().parameters.data_ptr()


def test_a_state_of_another_run():
    with pytest.raises(ProgramError, match=r"the donor's state is of a run with another configuration"):
        load_state(joiner(task=Toy(model="linear")), export_state(donor()))


def test_a_state_of_another_model():
    export = export_state(donor())
    other = joiner(task=Toy(model="linear"))
    export.meta["run"] = other.spec.fingerprint
    with pytest.raises(ProgramError, match=r"the donor's state is of a model with other tensors"):
        load_state(other, export)


# --- the committed model --------------------------------------------------------------------------------------------


def test_the_committed_model_while_a_round_is_open():
    one = donor(task=Toy(model="batch_norm"))
    expected = one.parameters.clone(), one.buffers.clone()
    begin(one, 7, MEMBERS)
    one.trainer.train(Train(steps=1), NO_FENCE)
    assert not torch.equal(one.parameters, expected[0])
    for mine, wanted in zip(one.committed_model(), expected, strict=True):
        assert torch.equal(mine, wanted)
    one.commit()
    assert torch.equal(one.committed_model()[0], one.parameters)


def test_what_a_node_was_handed_of_others_goes_to_whoever_takes_its_place():
    one = joiner()
    one.data.parts = [torch.arange(10), torch.arange(10, 20)]
    one.replan(Place((Segment(1, 3, 2, 8),), Position(2, 4, 1)))
    drawn = one.data.draw(one.spec.samples_per_step)
    one.commit()
    other = joiner()
    other.data.parts = one.data.parts
    load_state(other, export_state(one, everything=True))
    assert other.data.position == one.data.position == Position(2, 4, 6)
    assert (other.data.extras, len(drawn)) == (one.data.extras, 5)
    assert other.data.draw(other.spec.samples_per_step).tolist() == one.data.draw(one.spec.samples_per_step).tolist()
    # A joiner of another node is handed nothing of it.
    third = joiner()
    load_state(third, export_state(one))
    assert third.data.extras == ()


def test_a_donor_that_has_committed_nothing_has_nothing_to_give():
    donor = replica()
    assert is_blank(export_state(donor))
    begin(donor)
    donor.stage()
    donor.commit()
    assert not is_blank(export_state(donor))
