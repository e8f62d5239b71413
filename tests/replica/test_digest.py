"""Digests: equal exactly where the bits are."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling.actors.replica.digest import digest_state, digest_tensors, leaves

VALUES = torch.tensor([1.0, -2.0, 0.5])


def test_the_bytes_that_are_hashed():
    tensors = {"b": torch.tensor([[1, 2]], dtype=torch.int32), "a": torch.tensor([1.0])}
    text = b"a:float32:[1];" + bytes([0, 0, 128, 63]) + b"b:int32:[1, 2];" + bytes([1, 0, 0, 0, 2, 0, 0, 0])
    assert digest_tensors(tensors) == hashlib.sha256(text).hexdigest()


def test_it_stays_what_it_is():
    """Digests are compared between machines and kept in checkpoints."""
    state = {"x": VALUES, "n": 3, "l": [None, True, 0.1, "t"], "d": {"e": {}, "f": []}}
    assert digest_state(state) == "b4ee64deeadf09502a3de1a6482fb003912d3e879168fe434763df95678f749f"


@pytest.mark.parametrize(
    "changed",
    [
        {"x": VALUES.double()},
        {"x": VALUES.view(3, 1)},
        {"x": VALUES.flip(0)},
        {"y": VALUES},
        {"x": VALUES, "y": torch.empty(0)},
        {"x": torch.nextafter(VALUES, torch.tensor(9.0))},
    ],
)
def test_what_changes_it(changed: dict[str, torch.Tensor]):
    assert digest_tensors(changed) != digest_tensors({"x": VALUES})


@pytest.mark.parametrize(
    "same",
    [
        {"x": VALUES.clone()},
        {"x": torch.stack([VALUES, VALUES], dim=1)[:, 0]},
        {"x": VALUES.clone().requires_grad_(True)},
        {"x": torch.nn.Parameter(VALUES)},
    ],
)
def test_what_does_not(same: dict[str, torch.Tensor]):
    assert digest_tensors(same) == digest_tensors({"x": VALUES})


def test_order_does_not_matter():
    one = {"a": VALUES, "b": {"c": 1, "d": 2}}
    other = {"b": {"d": 2, "c": 1}, "a": VALUES}
    assert digest_state(one) == digest_state(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64])
def test_any_dtype(dtype: torch.dtype):
    assert len(digest_tensors({"x": torch.tensor([0, 1]).to(dtype), "scalar": torch.tensor(1).to(dtype)})) == 64


trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text('a/"0', max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def canonical(tree: Any) -> str:
    """A text that is equal for equal trees alone."""
    if isinstance(tree, dict):
        return "{" + ",".join(f"{key!r}:{canonical(value)}" for key, value in sorted(tree.items())) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(canonical, tree)) + "]"
    return repr(tree)


@given(one=trees, other=trees)
def test_trees_differ_where_their_digests_do(one: Any, other: Any):
    same = digest_state({"x": one}) == digest_state({"x": other})
    assert same == (canonical(one) == canonical(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a/b": 1}, {"a": {"b": 1}}),
        ({"000000000": 1}, [1]),
        ({"a": {}}, {"a": []}),
        ({"a": "1"}, {"a": 1}),
    ],
)
def test_trees_that_look_alike(one: Any, other: Any):
    assert digest_state({"x": one}) != digest_state({"x": other})


def test_leaves():
    assert [leaf for _, leaf in leaves({"b": [1, {}], "a": "t"})] == [1, {}, "t"]
    many: Any = {str(index): [index] * 12 for index in range(12)}
    assert len({path for path, _ in leaves(many)}) == 144
