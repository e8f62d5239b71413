"""Samplers and their seeds: what an epoch draws, and a position that is the whole state."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling.actors.data import (
    Blocks,
    Draws,
    Epoch,
    EpochSampler,
    Place,
    PlannedDraws,
    Position,
    Ranges,
    Sampler,
    Segment,
)
from starling.actors.data.samplers import BlockDraws, Poisson, PoissonDraws, WithReplacement
from starling.algorithms.errors import DataError, ProgramError
from starling.algorithms.registry import find, table
from starling.algorithms.seeds import derive_seed, generator


def sampler(num_samples: int, seed: int = 0, node: int = 0) -> EpochSampler:
    return EpochSampler(100 + torch.arange(num_samples), seed, node)


def in_blocks(num_samples: int, seed: int = 0, node: int = 0) -> Draws:
    """Blocks of at most seven, two of which are kept."""
    starts = range(100, 100 + num_samples, 7)
    runs = Ranges((start, min(start + 7, 100 + num_samples)) for start in starts)
    return Epoch().begin(runs, seed, node, Blocks(runs, 2))


def with_replacement(num_samples: int, seed: int = 0, node: int = 0) -> Draws:
    return WithReplacement().begin(100 + torch.arange(num_samples), seed, node)


def poisson(num_samples: int, seed: int = 0, node: int = 0) -> Draws:
    return Poisson().begin(100 + torch.arange(num_samples), seed, node)


Make = Callable[..., Draws]
ALL = [sampler, in_blocks, with_replacement, poisson]
sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 25)


# --- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
@given(sizes, st.lists(batch_sizes, max_size=12), st.lists(batch_sizes, min_size=1, max_size=12))
def test_a_restored_position_repeats_the_draws(make: Make, num_samples: int, before: list[int], after: list[int]):
    draws = make(num_samples)
    for batch_size in before:
        draws.next(batch_size)
    # As it would lie in a checkpoint: two numbers.
    position = Position(*json.loads(json.dumps(draws.position)))
    first = [draws.next(batch_size) for batch_size in after]
    fresh = make(num_samples)
    for other in (draws, fresh):
        other.position = position
        again = [other.next(batch_size) for batch_size in after]
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert draws.position == fresh.position


@pytest.mark.parametrize("make", [sampler, in_blocks])
@given(sizes, sizes, batch_sizes, st.data())
def test_ranges_of_others_parts_are_what_their_nodes_would_draw(
    make: Callable[..., EpochSampler], size: int, other: int, batch_size: int, data: st.DataObject
):
    """Of Parquet row groups too: an epoch cut in ranges that several nodes draw is that epoch."""
    whole = torch.cat([make(other, node=1).next(other)])
    cuts = sorted(data.draw(st.sets(st.integers(0, other), max_size=4)) | {0, other})
    ranges = [Segment(1, 0, start, stop) for start, stop in itertools.pairwise(cuts)]
    mine = data.draw(st.lists(st.sampled_from(ranges), unique=True)) if ranges else []
    own = make(size)
    draws = PlannedDraws(own, own.indices, 0, 0, lambda part: make(other, node=part))
    draws.plan(Place(tuple(mine), Position()))
    expected = torch.cat([whole[:0], *(whole[one.start : one.stop] for one in mine)])
    num_batches = -(-len(expected) // batch_size)
    drawn = torch.cat([whole[:0], *(draws.next(batch_size) for _ in range(num_batches))])
    assert torch.equal(drawn, expected)
    assert draws.position == Position(0, 0, len(expected))
    # Its own part goes on after them, and a position in the middle of them is one.
    assert torch.equal(draws.next(batch_size), make(size).next(batch_size))
    if len(expected) > 1:
        draws.position = Position(0, 0, 1)
        assert draws.next(len(expected)).tolist() == expected[1:].tolist()
    with pytest.raises(ValueError, match="is not a position in"):
        draws.position = Position(0, 0, len(expected) + 1)


@pytest.mark.parametrize("make", ALL)
def test_draws_differ_between_epochs_nodes_and_seeds(make: Make):
    def epoch(draws: Draws) -> tuple[int, ...]:
        return tuple(torch.cat([draws.next(25) for _ in range(draws.steps_per_epoch(25))]).tolist())

    epochs = make(50)
    found = [epoch(epochs), epoch(epochs), epoch(make(50, node=1)), epoch(make(50, seed=1))]
    assert len(set(found)) == 4
    torch.rand(3)  # the global generator has no say
    assert epoch(make(50)) == found[0]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("position", [Position(-1), Position(0, -1), Position(0, 10), Position(2, 11)])
def test_positions_outside_are_refused(make: Make, position: Position):
    draws = make(10)
    with pytest.raises(ValueError, match="is not a position in epochs of 10 samples"):
        draws.position = position


@pytest.mark.parametrize("make", ALL)
def test_no_samples(make: Make):
    with pytest.raises(DataError, match="data: node 3 has no samples"):
        make(0, node=3)


# --- one by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sampler, in_blocks])
@given(sizes, batch_sizes)
def test_an_epoch_draws_each_sample_once(make: Make, num_samples: int, batch_size: int):
    draws = make(num_samples)
    for epoch in range(3):
        assert draws.position == Position(epoch)
        batches = [draws.next(batch_size) for _ in range(draws.steps_per_epoch(batch_size))]
        assert torch.cat(batches).sort().values.tolist() == list(range(100, 100 + num_samples))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


@given(sizes, batch_sizes, st.integers(1, 4))
def test_an_epoch_of_blocks_keeps_to_its_windows(num_samples: int, batch_size: int, window: int):
    runs = Ranges((start, min(start + 7, num_samples)) for start in range(0, num_samples, 7))
    draws = Epoch().begin(runs, 0, 0, Blocks(runs, window))
    order = torch.cat([draws.next(batch_size) for _ in range(draws.steps_per_epoch(batch_size))])
    blocks = (order // 7).tolist()
    seen: list[int] = []
    while blocks:
        # The next blocks that come are the window: none of another one is drawn before all of them are.
        here = list(dict.fromkeys(blocks))
        size = 0
        while sum(min(7, num_samples - 7 * one) for one in sorted(set(blocks[:size]))) > size or not size:
            size += 1
        assert len(set(blocks[:size])) <= window
        seen += here[: len(set(blocks[:size]))]
        blocks = blocks[size:]
    assert sorted(seen) == list(range(-(-num_samples // 7)))


def test_samples_of_a_window_are_mixed():
    """Neither block after block, nor in the order of the samples."""
    draws = Epoch().begin(torch.arange(80), 0, 0, Blocks(Ranges([(n, n + 10) for n in range(0, 80, 10)]), 4))
    drawn = draws.next(80).tolist()
    for window in (drawn[:40], drawn[40:]):
        blocks = [sample // 10 for sample in window]
        assert len(set(blocks)) == 4
        assert len(set(blocks[:10])) > 1
        assert sum(one != two for one, two in itertools.pairwise(blocks)) > 15  # block after block: 3
        inside = [sample for sample in window if sample // 10 == blocks[0]]
        assert inside != sorted(inside)


def places_in_blocks(epochs: int = 1, seed: int = 0, node: int = 0) -> list[tuple[tuple[int, ...], ...]]:
    """For each epoch of 8 blocks of 10, one at a time: the blocks as they come, and the places drawn in each."""
    draws = Epoch().begin(torch.arange(80), seed, node, Blocks(Ranges([(n, n + 10) for n in range(0, 80, 10)]), 1))
    found = []
    for _ in range(epochs):
        blocks = draws.next(80).view(8, 10)
        assert (blocks // 10 == blocks[:, :1] // 10).all()
        found.append((tuple((blocks[:, 0] // 10).tolist()), *(tuple(row.tolist()) for row in blocks % 10)))
    return found


def test_blocks_are_drawn_in_an_order_of_each_epoch():
    orders = [epoch[0] for node in (0, 1) for seed in (0, 1) for epoch in places_in_blocks(3, seed, node)]
    assert len(set(orders)) == 12
    assert tuple(range(8)) not in orders
    # Each block is the first one in about an eighth of 400 epochs: 50, with a standard deviation of 6.6.
    firsts = torch.tensor([epoch[0][0] for epoch in places_in_blocks(400)]).bincount(minlength=8)
    assert (firsts - 50).abs().max() < 5 * 6.6


def test_each_window_is_mixed_in_its_own_way():
    """Else what lies at the same places of two blocks would always be drawn at the same places of their batches."""
    epochs = [epoch for node in (0, 1) for seed in (0, 1) for epoch in places_in_blocks(3, seed, node)]
    mixed = [places for epoch in epochs for places in epoch[1:]]
    assert len(mixed) == 12 * 8
    assert len(set(mixed)) == len(mixed)


def test_single_samples_of_blocks_are_drawn_block_by_block():
    mine = torch.tensor([3, 4, 11, 12, 13, 40])
    runs = Ranges((start, start + 10) for start in range(0, 50, 10))
    draws = Epoch().begin(mine, 0, 0, Blocks(runs, 1))
    assert isinstance(draws, BlockDraws)
    order = torch.cat([draws.next(4), draws.next(4)])
    assert sorted(order.tolist()) == mine.tolist()
    blocks = (order // 10).tolist()
    assert len(list(dict.fromkeys(blocks))) == 3
    assert blocks == sorted(blocks, key=list(dict.fromkeys(blocks)).index)


def test_with_replacement_draws_uniformly():
    draws = with_replacement(20)
    counts = torch.zeros(20)
    for _ in range(500):
        counts += (draws.next(20) - 100).bincount(minlength=20)
    # Binomial with n = 10 000 and p = 1/20: the standard deviation is 21.8.
    assert (counts - 500).abs().max() < 5 * 21.8
    assert len(torch.unique(with_replacement(20).next(20))) < 20


@given(num_samples=st.integers(1, 200), batch_size=st.integers(1, 300))
def test_poisson_batches_hold_each_sample_at_most_once(num_samples: int, batch_size: int):
    draws = poisson(num_samples)
    batch = draws.next(batch_size)
    assert len(batch.unique()) == len(batch)
    assert batch.tolist() == sorted(batch.tolist())
    if batch_size >= num_samples:
        assert len(batch) == num_samples


def test_poisson_has_its_law():
    num_samples, batch_size, count = 50, 5, 4000
    draws = poisson(num_samples)
    assert isinstance(draws, PoissonDraws)
    batches = [draws.next(batch_size) - 100 for _ in range(count)]
    sizes_ = torch.tensor([float(len(batch)) for batch in batches])
    q = Poisson.rate(num_samples, batch_size)
    assert q == 0.1
    # A batch's size is binomial, and so is how often each sample, or pair of samples, is drawn.
    assert float(sizes_.mean()) == pytest.approx(num_samples * q, abs=5 * math.sqrt(num_samples * q / count))
    assert float(sizes_.var()) == pytest.approx(num_samples * q * (1 - q), rel=0.1)
    counts = torch.cat(batches).bincount(minlength=num_samples)
    assert (counts - count * q).abs().max() < 5 * math.sqrt(count * q * (1 - q))
    both = sum(1 for batch in batches if {0, 1} <= set(batch.tolist()))
    assert abs(both - count * q * q) < 5 * math.sqrt(count * q * q)
    assert int(sizes_.min()) == 0  # an empty batch is one


def test_a_rate_is_a_probability():
    assert Poisson.rate(3, 5) == 1.0


def test_poisson_epochs_have_as_many_batches_as_others():
    draws = poisson(50)
    assert draws.steps_per_epoch(8) == 7
    for _ in range(7):
        draws.next(8)
    assert draws.position == Position(1)


# --- one's own --------------------------------------------------------------------------------------------------------


class Newest(Sampler):
    """The last sample, over and over."""

    wrong: bool = False

    def order(self, num_samples: int, epoch: int, rng: torch.Generator) -> torch.Tensor:
        return torch.full((num_samples,), num_samples - 1 + self.wrong)


def test_a_sampler_of_ones_own():
    draws = Newest().begin(100 + torch.arange(5), 0, 0)
    assert draws.next(3).tolist() == [104, 104, 104]
    assert draws.next(3).tolist() == [104, 104]
    assert draws.position == Position(1)


def test_a_sampler_that_draws_what_is_not_there_is_refused():
    draws = Newest(wrong=True).begin(torch.arange(5), 0, 0)
    with pytest.raises(
        ProgramError, match=r"test_samplers:Newest must give 5 places of shape \[5\], int64 in \[0, 5\); it"
    ):
        draws.next(3)


def test_names():
    assert set(table(Sampler)) == {"epoch", "poisson", "replacement"}
    assert find(Sampler, "poisson") is Poisson


def test_the_bits_of_the_default():
    # Golden: a changed order would change every run.
    assert sampler(8).next(8).tolist() == [107, 101, 106, 102, 103, 100, 104, 105]


def test_seeds():
    # Golden: a changed derivation would change every run.
    assert derive_seed("epoch", 0, 1, 2) == 6502243757841831714
    labels = [(), (1,), ("1",), (1, 1), (11,), ("1", "1"), ("1, 1",), ("a", "b"), ("ab",)]
    assert len({derive_seed(*label) for label in labels}) == len(labels)
    assert all(0 <= derive_seed("x", number) < 2**63 for number in range(100))
    one, two = (torch.rand(5, generator=generator("x", 1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(5, generator=generator("x", 2)))
