"""Codecs: booked sizes, error bounds, and bytes that come out the same again and wherever a tensor is cut."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from starling.algorithms.codecs import Codec, Identity, exchange_codecs, refuse_lossy
from starling.algorithms.codecs.base import AT_ONCE
from starling.algorithms.codecs.fp4 import FP4
from starling.algorithms.codecs.half import BFloat16, Float16
from starling.algorithms.codecs.int8 import _LIMIT, Int8
from starling.algorithms.codecs.qsgd import QSGD
from starling.algorithms.codecs.random_k import RandomK
from starling.algorithms.codecs.sign import Sign
from starling.algorithms.codecs.top_k import TopK
from starling.algorithms.errors import ProgramError
from starling.algorithms.registry import table
from tests.codecs import Blockwise

NEAREST = [BFloat16(), Float16(), Int8(), Int8(block_size=1), Int8(block_size=7), FP4(), FP4(block_size=6)]
"""Of which each value arrives, rounded."""
PROJECTIONS = [
    *(Sign(), Sign(block_size=8), TopK(), TopK(fraction=0.3, block_size=5), TopK(fraction=0.5, values=BFloat16())),
    *(RandomK(unbiased=False), RandomK(fraction=0.4, block_size=7, unbiased=False)),
]
"""Of which few things arrive, and these again unchanged."""
UNBIASED = [RandomK(), RandomK(fraction=0.5, block_size=9), QSGD(), QSGD(bits=2, block_size=16), QSGD(bits=8)]
LOSSY = [*NEAREST, *PROJECTIONS, *UNBIASED]
ALL = [Identity(), *LOSSY]
WIDE = [torch.float32, torch.float64]
SINGLE_MAX = torch.finfo(torch.float32).max

lossy = st.sampled_from(LOSSY)
stable = st.sampled_from([*NEAREST, *PROJECTIONS])
wide = st.sampled_from(WIDE)
tame = st.floats(-60000, 60000)  # within the range of all
huge = st.floats(-1e38, 1e38, allow_subnormal=True) | st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1.5e-36, -1e38])


def there_and_back(codec: Codec, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return codec.decode(codec.encode(values), values.numel(), dtype or values.dtype)


def draw(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(dtype)


def test_are_in_the_table():
    names = {"identity": Identity, "bf16": BFloat16, "fp16": Float16, "int8": Int8, "fp4": FP4}
    names |= {"sign": Sign, "top_k": TopK, "random_k": RandomK, "qsgd": QSGD}
    assert table(Codec).items() >= names.items()
    for codec in ALL:
        assert TypeAdapter(Codec).validate_python(codec.model_dump()) == codec
    with pytest.raises(ValidationError):
        Int8(block_size=0)


@given(codec=st.sampled_from([*ALL, Blockwise()]), dtype=wide, size=st.integers(0, 1100))
def test_booked_is_encoded(codec: Codec, dtype: torch.dtype, size: int):
    data = codec.encode(draw(size, dtype))
    assert (data.dtype, data.shape) == (torch.uint8, (codec.nbytes(size, dtype),))
    values = codec.decode(data, size, dtype)
    assert (values.dtype, values.shape) == (dtype, (size,))


def test_sizes():
    for dtype in WIDE:
        assert BFloat16().nbytes(1000, dtype) == Float16().nbytes(1000, dtype) == 2000
        assert [Int8().nbytes(size, dtype) for size in (0, 1, 256, 257, 1000)] == [0, 5, 260, 265, 1016]
        assert [FP4().nbytes(size, dtype) for size in (0, 1, 256, 257, 1000)] == [0, 3, 130, 133, 508]
        assert [Sign().nbytes(size, dtype) for size in (0, 1, 256, 257, 1000)] == [0, 3, 34, 37, 133]
        assert [QSGD().nbytes(size, dtype) for size in (0, 1, 512, 513, 1000)] == [0, 5, 260, 265, 508]
        assert [TopK().nbytes(size, dtype) for size in (0, 1, 100, 4096, 4097)] == [0, 6, 6, 246, 252]
        assert [RandomK().nbytes(size, dtype) for size in (0, 1, 100, 4096, 4097)] == [0, 4, 40, 1640, 1644]
        assert TopK(values=BFloat16()).nbytes(4096, dtype) == 4 * 41
    assert [codec.block for codec in ALL[:8]] == [1, 1, 1, 256, 1, 7, 256, 6]


@pytest.mark.parametrize("codec", [Identity(), *NEAREST[:5]], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_contributions(codec: Codec, dtype: torch.dtype):
    values = draw(600, dtype)
    decoded = there_and_back(codec, values)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, values, rtol=2**-8, atol=0.02)


@given(codec=stable, dtype=wide, values=st.lists(tame, max_size=40))
def test_encoding_again_gives_the_same_bytes(codec: Codec, dtype: torch.dtype, values: list[float]):
    data = codec.encode(torch.tensor(values, dtype=dtype))
    assert torch.equal(codec.encode(codec.decode(data, len(values), dtype)), data)


@given(codec=st.sampled_from([BFloat16(), Int8(block_size=3)]), dtype=wide, values=st.lists(huge, max_size=40))
def test_encoding_again_gives_the_same_bytes_at_the_ends_of_the_range(
    codec: Codec, dtype: torch.dtype, values: list[float]
):
    data = codec.encode(torch.tensor(values, dtype=dtype))
    decoded = codec.decode(data, len(values), dtype)
    assert decoded.isfinite().all()
    assert torch.equal(codec.encode(decoded), data)


@given(codec=lossy, dtype=wide, values=st.lists(tame, max_size=40))
def test_odd_symmetry(codec: Codec, dtype: torch.dtype, values: list[float]):
    there = torch.tensor(values, dtype=dtype)
    if isinstance(codec, Sign):
        there = there[there.abs() > 1e-30]  # to which a zero counts as a plus
    assert torch.equal(there_and_back(codec, -there), -there_and_back(codec, there))


@given(codec=lossy, values=st.lists(tame, max_size=40))
def test_double_precision_and_single_agree(codec: Codec, values: list[float]):
    single = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(codec.encode(single.double()), codec.encode(single))
    assert torch.equal(there_and_back(codec, single, torch.float64), there_and_back(codec, single).double())


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("size", [40, 5 * 256 + 3, 2 * AT_ONCE + 300])
def test_cut_between_blocks_gives_the_same_bytes(codec: Codec, dtype: torch.dtype, size: int):
    values = draw(size, dtype)
    data = codec.encode(values)
    for share in (0.1, 0.5, 0.9):
        cut = int(size * share) // codec.block * codec.block
        pieces = [codec.encode(values[:cut]), codec.encode(values[cut:])]
        assert torch.equal(torch.cat(pieces), data)
        place = codec.nbytes(cut, dtype)
        decoded = torch.cat([codec.decode(data[:place], cut, dtype), codec.decode(data[place:], size - cut, dtype)])
        assert torch.equal(decoded, codec.decode(data, size, dtype))


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
def test_zeros(codec: Codec):
    assert torch.equal(there_and_back(codec, torch.zeros(20)), torch.zeros(20))


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 13, 299])
def test_not_finite_is_refused(codec: Codec, dtype: torch.dtype, bad: float, place: int):
    values = draw(300, dtype)
    values[place] = bad
    with pytest.raises(ProgramError, match=f"codec {codec.name} carries finite values up to .*: training has diverged"):
        codec.encode(values)


def test_nan_with_all_bits_set_is_refused():
    values = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for codec in LOSSY:
        with pytest.raises(ProgramError):
            codec.encode(values)


def test_beyond_the_range_is_refused():
    message = r"codec fp16 carries finite values up to ±65504; these lie between -65505 and 1: use codec bf16"
    with pytest.raises(ProgramError, match=message) as caught:
        Float16().encode(torch.tensor([1.0, -65505.0]))
    assert "\n" not in str(caught.value)
    for codec, largest in ((Float16(), 65504.0), (BFloat16(), torch.finfo(torch.bfloat16).max), (Int8(), _LIMIT)):
        for limit in (largest, -largest):
            values = torch.tensor([limit], dtype=torch.float64)
            assert there_and_back(codec, values, torch.float32).item() == limit
            with pytest.raises(ProgramError):
                codec.encode(values * (1 + 2**-20))


# --- two bytes ------------------------------------------------------------------------------------------------------


@given(values=st.lists(huge, max_size=40))
def test_bf16_error(values: list[float]):
    there = torch.tensor(values, dtype=torch.float64)
    error = (there_and_back(BFloat16(), there) - there).abs()
    assert (error <= there.abs() * 2**-8 * (1 + 1e-6) + 1e-40).all()


@given(values=st.lists(tame | st.floats(-1e-3, 1e-3), max_size=40))
def test_fp16_error(values: list[float]):
    there = torch.tensor(values, dtype=torch.float64)
    error = (there_and_back(Float16(), there) - there).abs()
    assert (error <= torch.where(there.abs() < 2**-14, 2.0**-25, there.abs() * 2**-11) * (1 + 1e-6)).all()


def test_two_bytes_by_hand():
    assert BFloat16().encode(torch.tensor([1.0, -2.0])).tolist() == [0x80, 0x3F, 0x00, 0xC0]
    assert Float16().encode(torch.tensor([1.0, -2.0])).tolist() == [0x00, 0x3C, 0x00, 0xC0]
    # Ties go to the even neighbour: 1 + 2⁻⁸ lies between 1 and 1 + 2⁻⁷.
    assert there_and_back(BFloat16(), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1.0, 1 + 2**-6]


# --- int8 -----------------------------------------------------------------------------------------------------------


def reference(values: list[float], size: int) -> bytes:
    """The format, block by block, in Python's floats."""
    data = b""
    for start in range(0, len(values), size):
        block = values[start : start + size]
        (scale,) = struct.unpack("<f", struct.pack("<f", max(map(abs, block)) / 127))
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(math.ceil(mantissa * 2**17), exponent - 17)
        codes = [round(value / scale) if scale else 0 for value in block]
        data += struct.pack(f"<f{len(block)}b", scale, *codes)
    return data


