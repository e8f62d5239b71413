"""Noise by counters: an independent implementation, the laws, and that no bit depends on how it is cut."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.algorithms import noise
from starling.algorithms.noise import CHUNK, Distribution, accumulate, fill, perturb

DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")
KEY = 0x0123_4567_89AB_CDEF


def word(key: int, place: int) -> int:
    """splitmix64, as its authors write it, in integers of any length."""
    mask = 2**64 - 1
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def values(distribution: Distribution, key: int, start: int, count: int) -> list[float]:
    if distribution == "rademacher":
        return [2.0 * (word(key, i // 64) >> i % 64 & 1) - 1 for i in range(start, start + count)]
    table = noise._quantiles(torch.device("cpu")).tolist()
    # A word's 16 bits are signed, and the table is sorted.
    return [table[(word(key, i // 4) >> 16 * (i % 4) & 0xFFFF) ^ 0x8000] for i in range(start, start + count)]


def test_words_are_those_of_splitmix64():
    """The first outputs for seed 1234567, as published with the reference implementation's ports."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word(1234567, place) for place in range(4)] == published
    ours = noise._words(1234567, 0, 4, torch.device("cpu")).tolist()
    assert [value % 2**64 for value in ours] == published


@pytest.mark.parametrize("key", [0, 1, KEY, 2**63 - 1])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_are_those_of_an_implementation_in_plain_integers(distribution: Distribution, key: int):
    for start in (0, 1, 63, 1000, 2**40 + 5):
        assert fill(torch.empty(130), distribution, key, start).tolist() == values(distribution, key, start, 130)


@given(
    start=st.integers(0, 500),
    size=st.integers(1, 400),
    cut=st.integers(0, 400),
    distribution=st.sampled_from(DISTRIBUTIONS),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_part_of_a_stream_is_made_without_the_rest(start: int, size: int, cut: int, distribution: Distribution):
    whole = fill(torch.empty(1000), distribution, KEY)
    parts = torch.empty(size)
    cut = min(cut, size)
    fill(parts[cut:], distribution, KEY, start + cut)
    fill(parts[:cut], distribution, KEY, start)
    assert torch.equal(parts, whole[start : start + size])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chunks_and_threads_change_nothing(distribution: Distribution, monkeypatch: pytest.MonkeyPatch):
    size = CHUNK + 777
    center = torch.linspace(-1, 1, size)
    terms = [(1, 0.3), (2, -1.7), (3, 1e-4)]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        near, moved = torch.empty(size), center.clone()
        perturb(near, center, 1e-3, distribution, KEY)
        accumulate(moved, terms, distribution)
        return near, moved

    near, moved = both()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(*pair) for pair in zip(both(), (near, moved), strict=True))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(noise, "CHUNK", 12_345)
    assert all(torch.equal(*pair) for pair in zip(both(), (near, moved), strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shards_have_the_bits_of_the_whole(distribution: Distribution):
    whole = torch.linspace(-1, 1, 1000)
    shards = whole.clone()
    accumulate(whole, [(KEY, 0.1), (5, -0.3)], distribution)
    for start, stop in ((0, 17), (17, 640), (640, 1000)):
        accumulate(shards[start:stop], [(KEY, 0.1), (5, -0.3)], distribution, start)
    assert torch.equal(whole, shards)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sums_and_products_are_rounded_one_by_one(distribution: Distribution):
    center = torch.linspace(-1, 1, 300)
    moved, near = center.clone(), torch.empty(300)
    accumulate(moved, [(1, 0.3), (2, -1.7)], distribution)
    perturb(near, center, 0.3, distribution, 1)
    z = [fill(torch.empty(300), distribution, key) for key in (1, 2)]
    total = torch.zeros(300) + z[0] * 0.3
    total = total + z[1] * -1.7
    assert torch.equal(moved, center + total)
    assert torch.equal(near, center + z[0] * 0.3)


def test_nothing_to_add_changes_nothing():
    values = torch.tensor([1.0, -0.0])
    accumulate(values, [], "gaussian")
    assert torch.signbit(values).tolist() == [False, True]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_float64_has_the_same_values(distribution: Distribution):
    single = fill(torch.empty(500), distribution, KEY, 3)
    assert torch.equal(fill(torch.empty(500, dtype=torch.float64), distribution, KEY, 3), single.double())


def test_a_gaussian_is_normal():
    z = fill(torch.empty(2_000_000, dtype=torch.float64), "gaussian", KEY)
    assert abs(float(z.mean())) < 3 / math.sqrt(len(z))
    assert abs(float(z.square().mean()) - 1) < 3 * math.sqrt(2 / len(z))
    assert abs(float(z.pow(4).mean()) - 3) < 0.02
    normal = statistics.NormalDist()
    for point in (-3.0, -1.0, 0.0, 0.5, 2.0):
        expected = normal.cdf(point)
        deviation = math.sqrt(expected * (1 - expected) / len(z))
        assert abs(float((z <= point).double().mean()) - expected) < 4 * deviation + 1e-5
    assert abs(float((z[1:] * z[:-1]).mean())) < 3 / math.sqrt(len(z))


def test_quantiles_are_symmetric_with_variance_1():
    table = noise._quantiles(torch.device("cpu")).double()
    assert torch.equal(table, -table.flip(0))
    assert abs(float(table.square().mean()) - 1) < 1e-8
    assert float(table.max()) < 4.33
    assert torch.equal((table * 2**20).round(), table * 2**20)


def test_signs_are_even_and_independent():
    signs = fill(torch.empty(1_000_000), "rademacher", KEY)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 3e-3
    for lag in (1, 8, 64):
        assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 3e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_keys_that_are_neighbours_have_nothing_in_common(distribution: Distribution):
    one, other = (fill(torch.empty(200_000), distribution, KEY + step) for step in (0, 1))
    assert abs(float((one * other).mean())) < 3 / math.sqrt(len(one))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_gpu_has_the_bits_of_the_cpu(distribution: Distribution):
    size = 2 * CHUNK + 321
    center = torch.linspace(-1, 1, size)
    near, moved = torch.empty(size), center.clone()
    perturb(near, center, 1e-3, distribution, KEY)
    accumulate(moved, [(1, 0.3), (2, -1.7)], distribution)
    there, gone = torch.empty(size, device="cuda"), center.cuda()
    perturb(there, center.cuda(), 1e-3, distribution, KEY)
    accumulate(gone, [(1, 0.3), (2, -1.7)], distribution)
    assert torch.equal(there.cpu(), near)
    assert torch.equal(gone.cpu(), moved)
