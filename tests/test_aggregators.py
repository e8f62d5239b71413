"""The mean: weights, widths, order, and the same bits wherever an exchange is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithms.aggregators import Aggregator, Mean
from algorithms.aggregators.base import _BLOCK
from algorithms.registry import table


def mean(contributions: list[Tensor], weights: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((contributions[0].numel(),), torch.nan, dtype=dtype)
    Mean().reduce(contributions, weights, out)
    return out


def draw(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(count * size)
    return [torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6), size=st.integers(0, 70))
def test_weighted_mean(weights: list[float], size: int):
    contributions = draw(len(weights), size, torch.float64)
    expected = sum(one * weight for one, weight in zip(contributions, weights, strict=True)) / sum(weights)
    assert torch.is_tensor(expected)
    torch.testing.assert_close(mean(contributions, weights, torch.float64), expected, rtol=1e-13, atol=1e-13)
    single = mean([one.float() for one in contributions], weights)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_definition_in_single_precision():
    """acc = w₀·x₀; acc += wᵢ·xᵢ; acc /= Σw, each operation rounded."""
    contributions, weights = draw(4, 1000), [3.0, 1.0, 0.1, 700.0]
    total = contributions[0] * weights[0]
    for one, weight in zip(contributions[1:], weights[1:], strict=True):
        total = total + one * weight
    assert torch.equal(mean(contributions, weights), total / sum(weights))
    plain = ((contributions[0] + contributions[1]) + contributions[2]) / 3
    assert torch.equal(mean(contributions[:3], [1.0, 1.0, 1.0]), plain)


def test_order_is_that_of_the_arguments():
    big, one, minus = torch.tensor([2.0**30]), torch.tensor([1.0]), torch.tensor([-(2.0**30)])
    assert mean([big, minus, one], [1.0] * 3).item() == pytest.approx(1 / 3)
    assert mean([big, one, minus], [1.0] * 3).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype, weights: list[float]):
    contributions = draw(5, 300, dtype)
    assert torch.equal(mean(contributions, weights), mean([one.float() for one in contributions], weights))


def test_one_contribution_of_weight_one_is_itself():
    (only,) = draw(1, 100)
    assert torch.equal(mean([only], [1.0]), only)


def test_equal_contributions_of_a_power_of_two_are_themselves():
    (only,) = draw(1, 100)
    assert torch.equal(mean([only] * 4, [1.0] * 4), only)


@pytest.mark.parametrize("size", [1, 7, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 17])
@pytest.mark.parametrize("weights", [[1.0] * 3, [0.3, 5.0, 11.0]])
def test_same_bits_for_any_cut(size: int, weights: list[float]):
    contributions = draw(3, size)
    whole = mean(contributions, weights)
    rng = torch.Generator().manual_seed(size)
    for _ in range(3):
        places = sorted({0, size, *torch.randint(0, size + 1, (4,), generator=rng).tolist()})
        parts = [mean([one[low:high] for one in contributions], weights) for low, high in itertools.pairwise(places)]
        assert torch.equal(torch.cat(parts), whole)


def test_contributions_are_not_written_to():
    contributions = draw(3, 100)
    kept = [one.clone() for one in contributions]
    mean(contributions, [1.0, 1.0, 1.0])
    mean(contributions, [1.0, 2.0, 3.0])
    assert all(torch.equal(one, before) for one, before in zip(contributions, kept, strict=True))


def test_not_finite_stays_not_finite():
    value = mean([torch.tensor([torch.nan, torch.inf]), torch.tensor([1.0, 1.0])], [1.0, 2.0])
    assert value.isnan().tolist() == [True, False]
    assert value.isinf().tolist() == [False, True]


def test_is_in_the_table():
    assert table(Aggregator)["mean"] is Mean
