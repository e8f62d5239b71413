"""Codes of single numbers: bounds of the error, order, oddness, unbiased rounding, and what is no number (Z8)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.algorithms.errors import ProgramError
from starling.algorithms.zeroth_order import records
from starling.algorithms.zeroth_order.codes import Half, Log8, ScalarCode, Single

CODES: tuple[ScalarCode, ...] = (Log8(), Log8(rounding="stochastic"), Half(), Single())
FINITE = st.floats(-5000, 5000)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def there_and_back(code: ScalarCode, *values: float, seed: int = 0) -> list[float]:
    codes = code.encode(values, rng(seed))
    assert codes.dtype == torch.uint8
    assert codes.shape == (len(values) * code.nbytes,)
    return code.decode(codes)


@given(FINITE)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_log8_is_odd_and_off_by_no_more_than_its_step(value: float):
    (there,) = there_and_back(Log8(), value)
    (other,) = there_and_back(Log8(), -value)
    assert other == -there
    size = abs(value)
    if 2**-10 <= size <= 2**11:
        step = 2 ** (1 / 6)
        assert abs(there - value) <= (step - 1) / (step + 1) * size * (1 + 1e-6)
        assert (step - 1) / (step + 1) < 0.058
    elif size > 2**11:
        assert abs(there) == 2**11
    else:
        assert abs(there) == (2**-10 if size >= 2**-11 else 0.0)


def test_half_way_to_the_least_level_is_up():
    half = 2.0**-11
    assert there_and_back(Log8(), half, -half, half * (1 - 2**-20)) == [2.0**-10, -(2.0**-10), 0.0]


@given(st.lists(FINITE, min_size=2, max_size=2).map(sorted))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_codes_keep_the_order(values: list[float]):
    for code in (Log8(), Half(), Single()):
        below, above = there_and_back(code, *values)
        assert below <= above


def test_each_byte_is_one_number_and_comes_back():
    every = torch.arange(256).to(torch.uint8)
    numbers = Log8().decode(every)
    assert len(set(numbers[:128])) == 128
    assert numbers[0] == 0
    assert math.isnan(numbers[128])
    assert numbers[127] == 2.0**11
    assert numbers[1] == 2.0**-10
    # Also through stochastic rounding: a level is a level.
    for code in CODES[:2]:
        assert torch.equal(code.encode(numbers, rng()), every)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_what_is_not_finite_is_dropped(code: ScalarCode):
    assert all(math.isnan(value) for value in there_and_back(code, math.nan, math.inf, -math.inf))
    zero = there_and_back(code, 0.0)
    assert zero == [0.0]
    assert there_and_back(code, -0.0) == [0.0]


@pytest.mark.parametrize("size", [1.1, 3e-4, 0.73, 1777.0])
def test_stochastic_rounding_has_the_mean_of_the_value(size: float):
    """Of 20 000 roundings the mean is the value within four standard errors, also below the smallest level."""
    for value in (size, -size):
        rounded = torch.tensor(there_and_back(Log8(rounding="stochastic"), *[value] * 20_000), dtype=torch.float64)
        assert len(rounded.unique()) == 2
        assert abs(float(rounded.mean()) - value) < 4 * float(rounded.std()) / math.sqrt(20_000)


def test_stochastic_rounding_is_repeatable():
    code = Log8(rounding="stochastic")
    values = torch.linspace(-3, 3, 50).tolist()
    assert there_and_back(code, *values, seed=3) == there_and_back(code, *values, seed=3)
    assert there_and_back(code, *values, seed=3) != there_and_back(code, *values, seed=4)


@pytest.mark.parametrize(("code", "largest", "relative"), [(Half(), 65504.0, 2**-11), (Single(), 3.4028234e38, 2**-24)])
def test_floats_saturate_and_are_close(code: ScalarCode, largest: float, relative: float):
    assert there_and_back(code, 1e300, -1e300) == pytest.approx([largest, -largest], rel=1e-7)
    for value in (1.1, -777.7, 0.001):
        (there,) = there_and_back(code, value)
        assert abs(there - value) <= relative * abs(value)


@pytest.mark.parametrize("code", [Half(), Single()], ids=repr)
def test_an_infinite_code_is_refused(code: Any):
    codes = torch.tensor([math.inf], dtype=code.dtype).view(torch.uint8)
    with pytest.raises(ProgramError, match=rf"^code {code.name}: \[inf\] has an infinite number, which is no code$"):
        code.decode(codes)


def test_codes_of_another_size_or_kind_are_refused():
    codes = torch.zeros(3, dtype=torch.uint8)
    assert records.checked(1, codes, 3) is codes
    with pytest.raises(ProgramError, match=r"^node 1 has 3 bytes of codes; it must have 4 bytes$"):
        records.checked(1, codes, 4)
    with pytest.raises(ProgramError, match=r"^node 2 has 3 values of torch\.float32 of codes; it must have 3 bytes$"):
        records.checked(2, torch.zeros(3), 3)
