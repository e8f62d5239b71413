"""Data of single nodes, exactly: what is drawn for whom, whose labels are known, and batches over several nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.data.indices import Ranges, concrete
from starling.actors.tasks import Task, TensorSamples
from starling.actors.tasks.federated import FederatedSamples


class DrawnForAll(Task, name="test_drawn_for_all"):
    """Four samples, which are drawn; each node keeps those that it owns."""

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.randn(4), owners=torch.tensor([0, 0, 1, 2]))

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(1))

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return module(batch[0]).sum()


class Given(DrawnForAll, name="test_given"):
    """Node m has m + 1 samples: 10 m, 10 m + 1, …; with labels if m is below ``labelled``."""

    labelled: int = 3

    def own_samples(self, node: int, num_nodes: int) -> Any:
        values = 10.0 * node + torch.arange(node + 1)
        return TensorSamples(values, labels=values.long() if node < self.labelled else None)


class DrawnByEach(DrawnForAll, name="test_drawn_by_each"):
    """Each node draws its samples itself."""

    def own_samples(self, node: int, num_nodes: int) -> Any:
        return TensorSamples(torch.randn(2))


class Blocks:
    """Two samples by two, from 0 to 5."""

    owners = None
    runs = Ranges([(0, 2), (2, 4), (4, 6)])

    def __len__(self) -> int:
        return 6

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (indices,)


class InBlocks(DrawnForAll, name="test_in_blocks"):
    """Samples that come in blocks."""

    def own_samples(self, node: int, num_nodes: int) -> Any:
        return Blocks()


def values(data: FederatedSamples, *nodes: int) -> list[float]:
    return [float(one) for node in nodes for one in data.batch(concrete(data.indices(node)))[0]]


def test_a_batch_of_several_nodes_is_in_the_order_that_was_asked_for():
    data = FederatedSamples(Given(), 3)
    assert values(data, 2) == [20.0, 21.0, 22.0]
    two, one = (concrete(data.indices(node)) for node in (2, 1))
    mixed = torch.stack([two[2], one[0], two[0], one[1], two[1]])
    assert data.batch(mixed)[0].tolist() == [22.0, 10.0, 20.0, 11.0, 21.0]


def test_numbers_of_nodes_are_told_apart():
    data = FederatedSamples(Given(), 3)
    numbers = torch.cat([concrete(data.indices(node)) for node in range(3)])
    assert len(set(numbers.tolist())) == len(data) == 1 + 2 + 3
    blocks = FederatedSamples(InBlocks(), 2)
    first, second = (concrete(blocks.indices(node)).tolist() for node in (0, 1))
    assert len(set(first + second)) == 12
    assert values(blocks, 0) == values(blocks, 1) == [0, 1, 2, 3, 4, 5]
    runs: Any = blocks.runs
    assert [stop - start for start, stop in runs.runs()] == [2] * 6, "of both nodes"


@pytest.mark.parametrize(("labelled", "labels"), [(3, [0, 10, 11, 20, 21, 22]), (2, None), (0, None)])
def test_labels_are_those_of_all_nodes_or_of_none(labelled: int, labels: list[int] | None):
    found = FederatedSamples(Given(labelled=labelled), 3).labels
    assert (None if found is None else found.tolist()) == labels


def test_each_node_draws_other_samples_of_its_own():
    """And the same ones in every process; another run draws others."""
    one, again, other = (FederatedSamples(DrawnByEach(), 3, seed) for seed in (1, 1, 2))
    drawn = values(one, 0, 1, 2)
    assert len(set(drawn)) == 6
    assert values(again, 2) == drawn[4:], "whoever was asked before"
    assert not set(values(other, 0, 1, 2)) & set(drawn)


def test_samples_that_are_drawn_for_all_are_the_same_on_all():
    """Each node keeps its part of one draw: parts of different draws would overlap, or leave something out."""
    drawn = values(FederatedSamples(DrawnForAll(), 3, 1), 0, 1, 2)
    other = FederatedSamples(DrawnForAll(), 3, 1)
    assert [*values(other, 2), *values(other, 0)] == [drawn[3], *drawn[:2]]
    whole: Any = other.of(1)
    assert whole._samples.batch(torch.arange(4))[0].tolist() == drawn
