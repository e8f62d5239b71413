"""Close policies: when they say yes, that more arrivals take no yes back, and that coded sums can be recovered."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from starling.algorithms.closing import ClosePolicy, Quorum, Waited
from starling.algorithms.closing.base import Everyone, FirstK, Grace
from starling.algorithms.closing.coded import Decodable, OneOfEach, decoding
from starling.algorithms.registry import table

NODES = frozenset(range(6))


def cyclic(num_nodes: int, redundancy: int, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """A cyclic repetition code: node i holds parts i … i + redundancy, and any num_nodes − redundancy nodes suffice.

    Rows that are orthogonal to those of a random matrix whose own rows sum to zero, so that the all-ones vector is.
    """
    rng = torch.Generator().manual_seed(seed)
    check = torch.randn(redundancy, num_nodes, dtype=torch.float64, generator=rng)
    check[:, -1] = -check[:, :-1].sum(dim=1)
    rows = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    for node in range(num_nodes):
        others = [(node + step) % num_nodes for step in range(1, redundancy + 1)]
        rows[node, node] = 1
        rows[node, others] = torch.linalg.solve(check[:, others], -check[:, node])
    return tuple(tuple(row) for row in rows.tolist())


CYCLIC = cyclic(6, 2)
REPETITION = ((1, 1, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0), (0, 0, 1, 1, 0, 0)) + 3 * ((0, 0, 0, 0, 1, 1),)
GROUPS = ((0, 1), (2,), (3, 4, 5))
POLICIES = [
    Quorum(),
    Everyone(),
    FirstK(k=1),
    FirstK(k=3),
    FirstK(k=9),
    Grace(seconds=2.0),
    Grace(after=3, seconds=2.0),
    Grace(after=9, seconds=0.0),
    Grace(factor=1.5),
    Grace(after=2, seconds=2.0, factor=0.5),
    OneOfEach(groups=GROUPS),
    OneOfEach(groups=GROUPS, grace_s=2.0),
    OneOfEach(groups=GROUPS, grace_s=2.0, grace_factor=1.0),
    Decodable(rows=REPETITION),
    Decodable(rows=REPETITION, grace_factor=0.5),
    Decodable(rows=CYCLIC),
]

policies = st.sampled_from(POLICIES)
some = st.frozensets(st.sampled_from(sorted(NODES)))
seconds = st.floats(0, 5)
waits = st.builds(Waited, seconds, seconds)
AT_ONCE = Waited(1.0, 0.0)
LONG = Waited(1.0, 1e9)


def test_are_in_the_table():
    names = {"quorum": Quorum, "all": Everyone, "first_k": FirstK, "grace": Grace, "one_of_each": OneOfEach}
    assert table(ClosePolicy).items() >= (names | {"decodable": Decodable}).items()
    for policy in POLICIES:
        assert TypeAdapter(ClosePolicy).validate_python(policy.model_dump()) == policy
        assert hash(policy) == hash(policy.model_copy())


def later(waited: Waited, seconds: float) -> Waited:
    return replace(waited, since_first_s=waited.since_first_s + seconds)


# --- what holds for all ---------------------------------------------------------------------------------------------


@given(policy=policies, active=some, arrived=some, more=some, waited=waits)
def test_more_arrivals_take_no_yes_back(
    policy: ClosePolicy, active: frozenset[int], arrived: frozenset[int], more: frozenset[int], waited: Waited
):
    arrived, more = arrived & active, (arrived | more) & active
    assert policy.enough(arrived, active, waited) <= policy.enough(more, active, waited)
    assert policy.past_deadline(arrived, active) <= policy.past_deadline(more, active)


@given(policy=policies, active=some, arrived=some, waited=waits, longer=seconds)
def test_waiting_takes_no_yes_back(
    policy: ClosePolicy, active: frozenset[int], arrived: frozenset[int], waited: Waited, longer: float
):
    arrived &= active
    assert policy.enough(arrived, active, waited) <= policy.enough(arrived, active, later(waited, longer))


@given(policy=policies, active=some, waited=waits)
def test_enough_when_nobody_is_missing(policy: ClosePolicy, active: frozenset[int], waited: Waited):
    assert policy.enough(active, active, waited)
    assert policy.past_deadline(active, active)
    assert policy.ask_again_s(active, active, waited) is None


@given(policy=policies, active=some, arrived=some, waited=waits)
def test_asked_again_only_while_the_answer_is_no_and_then_it_is_yes(
    policy: ClosePolicy, active: frozenset[int], arrived: frozenset[int], waited: Waited
):
    arrived &= active
    again = policy.ask_again_s(arrived, active, waited)
    if again is not None:
        assert again > 0
        assert not policy.enough(arrived, active, waited)
        assert policy.enough(arrived, active, later(waited, again))


@given(policy=policies, active=some, arrived=some)
def test_what_is_enough_is_enough_past_the_deadline(
    policy: ClosePolicy, active: frozenset[int], arrived: frozenset[int]
):
    arrived &= active
    assert policy.enough(arrived, active, AT_ONCE) <= policy.past_deadline(arrived, active)


# --- by counting ----------------------------------------------------------------------------------------------------


def test_quorum_and_all_differ_past_the_deadline():
    for policy in (Quorum(), Everyone()):
        assert not policy.enough({0, 1}, {0, 1, 2}, LONG)
        assert policy.enough({0, 1, 2}, {0, 1, 2}, AT_ONCE)
    assert Quorum().past_deadline({0}, {0, 1, 2})
    assert not Everyone().past_deadline({0, 1}, {0, 1, 2})


def test_first_k():
    policy = FirstK(k=2)
    assert [policy.enough(set(range(count)), {0, 1, 2, 3}, AT_ONCE) for count in range(5)] == [False, False] + [
        True
    ] * 3
    assert policy.enough({5}, {5}, AT_ONCE)
    assert not policy.enough(set(), {5}, AT_ONCE)
    assert policy.past_deadline({0}, {0, 1, 2})
    with pytest.raises(ValidationError):
        FirstK(k=0)


def test_grace():
    policy = Grace(after=2, seconds=5.0)
    times = [Waited(9.0, since) for since in (0.0, 3.5, 4.999, 5.0, 6.0)]
    assert [policy.enough({0, 1}, NODES, waited) for waited in times] == [False, False, False, True, True]
    assert [policy.ask_again_s({0, 1}, NODES, waited) for waited in times[:2]] == [5.0, 1.5]
    assert [policy.ask_again_s({0, 1}, NODES, waited) for waited in times[3:]] == [None, None]
    assert not policy.enough({0}, NODES, LONG)
    assert policy.enough({0}, {0}, AT_ONCE)
    assert policy.ask_again_s({0}, NODES, times[1]) is None
    assert policy.past_deadline({0}, NODES)
    for wrong in ({"seconds": -1.0}, {"factor": -1.0}, {"factor": float("inf")}):
        with pytest.raises(ValidationError):
            Grace.model_validate(wrong)


def test_grace_as_a_multiple_of_what_the_fastest_took():
    policy = Grace(factor=0.5)
    assert [policy.enough({0}, NODES, Waited(first, 2.0)) for first in (3.0, 4.0, 4.1)] == [True, True, False]
    assert policy.ask_again_s({0}, NODES, Waited(6.0, 2.0)) == 1.0
    both = Grace(seconds=2.0, factor=0.5)
    assert [both.ask_again_s({0}, NODES, Waited(first, 0.5)) for first in (0.0, 4.0, 6.0)] == [1.5, 1.5, 2.5]


@given(
    first=st.floats(0, 2.0**31),
    seconds=st.floats(0, 1e4),
    between=st.floats(0, 1),
    policy=st.sampled_from(["grace", "one_of_each"]),
)
def test_grace_ends_on_a_clock_that_rounds(first: float, seconds: float, between: float, policy: str):
    """A tenth of a second later by a clock at 2³⁰ s is up to 1e-7 s earlier or later."""
    one = Grace(seconds=seconds) if policy == "grace" else OneOfEach(groups=((0,),), grace_s=seconds)
    now = first + between * seconds
    again = one.ask_again_s({0}, NODES, Waited(0.0, now - first))
    if again is not None:
        assert now + again > now
        now += again
    assert one.enough({0}, NODES, Waited(0.0, now - first))
    assert one.ask_again_s({0}, NODES, Waited(0.0, now - first)) is None


# --- coded ----------------------------------------------------------------------------------------------------------


def test_one_of_each():
    policy = OneOfEach(groups=GROUPS)
    assert policy.enough({1, 2, 4}, NODES, AT_ONCE)
    assert policy.past_deadline({1, 2, 4}, NODES)
    for missing in ({1, 2}, {0, 1, 3, 4, 5}, {2, 3, 4, 5}, set()):
        assert not policy.enough(missing, NODES, LONG)
        assert not policy.past_deadline(missing, NODES)
    # Group (2,) is lost: the exchange closes with those that are left, and the program sees who they are.
    assert policy.enough({0, 1, 3}, {0, 1, 3}, AT_ONCE)
    assert not policy.recoverable({0, 1, 3})


@pytest.mark.parametrize(
    "policy",
    [
        OneOfEach(groups=((0, 2), (1, 3)), grace_s=2.0, grace_factor=0.5),
        Decodable(rows=((1, 0), (0, 1), (1, 0), (0, 1)), grace_s=2.0, grace_factor=0.5),
    ],
    ids=lambda policy: policy.name,
)
def test_those_close_behind_get_a_grace(policy: OneOfEach | Decodable):
    everybody = {0, 1, 2, 3}
    assert not policy.enough({0, 1}, everybody, Waited(4.0, 0.5))
    assert policy.ask_again_s({0, 1}, everybody, Waited(4.0, 0.5)) == 1.5
    assert policy.ask_again_s({0, 1}, everybody, Waited(6.0, 0.5)) == 2.5
    assert policy.ask_again_s({0, 2}, everybody, Waited(4.0, 0.5)) is None, "time alone does not help"
    assert policy.enough({0, 1}, everybody, Waited(4.0, 2.0))
    assert not policy.enough({0, 1}, everybody, Waited(6.0, 2.0))
    assert policy.enough({0, 1}, everybody, Waited(6.0, 3.0))
    assert not policy.enough({0, 2}, everybody, LONG)
    assert policy.ask_again_s({0, 1}, everybody, Waited(4.0, 2.0)) is None
    assert policy.enough(everybody, everybody, AT_ONCE)
    assert policy.past_deadline({0, 1}, everybody), "the deadline waits for no grace"
    assert not policy.past_deadline({0, 2}, everybody)


def test_one_of_each_is_decodable_by_repetition():
    one, other = OneOfEach(groups=GROUPS), Decodable(rows=REPETITION)
    answers = {True: 0, False: 0}
    for size in range(7):
        for arrived in itertools.combinations(range(6), size):
            assert one.recoverable(set(arrived)) == other.recoverable(set(arrived))
            answers[one.recoverable(set(arrived))] += 1
    assert answers == {True: 21, False: 43}


@pytest.mark.parametrize(("num_nodes", "redundancy"), [(5, 1), (6, 2), (7, 3), (4, 0)])
def test_cyclic_code_is_decodable_from_all_but_the_stragglers(num_nodes: int, redundancy: int):
    rows = cyclic(num_nodes, redundancy)
    assert all(sum(entry != 0 for entry in row) == redundancy + 1 for row in rows)
    policy = Decodable(rows=rows)
    for size in range(num_nodes + 1):
        for arrived in itertools.combinations(range(num_nodes), size):
            assert policy.recoverable(set(arrived)) == (size >= num_nodes - redundancy)


@given(arrived=some, rows=st.sampled_from([CYCLIC, REPETITION]))
def test_decoding_recovers_the_sum(arrived: frozenset[int], rows: tuple[tuple[float, ...], ...]):
    parts = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sent = torch.tensor(rows, dtype=torch.float64) @ parts
    coefficients = decoding(rows, arrived)
    if coefficients is not None:
        assert list(coefficients) == sorted(arrived)
        recovered = sum(coefficient * sent[node] for node, coefficient in coefficients.items())
        assert torch.is_tensor(recovered)
        torch.testing.assert_close(recovered, parts.sum(0), rtol=0, atol=1e-6)


def test_decoding_by_hand():
    assert decoding(((2.0, 0.0), (0.0, 1.0), (1.0, 2.0)), frozenset({0, 1})) == pytest.approx({0: 0.5, 1: 1.0})
    assert decoding(((2.0, 0.0), (0.0, 1.0), (1.0, 2.0)), frozenset({0, 2})) == pytest.approx({0: 0.25, 2: 0.5})
    assert decoding(((1.0,), (1.0,)), frozenset({0, 1})) == pytest.approx({0: 0.5, 1: 0.5})  # the least norm
    assert decoding(((1.0, 1.0), (1.0, 1.0 + 1e-6)), frozenset({1})) is None


def test_nodes_without_a_row_decide_nothing():
    policy = Decodable(rows=((1.0, 0.0), (0.0, 1.0)))
    assert not policy.enough({0, 7}, {0, 1, 7}, AT_ONCE)
    assert policy.enough({0, 1}, {0, 1, 7}, AT_ONCE)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("one_of_each", {"groups": []}, "at least 1 item"),
        ("one_of_each", {"groups": [[0], []]}, "at least 1 item"),
        ("one_of_each", {"groups": [[0, 3], [3]]}, "node 3 is named 2 times"),
        ("one_of_each", {"groups": [[-1]]}, "greater than or equal to 0"),
        ("one_of_each", {"groups": [[0]], "grace_s": -1}, "greater than or equal to 0"),
        ("decodable", {"rows": [[1.0]], "grace_factor": -1}, "greater than or equal to 0"),
        ("decodable", {"rows": []}, "at least 1 item"),
        ("decodable", {"rows": [[1.0], [1.0, 2.0]]}, "as many entries"),
        ("decodable", {"rows": [[1.0, 0.0], [2.0, 0.0]]}, "cannot be recovered even from all rows"),
        ("decodable", {"rows": [[float("nan")]]}, "finite number"),
    ],
)
def test_what_cannot_work_is_refused(name: str, fields: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        table(ClosePolicy)[name].model_validate(fields)


@pytest.mark.parametrize("stranger", [-1, 2])
def test_a_node_without_a_row_decides_nothing(stranger: int):
    rows = ((1.0, 0.0), (0.0, 1.0))
    assert decoding(rows, frozenset({0, stranger})) is None
    assert decoding(rows, frozenset({0, 1, stranger})) == pytest.approx({0: 1.0, 1: 1.0})
