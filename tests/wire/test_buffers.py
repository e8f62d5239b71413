"""Buffers: what is cut, encoded, reduced and put together again is the same to the last bit, however it was cut."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starling.actors.wire.buffers import (
    BufferPool,
    Cuts,
    TensorSpec,
    as_buffer,
    as_tensor,
    copies,
    pack,
    payload_nbytes,
    signature_of,
    specs_of,
    unpack,
)
from starling.algorithms.aggregators import Mean
from starling.algorithms.api import PART_BYTES, AllGather, AllReduce
from starling.algorithms.closing import Quorum
from starling.algorithms.codecs import Identity
from starling.algorithms.costs import num_parts
from starling.algorithms.errors import ProgramError
from tests.codecs import Blockwise

CPU = torch.device("cpu")
IDENTITY = Identity()
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dicts = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5)


def contribution(members: dict[str, tuple[tuple[int, ...], torch.dtype]], seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, (shape, dtype) in members.items()}


def exchange(
    payloads: list[Any], weights: list[float], parts: int, codec: Any = IDENTITY, result_codec: Any = IDENTITY
) -> Any:
    """What all members have after an AllReduce in ``parts`` parts."""
    cuts = Cuts(specs_of(payloads[0]), codec, result_codec, parts)
    encoded = [cuts.encode(payload) for payload in payloads]
    assert [[one.nbytes for one in each] for each in encoded] == [list(cuts.part_nbytes)] * len(payloads)
    operation = AllReduce(payloads[0])
    reduced = [cuts.reduce(operation, part, [one[part] for one in encoded], weights) for part in range(parts)]
    assert [one.nbytes for one in reduced] == list(cuts.result_nbytes)
    return cuts.assemble(reduced, CPU)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((as_buffer(one) == as_buffer(other)).all())


# --- cuts -----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 50), max_size=5),
    parts=st.integers(1, 12),
    block=st.integers(1, 9),
    result_block=st.integers(1, 4),
)
def test_cuts_cover_each_value_once(sizes: list[int], parts: int, block: int, result_block: int):
    specs = tuple(TensorSpec(str(index), torch.float32, (size,)) for index, size in enumerate(sizes))
    cuts = Cuts(specs, Blockwise(size=block), Blockwise(size=result_block), parts)
    assert len(cuts.parts) == parts
    covered = [(one.tensor, value) for part in cuts.parts for one in part for value in range(one.start, one.stop)]
    assert covered == [(index, value) for index, size in enumerate(sizes) for value in range(size)]
    together = math.lcm(block, result_block)
    assert all(one.start % together == 0 for part in cuts.parts for one in part)
    # A block is never encoded in two pieces, so cutting costs no bytes.
    whole = Cuts(specs, cuts.codec, cuts.result_codec, 1)
    assert sum(cuts.part_nbytes) == sum(whole.part_nbytes)
    assert sum(cuts.result_nbytes) == sum(whole.result_nbytes)


@given(size=st.integers(0, 1000), parts=st.integers(1, 12))
def test_parts_are_of_equal_size(size: int, parts: int):
    (first, *others) = Cuts((TensorSpec("", torch.float32, (size,)),), Identity(), Identity(), parts).part_nbytes
    assert all(abs(other - first) <= 4 for other in others)


def test_number_of_parts():
    assert [num_parts(nbytes, 4) for nbytes in (0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES)] == [1, 1, 1, 2, 3]
    assert num_parts(1000 * PART_BYTES, 4) == 4
    assert num_parts(1000 * PART_BYTES, 1) == 1


# --- encode, reduce, assemble ---------------------------------------------------------------------------------------


@given(
    members=dicts,
    count=st.integers(1, 4),
    parts=st.integers(1, 7),
    block=st.sampled_from([None, 1, 3, 4]),
    result_block=st.sampled_from([None, 2, 4]),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    uniform=st.booleans(),
)
def test_result_does_not_depend_on_the_number_of_parts(
    members: Any,
    count: int,
    parts: int,
    block: int | None,
    result_block: int | None,
    weights: list[float],
    uniform: bool,
):
    payloads = [contribution(members, seed) for seed in range(count)]
    scale = [1.0] * count if uniform else weights[:count]
    codecs = [Identity() if size is None else Blockwise(size=size) for size in (block, result_block)]
    whole = exchange(payloads, scale, 1, *codecs)
    cut = exchange(payloads, scale, parts, *codecs)
    assert list(cut) == sorted(members)
    for name, (shape, dtype) in members.items():
        assert (cut[name].shape, cut[name].dtype) == (torch.Size(shape), dtype)
        assert same_bits(cut[name], whole[name])
    if block is None and result_block is None:
        for name, (_, dtype) in members.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            total = sum(payload[name].to(wide) * weight for payload, weight in zip(payloads, scale, strict=True))
            assert torch.is_tensor(total)
            assert same_bits(cut[name], (total / sum(scale)).to(dtype))


def test_bare_tensor_in_bare_tensor_out():
    value = exchange([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])], [1.0, 1.0], 2)
    assert value.tolist() == [[2.0, 3.5]]
    assert exchange([torch.tensor(3.0)], [1.0], 1).item() == 3.0
    assert exchange([{"x": torch.tensor([3.0])}], [1.0], 1)["x"].tolist() == [3.0]
    assert exchange([{}], [1.0], 1) == {}


def test_weights():
    ones = [torch.tensor([1.0, 10.0]), torch.tensor([4.0, 40.0])]
    assert exchange(ones, [2.0, 1.0], 1).tolist() == [2.0, 20.0]


def test_double_contributions_are_reduced_in_double():
    tiny = torch.tensor([1.0, 2.0**-40], dtype=torch.float64)
    value = exchange([tiny, torch.tensor([2.0**-45, 1.0], dtype=torch.float64)], [1.0, 1.0], 1)
    assert value.tolist() == [(1 + 2.0**-45) / 2, (1 + 2.0**-40) / 2]


def test_half_precision_is_reduced_in_single():
    values = [torch.tensor([2048.0], dtype=torch.float16), *[torch.tensor([1.0], dtype=torch.float16)] * 4]
    assert exchange(values, [1.0] * 5, 1).item() == pytest.approx(2052 / 5, rel=2**-11)


def test_nothing_is_copied_of_one_tensor_and_the_result_is_fresh():
    tensor = torch.arange(8.0)
    cuts = Cuts(specs_of(tensor), Identity(), Identity(), 2)
    encoded = cuts.encode(tensor)
    assert [one.ctypes.data for one in encoded] == [tensor.data_ptr(), tensor.data_ptr() + 16]
    value = cuts.assemble(encoded, CPU)
    assert isinstance(value, Tensor)
    assert value.data_ptr() != tensor.data_ptr()


def test_strided_and_differentiable_contributions():
    matrix = torch.arange(6.0, requires_grad=True).view(2, 3)
    assert exchange([matrix.T], [1.0], 2).tolist() == matrix.T.tolist()


def test_narrow_tensor_before_a_wide_one():
    """Three half-precision values leave what follows at an odd place; it must be read all the same."""
    payload = {"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16), "b": torch.arange(1000, dtype=torch.float64)}
    value = exchange([payload, payload], [1.0, 3.0], 1)
    assert same_bits(value["b"], payload["b"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_value_that_is_not_finite_is_found_in_any_tensor(name: str, parts: int, bad: float):
    payload = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(3)}
    cuts = Cuts(specs_of(payload), Identity(), Identity(), parts)
    assert cuts.are_finite(cuts.encode(payload))
    payload[name][-1] = bad
    assert not cuts.are_finite(cuts.encode(payload))


# --- copies, and memory that is used again ---------------------------------------------------------------------------


@pytest.mark.parametrize("others", [{}, {"n": 1.0}, {"y": torch.zeros(2)}], ids=["rows", "number", "another form"])
def test_copies_share_no_memory_with_what_was_copied(others: dict[str, Any]):
    """Whatever the forms: nodes of one process train on in place while another's contribution is still to be read."""
    payloads = {0: {"x": torch.ones(2)}, 1: {"x": torch.full((2,), 2.0)} | others}
    copied: Any = copies(payloads)[0]
    bare: Any = copies({0: payloads[0]["x"], 1: torch.zeros(3)})[0]
    for payload in payloads.values():
        payload["x"].fill_(9.0)
    assert [copied[node]["x"].tolist() for node in (0, 1)] == [[1.0, 1.0], [2.0, 2.0]]
    assert bare[0].tolist() == [1.0, 1.0]


