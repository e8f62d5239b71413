"""Partitions: every sample in exactly one part, the same parts in every process, and errors that say what to do."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from starling.actors.data import DataConfig, Iid, Partition, Ranges, assign
from starling.actors.data.indices import concrete
from starling.actors.data.partition import Column, Dirichlet, Feature, Quantity, Shards, cut, dirichlet
from starling.actors.tasks import TensorSamples
from starling.actors.tasks.digits import Digits
from starling.algorithms.errors import DataError
from starling.algorithms.registry import find, table
from starling.algorithms.seeds import generator

FILLED: list[Partition] = [
    Iid(),
    Quantity(alpha=0.3, min_samples=1),
    Dirichlet(alpha=0.1, min_samples=1, balanced=False),
    Shards(min_samples=1),
    Feature(),
    Feature(strength=0.4),
]


def pooled(num_samples: int) -> TensorSamples:
    return TensorSamples(torch.zeros(num_samples))


def owned(owners: list[int]) -> TensorSamples:
    return TensorSamples(torch.zeros(len(owners)), owners=torch.tensor(owners))


def labelled(labels: list[int], seed: int = 0) -> TensorSamples:
    numbers = torch.tensor(labels)
    features = torch.randn(len(labels), 3, generator=generator("features", seed)) + numbers.unsqueeze(1)
    return TensorSamples(features, numbers, labels=numbers, columns={"user": np.array([f"u{one}" for one in labels])})


class Blocked(TensorSamples):
    """Samples that come in blocks of the given sizes."""

    def __init__(self, sizes: list[int], labels: torch.Tensor | None = None) -> None:
        super().__init__(torch.zeros(sum(sizes)), labels=labels)
        ends = np.cumsum(sizes).tolist()
        self.blocks = Ranges(zip([0, *ends[:-1]], ends, strict=True))


def members(parts: Any) -> list[int]:
    return torch.cat([concrete(part) for part in parts]).sort().values.tolist()


# --- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", FILLED, ids=lambda one: one.name)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=60),
    num_nodes=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
def test_each_sample_is_in_exactly_one_part(partition: Partition, labels: list[int], num_nodes: int, seed: int):
    samples = labelled(labels)
    parts = assign(samples, partition, num_nodes, seed)
    assert len(parts) == num_nodes
    assert members(parts) == list(range(len(labels)))
    assert all(len(part) for part in parts)
    again = assign(labelled(labels), partition, num_nodes, seed)
    assert all(torch.equal(concrete(one), concrete(two)) for one, two in zip(parts, again, strict=True))


@pytest.mark.parametrize("partition", FILLED, ids=lambda one: one.name)
def test_parts_depend_on_the_seed_alone(partition: Partition):
    samples = labelled([number % 5 for number in range(200)])
    first = assign(samples, partition, 4, 0)
    torch.rand(3)  # the global generator has no say
    other = assign(samples, partition, 4, 1)
    assert not all(torch.equal(concrete(one), concrete(two)) for one, two in zip(first, other, strict=True))


@given(
    least=st.integers(0, 8),
    alpha=st.sampled_from([0.01, 0.1, 1.0]),
    num_nodes=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_no_node_has_fewer_than_the_least(least: int, alpha: float, num_nodes: int, seed: int):
    samples = labelled([number % 3 for number in range(80)])
    partition = Dirichlet(alpha=alpha, min_samples=max(1, least), balanced=False)
    parts = assign(samples, partition, num_nodes, seed)
    assert min(len(part) for part in parts) >= max(1, least)
    assert members(parts) == list(range(80))


def test_nodes_that_have_enough_and_give_nothing_keep_their_samples():
    samples = labelled([number % 3 for number in range(60)])
    plain = Dirichlet(alpha=0.2, balanced=False).split(samples, 5, 3)
    filled = assign(samples, Dirichlet(alpha=0.2, balanced=False, min_samples=4), 5, 3)
    sizes = [len(part) for part in plain]
    assert min(sizes) < 4
    for before, after in zip(plain, filled, strict=True):
        if len(before) < 4:
            assert set(concrete(before).tolist()) < set(concrete(after).tolist())
            assert len(after) == 4


def test_parts_that_have_just_the_least_stay_as_they_are():
    bare, least = (assign(pooled(40), Iid(min_samples=count), 4, 3) for count in (0, 10))
    assert [concrete(part).tolist() for part in bare] == [concrete(part).tolist() for part in least]


def test_what_is_given_is_random():
    """A part that is in order gives any of its samples, not the last ones."""
    users = [0] + [1] * 50
    given = [assign(labelled(users), Column(column="user", min_samples=10), 2, seed)[0].tolist() for seed in (0, 1)]
    found = [{one for one in part if one > 0} for part in given]
    assert [len(one) for one in found] == [9, 9]
    assert found[0] != found[1]
    assert set(range(42, 51)) not in found


def test_a_least_that_cannot_be_is_refused():
    with pytest.raises(
        DataError, match=r"min_samples: 4 nodes with 20 samples each need 80, and there are 60; lower it"
    ):
        assign(labelled([0] * 60), Iid(min_samples=20), 4, 0)


# --- one by one -------------------------------------------------------------------------------------------------------


@given(num_nodes=st.integers(1, 20), extra=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_iid_parts_are_even(num_nodes: int, extra: int, seed: int):
    sizes = [len(part) for part in assign(pooled(num_nodes + extra), Iid(), num_nodes, seed)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 5), max_size=40))
def test_owners_keep_their_samples(tail: list[int]):
    owners = [3, 0, 5, 1, 2, 4, *tail]
    parts = [concrete(part) for part in assign(owned(owners), Iid(), 6, seed=0)]
    assert members(parts) == list(range(len(owners)))
    for node, part in enumerate(parts):
        assert [owners[index] for index in part.tolist()] == [node] * len(part)
        assert part.tolist() == sorted(part.tolist())


@given(alpha=st.sampled_from([1e-3, 0.1, 1.0, 50.0, 1e4]), size=st.integers(1, 30), seed=st.integers(0, 1000))
def test_dirichlet_draws_are_shares(alpha: float, size: int, seed: int):
    shares = dirichlet(alpha, size, generator(seed))
    assert shares.shape == (size,)
    assert float(shares.min()) >= 0
    assert float(shares.sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 6.0])
def test_dirichlet_has_its_moments(alpha: float):
    size, count = 5, 4000
    rng = generator("moments")
    draws = torch.stack([dirichlet(alpha, size, rng) for _ in range(count)])
    # Of Dir(α·1) each share has the mean 1/N and the variance (N − 1) / (N² (Nα + 1)).
    variance = (size - 1) / (size**2 * (size * alpha + 1))
    assert draws.mean(0).tolist() == pytest.approx([1 / size] * size, abs=4 * (variance / count) ** 0.5)
    assert draws.var(0).tolist() == pytest.approx([variance] * size, rel=0.1)


@given(st.integers(0, 100), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_cuts_are_within_one_of_exact(num_samples: int, weights: list[int]):
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    pieces = cut(torch.arange(num_samples), shares)
    assert torch.cat(list(pieces)).tolist() == list(range(num_samples))
    for piece, share in zip(pieces, shares.tolist(), strict=True):
        assert abs(len(piece) - share * num_samples) <= 1


def test_dirichlet_is_nearly_iid_for_a_large_alpha_and_pure_for_a_small_one():
    labels = [number % 4 for number in range(4000)]
    even = assign(labelled(labels), Dirichlet(alpha=1e5), 4, 0)
    for part in even:
        counts = torch.tensor(labels)[part].bincount(minlength=4)
        assert (counts - 250).abs().max() < 10
    # With α → 0 nearly all of a class goes to one node.
    severe = Dirichlet(alpha=1e-3).split(labelled(labels), 4, 0)
    table_ = torch.stack([torch.tensor(labels)[part].bincount(minlength=4) for part in severe])
    assert table_.amax(0).min() > 990


def _of_niid_bench(labels: np.ndarray[Any, Any], num_nodes: int, beta: float, rng: np.random.Generator) -> list[Any]:
    """``noniid-labeldir`` as in NIID-Bench's partition_data, FedLab's hetero_dir_partition and FL-bench's dirichlet."""
    parts: list[list[int]] = [[] for _ in range(num_nodes)]
    while min(map(len, parts)) < 10:
        parts = [[] for _ in range(num_nodes)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet([beta] * num_nodes)
            shares = np.array(
                [p * (len(part) < len(labels) / num_nodes) for p, part in zip(shares, parts, strict=True)]
            )
            bounds = (np.cumsum(shares / shares.sum()) * len(members)).astype(int)[:-1]
            parts = [part + new.tolist() for part, new in zip(parts, np.split(members, bounds), strict=True)]
    return parts


def _skews(parts: list[list[int]], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The coefficient of variation of the parts' sizes, and the mean entropy of their labels."""
    shares = np.stack([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
    sizes = np.array([len(part) for part in parts])
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
    return float(sizes.std() / sizes.mean()), float(entropy.mean())


@pytest.mark.slow
def test_dirichlet_has_the_law_of_its_peers():
    labels = Digits().train_samples(1).labels
    assert labels is not None
    rng, seeds = np.random.default_rng(0), range(60)
    samples, values = TensorSamples(labels, labels=labels), labels.numpy()
    partition = Dirichlet(alpha=0.1, min_samples=10)
    ours = np.mean(
        [_skews([concrete(one).tolist() for one in partition.split(samples, 10, n)], values) for n in seeds], 0
    )
    theirs = np.mean([_skews(_of_niid_bench(values, 10, 0.1, rng), values) for _ in seeds], 0)
    assert ours == pytest.approx(theirs, abs=0.07)  # four standard errors of the difference
    assert ours == pytest.approx([0.42, 0.83], abs=0.05)


def test_dirichlet_gives_a_class_to_nodes_that_have_less_than_the_mean():
    """Independently of how shares are drawn: who has n/N samples when a class comes is given none of it."""
    labels = torch.arange(10).repeat_interleave(40)
    for seed in range(20):
        table_ = torch.stack(
            [labels[one].bincount(minlength=10) for one in Dirichlet(alpha=0.1).split(by(labels), 8, seed)]
        )
        before = table_.cumsum(1) - table_
        assert int(table_[before >= 400 / 8].sum()) == 0
        assert int(table_.sum(1).min()) >= 1
    free = [Dirichlet(alpha=0.1, balanced=False).split(by(labels), 8, seed) for seed in range(20)]
    assert max(len(part) for parts in free for part in parts) > 120
    assert min(len(part) for parts in free for part in parts) == 0


def test_dirichlet_draws_anew_until_all_have_enough():
    labels = torch.arange(10).repeat_interleave(40)
    for seed in range(5):
        first, least = Dirichlet(alpha=0.3).split(by(labels), 8, seed), Dirichlet(alpha=0.3, min_samples=25)
        assert min(map(len, least.split(by(labels), 8, seed))) >= 25  # not one is filled up
        if min(map(len, first)) >= 25:
            assert all(
                torch.equal(concrete(a), concrete(b))
                for a, b in zip(first, least.split(by(labels), 8, seed), strict=True)
            )
    hopeless = Dirichlet(alpha=0.001, min_samples=45)
    assert min(map(len, assign(by(labels), hopeless, 8, 0))) == 45


@pytest.mark.parametrize("balanced", [True, False])
def test_dirichlet_draws_shares_of_its_own_for_each_class(balanced: bool):
    labels = torch.arange(4).repeat_interleave(500)
    parts = Dirichlet(alpha=1.0, balanced=balanced).split(by(labels), 4, 0)
    table_ = torch.stack([labels[part].bincount(minlength=4) for part in parts]).double() / 500
    assert float(table_.std(1).max()) > 0.15  # one p for all classes: 0


def by(labels: torch.Tensor) -> TensorSamples:
    return TensorSamples(torch.zeros(len(labels)), labels=labels)


RANDOM: list[Partition] = [Quantity(alpha=5.0), Dirichlet(alpha=1e4), Dirichlet(alpha=1e4, balanced=False)]


@pytest.mark.parametrize("partition", RANDOM, ids=str)
def test_samples_of_a_part_are_random(partition: Partition):
    parts = partition.split(by(torch.zeros(2000, dtype=torch.int64)), 4, 0)
    for part in parts:
        places = concrete(part).double()
        assert abs(float(places.mean()) - 1000) < 4 * 577 / len(part) ** 0.5  # of consecutive ones it is 250, 750, …


def test_quantity_is_the_more_unequal_the_smaller_alpha_is():
    def spread(alpha: float) -> float:
        sizes = [[len(part) for part in Quantity(alpha=alpha).split(pooled(4000), 8, seed)] for seed in range(12)]
        return float(np.mean(np.std(sizes, axis=1))) / 500

    # Of Dir(α · 1) a share has the coefficient of variation √((N − 1) / (N·α + 1)).
    assert [spread(alpha) for alpha in (0.2, 1.0, 100.0)] == pytest.approx([1.64, 0.88, 0.094], rel=0.25)


def test_shards_are_random_and_dealt_at_random():
    labels = torch.arange(10).repeat_interleave(40)
    hands, means = [], []
    for seed in range(30):
        parts = Shards().split(by(labels), 10, seed)
        hands.append(sorted(labels[parts[0]].unique().tolist()))
        one = concrete(parts[0])
        means.append(float((one % 40).double().mean()))
    assert len({tuple(hand) for hand in hands}) > 10  # dealt in order node 0 had class 0 alone
    assert 3 < np.mean([label for hand in hands for label in hand]) < 6
    # A shard is half of a class: in their order its samples are 0 … 19 or 20 … 39 of it, in the mean 9.5 or 29.5.
    assert np.std(means) < 3


def test_feature_skew_does_not_depend_on_units():
    features = torch.randn(400, 3, generator=generator("units"))
    for seed in range(3):
        plain_, scaled = (
            Feature().split(TensorSamples(features * torch.tensor([1.0, factor, 1.0])), 4, seed)
            for factor in (1.0, 1024.0)
        )
        assert all(torch.equal(concrete(one), concrete(two)) for one, two in zip(plain_, scaled, strict=True))


class Given(Partition):
    """Parts of given sizes."""

    sizes: tuple[int, ...]

    def split(self, samples: Any, num_nodes: int, seed: int) -> Any:
        return torch.arange(len(samples)).split(list(self.sizes))


def test_who_has_most_gives():
    parts = assign(pooled(80), Given(sizes=(0, 12, 10, 58), min_samples=5), 4, 0)
    assert [len(part) for part in parts] == [5, 12, 10, 53]
    assert set(concrete(parts[0]).tolist()) <= set(range(22, 80))
    # Two that have most give in turn, each half of what it can spare.
    parts = assign(pooled(80), Given(sizes=(0, 0, 10, 34, 36), min_samples=10), 5, 0)
    assert [len(part) for part in parts][:3] == [10, 10, 10]
    assert min(len(parts[3]), len(parts[4])) >= 24


@given(per_node=st.integers(1, 3), num_nodes=st.integers(1, 10), seed=st.integers(0, 1000))
def test_shards_give_each_node_few_classes(per_node: int, num_nodes: int, seed: int):
    labels = torch.arange(10).repeat_interleave(12)
    parts = assign(labelled(labels.tolist()), Shards(per_node=per_node), num_nodes, seed)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= per_node
    for part in parts:
        # A shard of s consecutive sorted samples touches at most ⌈(s − 1) / 12⌉ + 1 of the classes of twelve.
        shard = -(-120 // (num_nodes * per_node))
        assert len(labels[concrete(part)].unique()) <= per_node * (-(-(shard - 1) // 12) + 1)


def test_a_column_keeps_its_values_together():
    users = [0, 1, 2, 3, 4, 5, 6] * 9
    parts = assign(labelled(users), Column(column="user"), 3, 0)
    found = [{users[index] for index in concrete(part).tolist()} for part in parts]
    assert set.union(*found) == set(range(7))
    assert sum(map(len, found)) == 7
    assert sorted(map(len, found)) == [2, 2, 3]


def test_values_are_dealt_in_random_order_to_who_has_fewest_samples():
    """Who is dealt the large value first of all has nothing else; counted by values it would have half of them."""
    users = [3] * 100 + [0, 1, 2, 4, 5]
    hands = [
        [frozenset(users[index] for index in concrete(part).tolist()) for part in parts]
        for parts in (assign(labelled(users), Column(column="user"), 2, seed) for seed in range(30))
    ]
    assert any(frozenset({3}) in hand for hand in hands)
    assert len({frozenset(hand) for hand in hands}) > 3
    assert all(len(next(one for one in hand if 3 in one)) <= 4 for hand in hands)


def test_a_column_may_have_gaps_and_must_have_an_order():
    def parts(values: list[Any]) -> list[list[int]]:
        samples = TensorSamples(torch.zeros(4), columns={"user": np.array(values, dtype=object)})
        return [concrete(part).tolist() for part in assign(samples, Column(column="user"), 3, 0)]

    assert parts(["b", None, "a", "b"]) == [[2], [0, 3], [1]]
    assert parts([2.5, float("nan"), 1, 2.5]) == [[2], [0, 3], [1]]
    with pytest.raises(DataError, match=r"data.partition.column: user holds values of several types \(int, str\)"):
        parts(["b", 1, "a", "b"])


def test_as_many_values_as_nodes_are_given_in_their_order():
    users = [2, 0, 1, 1, 0, 2, 2]
    parts = assign(labelled(users), Column(column="user"), 3, 5)
    assert [concrete(part).tolist() for part in parts] == [[1, 4], [2, 3], [0, 5, 6]]
    by_label = assign(TensorSamples(torch.zeros(7), labels=torch.tensor(users)), Column(column="label"), 3, 5)
    assert [concrete(part).tolist() for part in by_label] == [[1, 4], [2, 3], [0, 5, 6]]


def test_feature_skew_divides_space_into_regions():
    samples = TensorSamples(torch.rand(1000, 1, generator=generator(1)))
    parts = assign(samples, Feature(), 4, 0)
    ranges = sorted((samples.tensors[0][part].min().item(), samples.tensors[0][part].max().item()) for part in parts)
    # Values are rounded to 1/1024, so regions may meet in one step.
    assert all(low[1] <= high[0] + 1 / 512 for low, high in itertools.pairwise(ranges))
    assert [len(part) for part in parts] == [250] * 4
    mixed = assign(samples, Feature(strength=0.0), 4, 0)
    assert all(abs(samples.tensors[0][part].mean().item() - 0.5) < 0.06 for part in mixed)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", [Iid(), Quantity(alpha=5.0)], ids=lambda one: one.name)
@given(sizes=st.lists(st.integers(1, 30), min_size=8, max_size=40), seed=st.integers(0, 1000))
def test_blocks_are_dealt_whole(partition: Partition, sizes: list[int], seed: int):
    samples = Blocked(sizes)
    parts = partition.split(samples, 4, seed)
    assert members(parts) == list(range(sum(sizes)))
    blocks = set(samples.blocks.runs())
    for part in parts:
        assert isinstance(part, Ranges)
        assert set(part.runs()) <= blocks


@pytest.mark.parametrize("partition", [Iid(), Quantity(alpha=100.0)], ids=lambda one: one.name)
def test_blocks_are_dealt_in_random_order(partition: Partition):
    samples = Blocked([5] * 40)
    firsts = [{run[0] // 5 for run in partition.split(samples, 4, seed)[0].runs()} for seed in range(8)]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(set(map(frozenset, firsts))) == 8
    assert 12 < np.mean([block for first in firsts for block in first]) < 27
    for first in firsts:
        gaps = np.diff(sorted(first))
        assert gaps.max() > 4  # in their order every fourth is node 0's
        assert gaps.min() < 4


@given(sizes=st.lists(st.integers(1, 30), min_size=8, max_size=40))
def test_dealt_parts_are_as_even_as_a_block_allows(sizes: list[int]):
    counts = [len(part) for part in assign(Blocked(sizes), Iid(), 4, 0)]
    assert max(counts) - min(counts) <= 2 * max(sizes)


def test_label_skew_divides_single_samples_of_blocks():
    labels = torch.arange(40) % 2
    parts = assign(Blocked([10] * 4, labels), Shards(per_node=1), 2, 0)
    assert sorted(labels[concrete(part)].unique().tolist() for part in parts) == [[0], [1]]


def test_ranges_are_the_indices_that_they_stand_for():
    ranges = Ranges([(5, 8), (0, 2), (20, 21)])
    expected = [5, 6, 7, 0, 1, 20]
    assert len(ranges) == 6
    assert concrete(ranges).tolist() == expected
    assert ranges[torch.tensor([[5, 0], [3, 2]])].tolist() == [[20, 5], [0, 7]]
    assert len(Ranges([])) == 0
    with pytest.raises(ValueError, match="cannot be empty"):
        Ranges([(3, 3)])


# --- errors -----------------------------------------------------------------------------------------------------------

CASES = [
    (pooled(10), Iid(), 12, "data: 10 samples cannot be divided among 12 nodes; ask for at most 10 nodes, or take a "),
    (owned([0, 1, 4]), Iid(), 3, "data: node 4 owns samples, but there are 3 nodes"),
    (owned([0, 2]), Iid(), 3, "data: node 1 of 3 owns no samples; ask for fewer nodes"),
    (pooled(10), Dirichlet(), 2, "data.partition: dirichlet goes by labels, and these samples have none; take iid or"),
    (pooled(10), Column(column="user"), 2, "data.partition.column: there is no column 'user' .these samples have none"),
    (labelled([0, 1]), Column(column="usr"), 2, "data.partition.column: there is no column 'usr' .there are: user"),
    (
        labelled([0, 1, 1]),
        Column(column="user"),
        3,
        "user has 2 different values, and there are 3 nodes: node 2 gets no samples; ask for at most 2 nodes",
    ),
    (
        labelled([0] * 8),
        Dirichlet(alpha=1e-6),
        4,
        "data.partition: dirichlet leaves node . of 4 without samples; raise data.partition.alpha, set ",
    ),
    (labelled([0, 1]), Shards(), 4, "data.partition: shards leaves node . of 4 without samples; lower data.partition."),
    (
        Blocked([5, 5]),
        Iid(),
        3,
        "data: 2 row groups cannot be divided among 3 nodes: node 2 gets none; ask for at most",
    ),
    (
        Blocked([2, 9]),
        Iid(min_samples=4),
        2,
        "min_samples: node 0 has 2 samples in whole row groups; lower it, write sm",
    ),
]


@pytest.mark.parametrize(("samples", "partition", "num_nodes", "message"), CASES, ids=range(len(CASES)))
def test_errors(samples: TensorSamples, partition: Partition, num_nodes: int, message: str):
    with pytest.raises(DataError, match=message) as caught:
        assign(samples, partition, num_nodes, seed=0)
    assert "\n" not in str(caught.value)


def test_configuration():
    assert DataConfig() == DataConfig.model_validate(
        {"source": "pooled", "partition": {"name": "iid"}, "sampler": "epoch", "batch_size": 32}
    )
    assert DataConfig.model_validate({"partition": "iid"}).partition == Iid()
    assert set(table(Partition)) == {"column", "dirichlet", "feature", "iid", "quantity", "shards"}
    assert find(Partition, "shards") is Shards
    for wrong in (
        {"batch_size": 0},
        {"source": "owned"},
        {"batchsize": 8},
        {"partition": "idd"},
        {"partition": {"name": "dirichlet", "alpha": 0}},
        {"partition": {"name": "feature", "strength": 1.5}},
        {"partition": "column"},
        {"sampler": "random"},
    ):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)