@given(values=st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), max_size=30), size=st.integers(1, 9))
def test_int8_format(values: list[float], size: int):
    values = [value if abs(value) > 1e-30 else 0.0 for value in values]
    assert bytes(Int8(block_size=size).encode(torch.tensor(values)).tolist()) == reference(values, size)


@given(values=st.lists(huge, min_size=1, max_size=40), size=st.integers(1, 9), dtype=wide)
def test_int8_error(values: list[float], size: int, dtype: torch.dtype):
    there = torch.tensor(values, dtype=dtype)
    back = there_and_back(Int8(block_size=size), there)
    for one, other in zip(there.double().split(size), back.double().split(size), strict=True):
        bound = float(one.abs().max()) / 254 * (1 + 2**-15)
        assert float((one - other).abs().max()) <= max(bound, 1.5e-36)
        assert float(other.abs().max()) <= float(one.abs().max()) * (1 + 2**-15)


def test_int8_largest_is_kept():
    values = draw(256 * 40)
    back = there_and_back(Int8(), values).view(-1, 256)
    torch.testing.assert_close(back.abs().amax(1), values.view(-1, 256).abs().amax(1), rtol=2**-16, atol=0)


def test_int8_blocks_do_not_touch_one_another():
    values = torch.cat([torch.full((256,), 1e-20), torch.full((256,), 1e20), torch.zeros(256), torch.full((3,), 1.0)])
    torch.testing.assert_close(there_and_back(Int8(), values), values, rtol=2**-15, atol=0)


