"""Typed state: fields of a class read and assign the keys of ``node.shared`` and ``node.local``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from starling.actors.replica.staged_state import StagedState
from starling.algorithms.api import Message, NodeState
from starling.algorithms.errors import ProgramError
from starling.algorithms.state import field

if TYPE_CHECKING:
    from starling.algorithms.api import State


class Model(NodeState):
    model: Tensor


class Averaged(Model):
    outer: dict[str, State]
    rounds: int = 0
    own_outer: float | None = field("own outer", default=None)
    required: float = field("is required")


@pytest.fixture
def values() -> StagedState:
    return StagedState("shared")


def test_fields_are_keys_of_the_mapping_and_staged_like_them(values: StagedState) -> None:
    state = Averaged(values)
    state.model, state.outer, state.own_outer = torch.zeros(2), {"velocity": torch.ones(2)}, 0.5
    assert list(values) == ["model", "outer", "own outer"]
    assert Model(values).model is values["model"]

    values.rollback()
    assert not list(values)

    state.model = torch.ones(2)
    values.commit()
    assert torch.equal(Model(values).model, torch.ones(2))


def test_defaults_are_given_and_not_stored(values: StagedState) -> None:
    state = Averaged(values)
    assert (state.rounds, state.own_outer) == (0, None)
    assert not list(values)

    state.rounds = 3
    assert (state.rounds, values["rounds"]) == (3, 3)
    del state.rounds
    del state.rounds
    assert (state.rounds, list(values)) == (0, [])


def test_a_field_that_was_never_assigned_is_named(values: StagedState) -> None:
    with pytest.raises(AttributeError, match=r"^Averaged\.model is read before it was assigned: assign it in init or"):
        _ = Averaged(values).model
    with pytest.raises(AttributeError, match=r"^Averaged\.required is read before"):
        _ = Averaged(values).required


def test_a_misspelt_field_is_neither_read_nor_assigned(values: StagedState) -> None:
    state = Averaged(values)
    with pytest.raises(AttributeError, match=r"^Averaged has no field 'modle' \(did you mean model\?\)$"):
        _ = state.modle  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^Averaged has no field 'round' \(did you mean rounds\?\)$"):
        state.round = 1  # type: ignore[attr-defined]
    assert not list(values)


def test_values_are_checked_as_those_of_the_mapping(values: StagedState) -> None:
    parameters = torch.zeros(3)
    values.forbid_aliases_of(parameters)
    with pytest.raises(ProgramError, match=r"node\.shared\['model'\] shares memory with the parameters"):
        Model(values).model = parameters[1:]
    state = Averaged(values)
    state.outer = {"step": 1}
    with pytest.raises(ProgramError, match="not written in place"):
        state.outer["step"] = 2


def test_members_of_a_message_are_taken_by_name_and_kind() -> None:
    message = Message(2, {"model": torch.ones(2), "speed": 0.5}, staleness=0)
    assert torch.equal(message.tensor("model"), torch.ones(2))
    assert message.number("speed") == 0.5
    with pytest.raises(ProgramError, match="^node 2 sent float as 'speed'; it must be a tensor$"):
        message.tensor("speed")
    with pytest.raises(ProgramError, match="^node 2 sent a tensor as 'model'; it must be a number$"):
        message.number("model")
    for payload in ({"speed": 0.5}, 0.5):
        with pytest.raises(ProgramError, match="^node 2 sent a message without 'model'$"):
            replace(message, payload=payload).tensor("model")
