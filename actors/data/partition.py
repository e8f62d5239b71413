"""Partitions: which samples belong to which node.

Pooled samples are divided by a partition. Samples with owners (``Samples.owners``) already are, and stay with them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from algorithms.errors import DataError
from algorithms.registry import Part
from algorithms.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

    from actors.tasks.base import Samples


class Partition(Part, family="partition", catalog="actors.data.partition"):
    """Divides pooled samples among nodes."""

    @abstractmethod
    def split(self, samples: Samples, num_nodes: int, seed: int) -> list[Tensor]:
        """Return ``num_nodes`` tensors of indices; every sample is in exactly one. Deterministic.

        Raises:
            DataError: some node would get nothing.
        """


class Iid(Partition, name="iid"):
    """A random permutation, cut into parts whose sizes differ by at most one."""

    def split(self, samples: Samples, num_nodes: int, seed: int) -> list[Tensor]:
        """Cut a permutation that depends on ``seed`` alone; the first parts are the larger ones."""
        if len(samples) < num_nodes:
            raise DataError(
                f"data: {len(samples)} samples cannot be divided among {num_nodes} nodes; "
                f"ask for at most {len(samples)} nodes, or take a larger data set"
            )
        order = torch.randperm(len(samples), generator=generator("partition", "iid", seed))
        return list(order.tensor_split(num_nodes))


def assign(samples: Samples, partition: Partition, num_nodes: int, seed: int) -> list[Tensor]:
    """The indices of each node's samples: by owner where samples have one, else as ``partition`` divides them.

    Raises:
        DataError: some node would get nothing, or an owner is not among the nodes.
    """
    if samples.owners is None:
        return partition.split(samples, num_nodes, seed)
    counts = torch.bincount(samples.owners, minlength=num_nodes).tolist()
    if len(counts) > num_nodes:
        raise DataError(f"data: node {len(counts) - 1} owns samples, but there are {num_nodes} nodes (0 is the first)")
    if not all(counts):
        raise DataError(f"data: node {counts.index(0)} of {num_nodes} owns no samples; ask for fewer nodes")
    return list(samples.owners.argsort(stable=True).split(counts))