def test_int8_of_subnormal_scales_is_zero():
    tiny = 127 * torch.finfo(torch.float32).tiny
    assert there_and_back(Int8(), torch.tensor([0.9 * tiny, -1e-45])).tolist() == [0.0, 0.0]
    assert there_and_back(Int8(), torch.tensor([tiny])).item() == tiny


def test_int8_reads_bytes_at_odd_places():
    values = draw(600)
    data = Int8(block_size=7).encode(values)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
    assert torch.equal(Int8(block_size=7).decode(moved, 600, torch.float32), there_and_back(Int8(block_size=7), values))


@pytest.mark.parametrize("codec", ALL, ids=repr)
def test_arguments_are_not_written_to(codec: Codec):
    values = draw(600)
    kept = values.clone()
    data = codec.encode(values)
    bytes_kept = data.clone()
    codec.decode(data, 600, torch.float32)
    assert torch.equal(values, kept)
    assert torch.equal(data, bytes_kept)


# --- four bits ------------------------------------------------------------------------------------------------------


def nearest_of_fp4(value: float, scale: float) -> float:
    """In Python's floats, by looking at all there are; of two that are as near, the larger one."""
    magnitudes = [0.0, *(2.0**exponent * scale for exponent in range(-6, 1))]
    best = min(reversed(magnitudes), key=lambda one: abs(one - abs(value)))
    return math.copysign(best, value) if best else 0.0


