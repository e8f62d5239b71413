"""Staged state: all of a round or nothing of it, and never a write in place that goes unnoticed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling.actors.replica.staged_state import StagedState
from starling.algorithms.errors import ProgramError


@pytest.fixture
def state() -> StagedState:
    state = StagedState("shared")
    state["anchor"] = torch.arange(3.0)
    state["outer"] = {"velocity": torch.zeros(3), "step": 0, "history": [1.0, torch.ones(1)]}
    state["note"] = None
    state.commit()
    return state


# --- the two layers -------------------------------------------------------------------------------------------------


def test_reads_see_the_rounds_own_writes(state: Any):
    state["anchor"] = torch.ones(3)
    state["new"] = 1
    del state["note"]
    assert state["anchor"].tolist() == [1.0, 1.0, 1.0]
    assert set(state) == {"anchor", "outer", "new"}
    assert len(state) == 3
    assert "note" not in state
    with pytest.raises(KeyError):
        state["note"]
    with pytest.raises(KeyError):
        del state["note"]


def test_rollback_finds_the_old_bits(state: Any):
    before, digest = state["anchor"], state.digest()
    state["anchor"] = torch.ones(3)
    state["new"] = 1
    del state["note"]
    state.rollback()
    assert state["anchor"] is before
    assert set(state) == {"anchor", "outer", "note"}
    assert state.digest() == digest
    state.check_unwritten()


def test_commit_makes_it_current(state: Any):
    state["new"] = 1
    del state["note"]
    state.commit()
    state.rollback()
    assert set(state) == {"anchor", "outer", "new"}


def test_the_committed_layer(state: Any):
    before = dict(state)
    state["anchor"] = torch.ones(3)
    state["new"] = 1
    del state["note"]
    committed = state.committed()
    assert committed == before
    assert committed["anchor"] is before["anchor"]


def test_replacing_all(state: Any):
    state["anchor"] = torch.ones(3)
    del state["note"]
    state.replace({"note": "x", "tree": {"a": [1]}})
    state.rollback()
    assert dict(state) == {"note": "x", "tree": {"a": [1]}}
    with pytest.raises(ProgramError):
        state["tree"]["a"].append(2)
    state.check_unwritten()


def test_removed_and_assigned_again(state: Any):
    del state["note"]
    state["note"] = "back"
    state.commit()
    assert state["note"] == "back"
    state["note"] = "staged"
    del state["note"]
    assert "note" not in state
    state.rollback()
    assert state["note"] == "back"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("set"), st.sampled_from("abc"), st.integers()),
            st.tuples(st.just("del"), st.sampled_from("abc"), st.none()),
            st.tuples(st.sampled_from(["commit", "rollback"]), st.none(), st.none()),
        )
    )
)
def test_behaves_like_two_dicts(steps: list[tuple[str, Any, Any]]):
    state = StagedState("local")
    committed: dict[str, Any] = {}
    current: dict[str, Any] = {}
    for what, key, value in steps:
        if what == "set":
            state[key] = current[key] = value
        elif what == "del" and key in current:
            del state[key], current[key]
        elif what == "commit":
            state.commit()
            committed = dict(current)
        elif what == "rollback":
            state.rollback()
            current = dict(committed)
        assert dict(state) == current
        assert len(state) == len(current)
        state.check_unwritten()


# --- writing in place -----------------------------------------------------------------------------------------------


def test_a_committed_tensor_that_is_written(state: Any):
    state["anchor"].add_(1)
    with pytest.raises(ProgramError, match=r"node\.shared\['anchor'\] was written in place"):
        state.check_unwritten()


def test_a_tensor_that_is_written_after_its_assignment(state: Any):
    value = torch.zeros(3)
    state["mine"] = value
    value[1] = 1
    with pytest.raises(ProgramError, match="mine"):
        state.check_unwritten()


def test_a_view_and_a_nested_tensor_that_are_written(state: Any):
    state["outer"]["velocity"][:2].mul_(2)
    with pytest.raises(ProgramError, match="outer"):
        state.check_unwritten()
    other: Any = StagedState("local")
    other["list"] = [1, [torch.zeros(2)]]
    other["list"][1][0].fill_(1)
    with pytest.raises(ProgramError, match="list"):
        other.check_unwritten()


def test_a_written_tensor_that_was_replaced_since(state: Any):
    # Its old bits are what a rollback would go back to, and what other nodes of the process hold.
    anchor = state["anchor"]
    anchor.add_(1)
    state["anchor"] = anchor * 2
    with pytest.raises(ProgramError, match="anchor"):
        state.check_unwritten()
    state.rollback()
    with pytest.raises(ProgramError, match="anchor"):
        state.check_unwritten()


@pytest.mark.parametrize(
    "write",
    [
        lambda state: state["outer"].update(step=1),
        lambda state: state["outer"].pop("step"),
        lambda state: state["outer"].setdefault("more", 1),
        lambda state: state["outer"].__setitem__("step", 1),
        lambda state: state["outer"].__delitem__("step"),
        lambda state: state["outer"].__ior__({"step": 1}),
        lambda state: state["outer"]["history"].append(1.0),
        lambda state: state["outer"]["history"].__iadd__([1.0]),
        lambda state: state["outer"]["history"].sort(),
        lambda state: state["outer"]["history"].__setitem__(0, 2.0),
    ],
)
def test_containers_refuse_writes(state: Any, write: Any):
    digest = state.digest()
    with pytest.raises(ProgramError, match="not written in place"):
        write(state)
    assert state.digest() == digest


def test_writing_to_what_was_assigned_changes_nothing():
    state = StagedState("local")
    mine: Any = {"a": 1, "b": [1]}
    state["x"] = mine
    mine["a"] = 2
    mine["b"].append(2)
    assert state["x"] == {"a": 1, "b": [1]}


def test_copies_of_containers_can_be_written(state: Any):
    outer = copy.deepcopy(state["outer"])
    outer["history"].append(2.0)
    outer["velocity"] += 1
    assert type(outer) is dict
    shallow = {**state["outer"], "step": 1}
    assert shallow["step"] == 1
    assert state["outer"]["step"] == 0
    state.check_unwritten()


# --- what may be assigned -------------------------------------------------------------------------------------------


def test_aliases_of_the_parameters():
    parameters, buffers = torch.zeros(10), torch.zeros(0)
    state = StagedState("local")
    state.forbid_aliases_of(parameters, buffers)
    for alias in (parameters, parameters[2:4], parameters.view(2, 5), parameters.detach()):
        with pytest.raises(ProgramError, match=r"node\.local\['x/y/0'\] shares memory with the parameters"):
            state["x"] = {"y": [alias]}
    state["x"] = {"y": [parameters.clone(), parameters[:0], torch.empty(0)]}


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ((1, 2), "is a tuple"),
        ({"a": {1, 2}}, r"\['x/a'\] is a set"),
        ([object()], r"\['x/0'\] is a object"),
        ({1: 2}, "keys that are not texts"),
        ({"a": {None: 2}}, r"\['x/a'\] has keys"),
    ],
)
def test_what_cannot_be_assigned(value: Any, what: str):
    state = StagedState("local")
    with pytest.raises(ProgramError, match=what):
        state["x"] = value
    assert "x" not in state


# --- equality, digests, aliasing ------------------------------------------------------------------------------------


def filled(**values: Any) -> Any:
    state = StagedState("shared")
    for key, value in values.items():
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([0.0]), torch.tensor([0.0]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor(1.0), 1.0, False),
        (torch.empty(0), torch.empty(0), True),
        (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous(), True),
        (1, 1.0, False),
        (1, True, False),
        (0.0, -0.0, False),
        (math.nan, math.nan, True),
        ({}, [], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ([1, 2], [2, 1], False),
        ([], None, False),
    ],
)
def test_equal_where_the_bits_are(one: Any, other: Any, equal: bool):
    mine, theirs = filled(x=one), filled(x=other)
    assert mine.equals(theirs) == equal
    assert theirs.equals(mine) == equal
    assert (mine.digest() == theirs.digest()) == equal


def test_order_of_assignment_and_layer_do_not_matter():
    mine, theirs = filled(a=1, b=2), filled(b=2)
    theirs.commit()
    theirs["a"] = 1
    assert mine.equals(theirs)
    assert mine.digest() == theirs.digest()
    theirs["c"] = 1
    assert not mine.equals(theirs)


def test_adopted_state_is_the_same_memory():
    mine, theirs = filled(a=torch.ones(2)), filled(a=torch.ones(2))
    mine.commit()
    theirs.commit()
    mine.adopt(theirs)
    assert mine["a"] is theirs["a"]
    mine["a"] = torch.zeros(2)
    assert theirs["a"].tolist() == [1.0, 1.0]
    theirs["a"].add_(1)
    for state in (mine, theirs):
        with pytest.raises(ProgramError):
            state.check_unwritten()