def test_memory_is_used_again_once_nothing_refers_to_it():
    pool = BufferPool(min_bytes=8, max_blocks=1)
    first = pool.empty(4, torch.float32)
    place, part = first.data_ptr(), first[2:]
    del first
    meanwhile = pool.empty(4, torch.float32)
    assert meanwhile.data_ptr() != place, "a part of it is still referred to"
    del part
    gc.collect()
    assert pool.empty(2, torch.float64).data_ptr() == place


# --- pack and unpack ------------------------------------------------------------------------------------------------

payloads = st.one_of(
    st.dictionaries(
        st.text("xyz", min_size=1, max_size=2),
        st.one_of(
            st.floats(allow_nan=False),
            st.integers(-(2**63), 2**63 - 1),
            st.tuples(shapes, st.sampled_from([*DTYPES, torch.int64, torch.uint8, torch.bool])),
        ),
    ),
    st.floats(allow_nan=False),
    st.integers(-(2**63), 2**63 - 1),
)


@given(plan=payloads)
def test_unpack_is_the_inverse_of_pack(plan: Any):
    def make(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        shape, dtype = value
        return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)

    payload = {name: make(value) for name, value in plan.items()} if isinstance(plan, dict) else plan
    specs = specs_of(payload)
    buffer = pack(payload)
    assert buffer.nbytes == payload_nbytes(specs)
    back: Any = unpack(specs, buffer, CPU)
    if not isinstance(payload, dict):
        assert (back, type(back)) == (payload, type(payload))
        return
    assert isinstance(back, dict)
    assert list(back) == sorted(payload)
    for name, value in payload.items():
        if isinstance(value, Tensor):
            assert same_bits(back[name], value)
        else:
            assert (back[name], type(back[name])) == (value, type(value))