@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), size=st.integers(1, 5))
def test_fp4_is_the_nearest(values: list[float], size: int):
    values = [value if abs(value) > 1e-30 else 0.0 for value in values]
    back = there_and_back(FP4(block_size=2 * size), torch.tensor(values)).tolist()
    for start in range(0, len(values), 2 * size):
        block = values[start : start + 2 * size]
        bits = struct.unpack("<I", struct.pack("<f", max(map(abs, block))))[0]
        (scale,) = struct.unpack("<f", struct.pack("<I", (bits + 0xFFFF) & 0xFFFF0000))
        # Powers of two times 8 bits, and borders of 9: all are exact.
        assert back[start : start + 2 * size] == [nearest_of_fp4(value, scale) for value in block]


def test_fp4_by_hand():
    """The scale is 1.0, 0x3F80; codes 7, 7 with a minus, 1, and none of the last byte's upper half."""
    data = FP4().encode(torch.tensor([1.0, -1.0, 2.0**-6]))
    assert data.tolist() == [0x80, 0x3F, 0xF7, 0x01]
    assert FP4().decode(data, 3, torch.float32).tolist() == [1.0, -1.0, 2.0**-6]


def test_fp4_borders():
    """From 1.5·2^k on it is 2^(k+1), from 2⁻⁷ on it is 2⁻⁶."""
    for exponent in range(-6, 0):
        border = 1.5 * 2.0**exponent
        values = torch.tensor([1.0, border, border * (1 - 2**-20)])
        assert there_and_back(FP4(), values).tolist() == [1.0, 2.0 ** (exponent + 1), 2.0**exponent]
    assert there_and_back(FP4(), torch.tensor([1.0, 2.0**-7, 0.999 * 2.0**-7])).tolist() == [1.0, 2.0**-6, 0.0]


@given(values=st.lists(huge, min_size=1, max_size=40), dtype=wide)
def test_fp4_error(values: list[float], dtype: torch.dtype):
    there = torch.tensor(values, dtype=dtype)
    back = there_and_back(FP4(), there).double()
    scale = float(there.double().abs().max()) * (1 + 2**-7)
    error, size = (there.double() - back).abs(), there.double().abs()
    assert (error <= torch.where(size >= 0.75 * 2**-6 * scale, size / 3 * (1 + 1e-6), 2**-7 * scale) + 8e-37).all()
    if scale > 1e-35:
        # The largest arrives as the scale itself, which is a bfloat16 and at most 2⁻⁷ larger.
        assert float(there.double().abs().max()) <= float(back.abs().max()) <= scale


def test_fp4_of_tiny_blocks_is_zero():
    assert there_and_back(FP4(), torch.tensor([7e-37, -1e-45])).tolist() == [0.0, 0.0]
    assert there_and_back(FP4(), torch.tensor([2.0**-120])).item() == 2.0**-120
    with pytest.raises(ValidationError):
        FP4(block_size=7)


# --- few of the values ----------------------------------------------------------------------------------------------


