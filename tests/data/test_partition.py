"""Partitions: every sample in exactly one part, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.data import DataConfig, Iid, assign
from actors.tasks import TensorSamples
from algorithms.errors import DataError


def pooled(num_samples: int) -> TensorSamples:
    return TensorSamples(torch.zeros(num_samples))


def owned(owners: list[int]) -> TensorSamples:
    return TensorSamples(torch.zeros(len(owners)), owners=torch.tensor(owners))


@given(num_nodes=st.integers(1, 20), extra=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_iid_covers_each_sample_once(num_nodes: int, extra: int, seed: int):
    samples = pooled(num_nodes + extra)
    parts = assign(samples, Iid(), num_nodes, seed)
    assert len(parts) == num_nodes
    assert torch.cat(parts).sort().values.tolist() == list(range(len(samples)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_iid_depends_on_the_seed_alone():
    first, again, other = (Iid().split(pooled(100), 4, seed) for seed in (0, 0, 1))
    torch.rand(3)  # the global generator has no say
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@given(st.lists(st.integers(0, 5), max_size=40))
def test_owners_keep_their_samples(tail: list[int]):
    owners = [3, 0, 5, 1, 2, 4, *tail]
    parts = assign(owned(owners), Iid(), 6, seed=0)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(owners)))
    for node, part in enumerate(parts):
        assert [owners[index] for index in part.tolist()] == [node] * len(part)
        assert part.tolist() == sorted(part.tolist())


@pytest.mark.parametrize(
    ("samples", "num_nodes", "message"),
    [
        (
            pooled(10),
            12,
            "data: 10 samples cannot be divided among 12 nodes; ask for at most 10 nodes, or take a larger",
        ),
        (owned([0, 1, 4]), 3, "data: node 4 owns samples, but there are 3 nodes"),
        (owned([0, 2]), 3, "data: node 1 of 3 owns no samples; ask for fewer nodes"),
    ],
)
def test_errors(samples: TensorSamples, num_nodes: int, message: str):
    with pytest.raises(DataError, match=message):
        assign(samples, Iid(), num_nodes, seed=0)


def test_configuration():
    assert DataConfig() == DataConfig.model_validate(
        {"source": "pooled", "partition": {"name": "iid"}, "batch_size": 32}
    )
    assert DataConfig.model_validate({"partition": "iid"}).partition == Iid()
    for wrong in ({"batch_size": 0}, {"source": "owned"}, {"batchsize": 8}, {"partition": "idd"}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)