def test_unpacked_tensors_are_fresh():
    tensor = torch.arange(3.0)
    back = unpack(specs_of(tensor), pack(tensor), CPU)
    assert isinstance(back, Tensor)
    back += 1
    assert tensor.tolist() == [0.0, 1.0, 2.0]


def test_a_number_counts_eight_bytes():
    assert payload_nbytes(specs_of({"loss": 1.5, "step": 3})) == 16
    assert payload_nbytes(specs_of(torch.zeros(3, dtype=torch.bfloat16))) == 6


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        ("text", "a payload is a str"),
        ({"a": [1, 2]}, "'a' in a payload is a list"),
        ({"a": {"b": torch.zeros(1)}}, "'a' in a payload is a dict"),
        ({"a": None}, "'a' in a payload is a NoneType"),
        ({1: torch.zeros(1)}, "must be texts"),
        ({"": torch.zeros(1)}, "must be texts"),
    ],
)
def test_what_cannot_travel(payload: Any, what: str):
    with pytest.raises(ProgramError, match=what):
        specs_of(payload)


# --- raw memory -----------------------------------------------------------------------------------------------------


def test_read_only_buffers_are_viewed_without_a_warning_or_a_copy():
    array = np.arange(64, dtype=np.uint8)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = as_tensor(array[8:])
    assert tensor.data_ptr() == array.ctypes.data + 8
    assert tensor.tolist() == list(range(8, 64))
    del array
    gc.collect()
    assert tensor.tolist() == list(range(8, 64))  # the tensor keeps the memory alive


def test_empty_buffers():
    assert as_tensor(np.zeros(0, np.uint8)).numel() == 0
    assert as_buffer(torch.empty(0)).nbytes == 0
    assert as_buffer(torch.zeros(2, 0, 3)).nbytes == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.uint8])
def test_buffers_are_the_bytes(dtype: torch.dtype):
    tensor = torch.tensor([0, 1, 3]).to(dtype)
    assert as_buffer(tensor).tolist() == tensor.view(torch.uint8).tolist()
    assert same_bits(as_tensor(as_buffer(tensor)).view(dtype), tensor)


# --- signatures -----------------------------------------------------------------------------------------------------


def test_signatures_agree():
    one, same, other = (signature_of(AllReduce(torch.zeros(size))) for size in (3, 3, 4))
    assert one == same
    assert one.agrees_with(same)
    assert not one.agrees_with(other)
    nothing = signature_of(AllReduce(None))
    assert nothing.agrees_with(one)
    assert one.agrees_with(nothing)
    assert not one.agrees_with(signature_of(AllReduce(torch.zeros(3), codec=Blockwise())))
    assert signature_of(AllGather(torch.zeros(3))).agrees_with(signature_of(AllGather({"a": 1.0})))
    assert not one.agrees_with(signature_of(AllGather(torch.zeros(3))))
    assert one.agrees_with(signature_of(AllReduce(torch.zeros(3), weight=7.0, aggregator=Mean(), close=Quorum())))


def test_signatures_read_well():
    text = str(signature_of(AllReduce({"b": torch.zeros(2, 3), "a": torch.zeros(1, dtype=torch.float64)})))
    assert text.startswith("AllReduce(a float64[1], b float32[2, 3]) with Mean()")


def test_all_reduce_takes_tensors_alone():
    with pytest.raises(ProgramError, match="make numbers tensors"):
        signature_of(AllReduce({"a": torch.zeros(1), "b": 1.0}))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_without_a_mean(weight: float):
    with pytest.raises(ValueError, match="weight above 0"):
        AllReduce(torch.zeros(1), weight=weight)