@given(values=st.lists(tame, min_size=1, max_size=60), seed=st.integers(0, 5))
def test_what_is_kept_is_a_contraction(values: list[float], seed: int):
    """‖x − C(x)‖² ≤ (1 − δ) ‖x‖²: the largest k of n leave at most 1 − k/n."""
    there = torch.tensor([value if abs(value) > 1e-15 else 0.0 for value in values], dtype=torch.float64)
    total = float(there.square().sum())
    for codec in (TopK(fraction=0.3), TopK(fraction=0.01)):
        kept = codec.kept(len(values)) / len(values)
        left = float((there - there_and_back(codec, there)).square().sum())
        assert left <= (1 - kept) * total + total * 1e-6 + 1e-9
    spread = [
        float((there - there_and_back(RandomK(unbiased=False).at(seed + draw), there)).square().sum())
        for draw in range(3)
    ]
    assert max(spread) <= total * (1 + 1e-9)
    left = float((there - there_and_back(Sign(), there)).square().sum())
    # (1 − ‖x‖₁² / (n ‖x‖²)), and what rounding the mean to 8 bits adds: its square, 2⁻⁹ of it, n times.
    mean = float(there.abs().mean())
    assert left <= total - len(values) * mean**2 + len(values) * (mean * 2**-8) ** 2 + total * 1e-6


def test_top_k_takes_the_largest_in_each_block():
    values = torch.tensor([1.0, -5.0, 2.0, 4.0, 0.0, 0.0, 3.0, 0.0])
    assert there_and_back(TopK(fraction=0.5, block_size=4), values).tolist() == [0, -5, 0, 4, 0, 0, 3, 0]
    assert TopK(fraction=0.5, block_size=4).encode(values)[:4].tolist() == [1, 0, 3, 0]


def test_places_that_top_k_sends_ascend():
    """``topk`` finds them in another order, which depends on what else is in the block."""
    codec = TopK(fraction=0.25, block_size=256)
    rows = codec.encode(draw(1024)).view(4, -1)
    places = rows[:, : 2 * 64].contiguous().view(torch.int16)
    assert (places.diff(dim=1) > 0).all()


def test_both_ways_of_an_exchange_are_unbiased_in_the_mean():
    """With the same places both ways a value would come back as (n/k)² of itself, once in n/k exchanges."""
    values, codec = torch.tensor([1.0, -2.0, 3.0, 0.5]), RandomK(fraction=0.5, block_size=4)
    total = torch.zeros(4)
    for number in range(2000):
        sent, result = exchange_codecs(codec, codec, number)
        total += result.through(sent.through(values))
    torch.testing.assert_close(total / 2000, values, rtol=0.15, atol=0)


def test_exchanges_of_one_number_are_told_apart_by_name():
    codec = RandomK(fraction=0.1)
    drawn = [exchange_codecs(codec, codec, 3, name) for name in ("", "0", "1")]
    assert len({str(one) for pair in drawn for one in pair}) == 6
    assert drawn[0][0] == codec.at(3)
    assert exchange_codecs(codec, codec, 3, "1") == drawn[2]


def test_random_k_draws_other_places_in_each_round_and_the_same_on_all_nodes():
    values = torch.arange(1.0, 4097.0)
    sent = [there_and_back(RandomK().at(number), values) for number in (0, 1, 1)]
    assert torch.equal(sent[1], sent[2])
    assert int((sent[0] != 0).sum()) == int((sent[1] != 0).sum()) == 410
    assert not torch.equal(sent[0] != 0, sent[1] != 0)
    places = sent[0] != 0
    torch.testing.assert_close(sent[0][places], values[places] * (4096 / 410))


@pytest.mark.parametrize("codec", UNBIASED, ids=repr)
def test_unbiased_in_the_mean(codec: Codec):
    """Over 400 draws the mean of each value is within five standard deviations of itself, and that of all is nearer."""
    values = draw(64)
    draws = torch.stack([there_and_back(codec.at(number), values) for number in range(400)]).double()
    if isinstance(codec, QSGD):
        rows = values.double().view(-1, min(64, codec.block_size))
        step = rows.norm(dim=1, keepdim=True) / codec.levels
        share = rows.abs() / step % 1
        variance = (step.square() * share * (1 - share)).view(-1)
        largest = float(step.max())
    else:
        assert isinstance(codec, RandomK)
        size = min(64, codec.block_size)
        variance = values.double().square() * (size / codec.kept(size) - 1)
        largest = float(values.abs().max()) * size / codec.kept(size)
    off = draws.mean(dim=0) - values
    assert (off.abs() <= 5 * variance.sqrt() / 20 + 5 * largest / 400).all()
    if isinstance(codec, QSGD):  # whose values are rounded independently of one another
        assert float(off.mean().abs()) <= 4 * float(variance.sum().sqrt()) / 20 / 64


@given(values=st.lists(tame, min_size=1, max_size=40), seed=st.integers(0, 50))
def test_qsgd_is_one_of_the_two_levels_around(values: list[float], seed: int):
    there = torch.tensor([value if abs(value) > 1e-30 else 0.0 for value in values])
    for codec in (QSGD(bits=2), QSGD(), QSGD(bits=8)):
        step = float(there.double().norm()) / codec.levels
        error = (there_and_back(codec.at(seed), there) - there).double().abs()
        assert (error <= step * (1 + 1e-5)).all()


def test_blocks_alike_but_in_size_are_rounded_independently_by_qsgd():
    """Doubling leaves the ratios to the norm as they are, bit for bit: only the draw makes another rounding."""
    values = draw(512)
    twice = there_and_back(QSGD(), torch.cat([values, 2 * values])).view(2, -1)
    assert torch.equal(twice[0] * 2, there_and_back(QSGD(), values) * 2)
    assert (twice[1] != twice[0] * 2).sum() > 50


def test_qsgd_variance_is_at_most_the_papers():
    """E‖Q(x) − x‖² ≤ min(n/s², √n/s) ‖x‖² (lemma 3.1)."""
    values = draw(512)
    for bits in (2, 4, 8):
        codec = QSGD(bits=bits)
        errors = [float((there_and_back(codec.at(number), values) - values).square().sum()) for number in range(40)]
        bound = min(512 / codec.levels**2, 512**0.5 / codec.levels) * float(values.square().sum())
        assert 0 < sum(errors) / 40 <= bound


def test_signs_by_hand():
    assert Sign().encode(torch.tensor([2.0, -1.0, 3.0])).tolist() == [0x00, 0x40, 0b010]
    assert there_and_back(Sign(block_size=8), torch.tensor([1.0] * 8 + [-4.0, 0.0])).tolist() == [1.0] * 8 + [-2.0, 2.0]


def test_values_of_blocks_are_refused_inside_of_sparse_codecs():
    with pytest.raises(ValidationError, match="top_k sends single values, as identity, bf16 or fp16; not int8"):
        TopK(values=Int8())
    for fraction in (0.0, 1.5):
        with pytest.raises(ValidationError):
            RandomK(fraction=fraction)


def test_through_is_what_arrives():
    values = draw(1000)
    for codec in ALL:
        assert torch.equal(codec.through(values), there_and_back(codec, values))


@pytest.mark.parametrize(
    ("codec", "result_codec", "feedback", "message"),
    [
        ("identity", "int8", None, ""),
        ("int8", "fp4", True, ""),
        ("qsgd", "qsgd", False, ""),
        ("top_k", "identity", True, ""),
        ("top_k", "identity", None, r"codec: what top_k leaves out would never be sent; take fp4"),
        ("sign", "identity", False, r"codec: what sign leaves out would never be sent; set error_feedback: true, or "),
        ("qsgd", "identity", True, r"error_feedback: the errors of qsgd cancel, and would grow if fed back; set it to"),
        ("identity", "top_k", None, r"result_codec: top_k needs error feedback, and nobody keeps what it leaves out"),
        ("top_k", "top_k", True, r"result_codec: top_k needs error feedback"),
        ("identity", "sign", False, r"result_codec: sign needs error feedback"),
    ],
)
def test_what_would_never_arrive_or_grow_is_refused(codec: str, result_codec: str, feedback: Any, message: str):
    one, other = (Codec.model_validate(name) for name in (codec, result_codec))
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        refuse_lossy(one, other, feedback=feedback)
