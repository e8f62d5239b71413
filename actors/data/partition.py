"""Partitions: which samples belong to which node.

Pooled samples are divided by a partition. Samples with owners (``Samples.owners``) already are, and stay with them.
Every sample is in exactly one part. The parts are a pure function of (samples, fields, number of nodes, seed): each
process divides the data by itself, and all processes have to agree without communication.

Samples that come in blocks (the row groups of a Parquet file) are divided in whole blocks by ``iid`` and ``quantity``,
so that a node reads no block of another's. The other partitions look at single samples.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from starling.actors.data.columns import codes_of
from starling.actors.data.indices import Indices, Ranges, concrete
from starling.algorithms.errors import DataError
from starling.algorithms.registry import Part
from starling.algorithms.seeds import generator
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from starling.actors.data.samples import Samples


class Partition(Part, family="partition", catalog="starling.actors.data"):
    """Divides pooled samples among nodes."""

    min_samples: NonNegativeInt = 0  # per node: one that would have fewer is given random ones of whoever has most

    @abstractmethod
    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Return the indices of each node's samples; every sample is in exactly one. Deterministic.

        Raises:
            DataError: the samples do not have what this partition goes by.
        """

    def advice(self) -> str:
        """Return what to change if a node gets too few samples."""
        return "ask for fewer nodes, or take a larger data set"


class Iid(Partition, name="iid"):
    """A random permutation, cut into parts whose sizes differ by at most one; of blocks, as even as they allow."""

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Cut a permutation that depends on ``seed`` alone; the first parts are the larger ones."""
        rng = generator("partition", "iid", seed)
        blocks = whole_blocks(samples)
        if blocks is not None:
            return _deal(blocks, torch.full((num_nodes,), 1 / num_nodes, dtype=torch.float64), rng)
        if len(samples) < num_nodes:
            raise DataError(
                f"data: {len(samples)} samples cannot be divided among {num_nodes} nodes; "
                f"ask for at most {len(samples)} nodes, or take a larger data set"
            )
        return torch.randperm(len(samples), generator=rng).tensor_split(num_nodes)


class Quantity(Partition, name="quantity"):
    """Random samples, but unequally many: the nodes' shares are drawn from a symmetric Dirichlet distribution.

    Reference: Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, quantity skew.
    """

    alpha: PositiveFloat = 1.0  # the smaller, the more unequal; 0.5 is common

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Cut a permutation in the proportions that are drawn."""
        rng = generator("partition", "quantity", seed)
        shares = dirichlet(self.alpha, num_nodes, rng)
        blocks = whole_blocks(samples)
        if blocks is not None:
            return _deal(blocks, shares, rng)
        return cut(torch.randperm(len(samples), generator=rng), shares)

    def advice(self) -> str:
        return "raise data.partition.alpha, set data.partition.min_samples, or ask for fewer nodes"


class Dirichlet(Partition, name="dirichlet"):
    """Label skew: each class is divided among the nodes in proportions drawn from a Dirichlet distribution.

    For each class k, p_k ~ Dir(``alpha`` · 1), shape (N,), and node m is given p_km of its samples, chosen at random. A
    class is given only to nodes with fewer than n/N samples so far (p_k is scaled to sum to 1 over these). The division
    is drawn again until every node has ``min_samples``, and at least one.
    Reference: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019; Li et al.,
    ICDE 2022, as "distribution-based label imbalance"; the scaling as in their code, in FedLab and in FL-bench, which
    require ten samples.
    """

    alpha: PositiveFloat = 0.5  # α; 0.1 is severe, 100 is nearly iid
    balanced: bool = True  # classes go to nodes below n/N samples, and are redrawn; false: once, to all, as the formula

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Divide class by class, in the order of the labels."""
        labels = labels_of(samples, "dirichlet")
        rng = generator("partition", "dirichlet", seed)
        least = max(1, self.min_samples)
        can_be = self.balanced and len(labels) >= least * num_nodes
        parts = self._drawn(labels, num_nodes, rng)
        for _ in range(_REDRAWS if can_be else 0):
            if min(len(part) for part in parts) >= least:
                break
            parts = self._drawn(labels, num_nodes, rng)
        return parts

    def _drawn(self, labels: Tensor, num_nodes: int, rng: torch.Generator) -> Sequence[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in range(num_nodes)]
        sizes = [0] * num_nodes
        for label in labels.unique().tolist():
            members = _shuffled((labels == label).nonzero().flatten(), rng)
            # Somebody is below the mean as long as there is something to give.
            open_to = [not self.balanced or size * num_nodes < len(labels) for size in sizes]
            for node, piece in enumerate(cut(members, dirichlet(self.alpha, num_nodes, rng, open_to))):
                parts[node].append(piece)
                sizes[node] += len(piece)
        return [torch.cat(part) for part in parts]

    def advice(self) -> str:
        return "raise data.partition.alpha, set data.partition.min_samples, or ask for fewer nodes"


_REDRAWS = 50
"""Number of draws after which nodes with too few samples receive others' samples, or an error is raised."""


class Shards(Partition, name="shards"):
    """Label skew, pathological: samples are sorted by label, cut into shards, and each node is given a few of them.

    N · ``per_node`` shards of equal size, to within one sample, dealt at random. Reference: McMahan et al.,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, section 3.
    """

    per_node: int = Field(default=2, ge=1)  # shards; 2 in the paper: most nodes have samples of two classes

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Sort a permutation by label and deal the shards."""
        labels = labels_of(samples, "shards")
        rng = generator("partition", "shards", seed)
        order = torch.randperm(len(labels), generator=rng)
        shards = order[labels[order].argsort(stable=True)].tensor_split(num_nodes * self.per_node)
        hands = torch.randperm(len(shards), generator=rng).view(num_nodes, self.per_node).tolist()
        return [torch.cat([shards[shard] for shard in hand]) for hand in hands]

    def advice(self) -> str:
        return "lower data.partition.per_node, or ask for fewer nodes"


class Column(Partition, name="column"):
    """Partition by the values of a column: a user, a hospital, a file. All samples of one value belong to one node.

    Of as many values as nodes each node is given one, in their order. Of more, values are dealt in random order, each
    to the node that has fewest samples yet.
    """

    column: str  # its name in the data; of images "folder", of texts "file"

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Deal the values."""
        owners = column_of(samples, self.column)
        counts = owners.bincount()
        if len(counts) < num_nodes:
            raise DataError(
                f"data.partition.column: {self.column} has {len(counts)} different values, and there are {num_nodes} "
                f"nodes: node {len(counts)} gets no samples; ask for at most {len(counts)} nodes"
            )
        node_of = torch.arange(len(counts))
        if len(counts) > num_nodes:
            sizes = [0] * num_nodes
            for value in torch.randperm(len(counts), generator=generator("partition", "column", seed)).tolist():
                node = sizes.index(min(sizes))
                node_of[value] = node
                sizes[node] += int(counts[value])
        return by_owner(node_of[owners], num_nodes)


class Feature(Partition, name="feature"):
    """Feature skew: each node is given a region of feature space.

    Features are scaled to [0, 1] and projected on a random direction u; samples are sorted by

        ``strength`` · rank(uᵀx) + (1 − ``strength``) · ξ        rank and ξ in [0, 1], ξ uniform

    and cut into parts whose sizes differ by at most one. Scaled values are rounded to 1/1024 and u to whole numbers, so
    that the projection is exact, and the parts the same, on every machine.
    """

    strength: float = Field(default=1.0, ge=0, le=1)  # 0: iid; 1: regions that do not overlap

    def split(self, samples: Samples, num_nodes: int, seed: int) -> Sequence[Indices]:
        """Sort and cut."""
        rng = generator("partition", "feature", seed)
        projected = _projections(samples, rng)
        order = projected.argsort(stable=True)
        rank = torch.empty(len(order), dtype=torch.float64)
        rank[order] = torch.arange(len(order), dtype=torch.float64) / max(1, len(order) - 1)
        noise = torch.rand(len(order), generator=rng, dtype=torch.float64)
        scores = self.strength * rank + (1 - self.strength) * noise
        return scores.argsort(stable=True).tensor_split(num_nodes)


# --- who has what -----------------------------------------------------------------------------------------------------


def assign(samples: Samples, partition: Partition, num_nodes: int, seed: int) -> Sequence[Indices]:
    """The indices of each node's samples: by owner where samples have one, else as ``partition`` divides them.

    Raises:
        DataError: some node would get nothing, or an owner is not among the nodes.
    """
    if samples.owners is not None:
        return _owned(samples.owners, num_nodes)
    parts = partition.split(samples, num_nodes, seed)
    if any(len(part) < partition.min_samples for part in parts):
        parts = _filled(parts, partition.min_samples, seed)
    for node, part in enumerate(parts):
        if not len(part):
            what = f"data.partition: {partition.name} leaves node {node} of {num_nodes} without samples"
            raise DataError(f"{what}; {partition.advice()}")
    return parts


def _owned(owners: Tensor, num_nodes: int) -> Sequence[Tensor]:
    counts = torch.bincount(owners, minlength=num_nodes).tolist()
    if len(counts) > num_nodes:
        raise DataError(f"data: node {len(counts) - 1} owns samples, but there are {num_nodes} nodes (0 is the first)")
    if not all(counts):
        raise DataError(f"data: node {counts.index(0)} of {num_nodes} owns no samples; ask for fewer nodes")
    return by_owner(owners, num_nodes)


def by_owner(owners: Tensor, num_nodes: int) -> Sequence[Tensor]:
    """The indices of each owner's samples, in their order."""
    return owners.argsort(stable=True).split(torch.bincount(owners, minlength=num_nodes).tolist())


def _filled(parts: Sequence[Indices], least: int, seed: int) -> list[Indices]:
    """Give nodes with fewer than ``least`` samples random ones of whoever has most."""
    total = sum(len(part) for part in parts)
    if total < least * len(parts):
        raise DataError(
            f"data.partition.min_samples: {len(parts)} nodes with {least} samples each need {least * len(parts)}, and "
            f"there are {total}; lower it, or ask for fewer nodes"
        )
    if any(isinstance(part, Ranges) for part in parts):
        node = next(node for node, part in enumerate(parts) if len(part) < least)
        raise DataError(
            f"data.partition.min_samples: node {node} has {len(parts[node])} samples in whole row groups; lower it, "
            "write smaller row groups, or set task.whole_row_groups: false"
        )
    rng = generator("partition", "fill", seed)
    filled = [_shuffled(concrete(part), rng) for part in parts]
    for node in range(len(filled)):
        while (lacking := least - len(filled[node])) > 0:
            sizes = [len(part) for part in filled]
            giver = sizes.index(max(sizes))
            # Half of what it has to spare: the next one to be given to may find another giver.
            kept = sizes[giver] - min(lacking, max(1, (sizes[giver] - least) // 2))
            filled[node] = torch.cat([filled[node], filled[giver][kept:]])
            filled[giver] = filled[giver][:kept]
    return list(filled)


# --- parts of partitions --------------------------------------------------------------------------------------------


def labels_of(samples: Samples, partition: str) -> Tensor:
    """The class of each sample, int64, shape (n,).

    Raises:
        DataError: they have none.
    """
    labels = getattr(samples, "labels", None)
    if labels is None:
        raise DataError(
            f"data.partition: {partition} goes by labels, and these samples have none; take iid or quantity"
        )
    return labels


def column_of(samples: Samples, column: str) -> Tensor:
    """The values of a column as numbers from 0 in the order of the values, int64, shape (n,).

    A missing value (``None``, in a column of objects) counts as a value of its own, the last.

    Raises:
        DataError: there is no such column, or its values have no order.
    """
    values = getattr(samples, "column", lambda _: None)(column)
    if values is None and column == "label":
        values = getattr(samples, "labels", None)
    if values is None:
        known = sorted(getattr(samples, "columns", ()))
        there = f"there are: {listed(known)}" if known else "these samples have none"
        raise DataError(f"data.partition.column: there is no column {column!r} ({there})")
    found = np.asarray(values)
    return torch.from_numpy(
        np.unique(_codes(found, column) if found.dtype == object else found, return_inverse=True)[1]
    )


def _codes(values: NDArray[Any], column: str) -> NDArray[Any]:
    import pyarrow as pa

    try:
        return codes_of(pa.chunked_array([pa.array(values, from_pandas=True)]), column)[0]
    except (pa.ArrowException, TypeError):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise DataError(f"data.partition.column: {column} holds values of several types ({kinds})") from None


def whole_blocks(samples: Samples) -> Ranges | None:
    """The blocks of samples that come in blocks, in their order."""
    return getattr(samples, "blocks", None)


def dirichlet(alpha: float, size: int, rng: torch.Generator, among: Sequence[bool] | None = None) -> Tensor:
    """A draw from the symmetric Dirichlet distribution, float64, shape (size,).

    Of those that are not ``among`` it is 0, and the others' sum is 1: what is left of a Dirichlet distribution is one.
    As normalised gamma variates, kept as logarithms: with a small ``alpha`` all of them may be zero in float64.
    """
    logs = [_log_gamma_variate(alpha, rng) for _ in range(size)]
    if among is not None:
        logs = [log if one else -math.inf for log, one in zip(logs, among, strict=True)]
    top = max(logs)
    values = [math.exp(one - top) for one in logs]
    # Rounded: exp and log may differ in the last bit between machines, which must not disagree about a sample.
    return torch.tensor([round(value / math.fsum(values) * _GRID) / _GRID for value in values], dtype=torch.float64)


_GRID = 2**40


def _log_gamma_variate(alpha: float, rng: torch.Generator) -> float:
    """Log of a draw from Γ(α), which is Γ(α + 1) · U^(1/α).

    Γ(α + 1) by Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000.
    """

    def uniform() -> float:
        return 1 - float(torch.rand((), generator=rng, dtype=torch.float64))  # in (0, 1]

    d = alpha + 2 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        normal = float(torch.randn((), generator=rng, dtype=torch.float64))
        v = (1 + c * normal) ** 3
        if v > 0 and math.log(uniform()) < normal**2 / 2 + d * (1 - v + math.log(v)):
            return math.log(d) + math.log(v) + math.log(uniform()) / alpha


def cut(indices: Tensor, shares: Tensor) -> Sequence[Tensor]:
    """Cut into consecutive pieces in the proportions ``shares``, which sum to 1; sizes are within one of exact."""
    bounds = (shares.cumsum(0)[:-1] * len(indices)).round().long().clamp(max=len(indices))
    return indices.tensor_split(bounds.tolist())


def _shuffled(indices: Tensor, rng: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=rng)]


def _deal(blocks: Ranges, shares: Tensor, rng: torch.Generator) -> list[Indices]:
    """Deal blocks in random order, each to the node that is furthest below its share."""
    runs = blocks.runs()
    num_nodes = len(shares)
    if len(runs) < num_nodes:
        raise DataError(
            f"data: {len(runs)} row groups cannot be divided among {num_nodes} nodes: node {len(runs)} gets none; ask "
            f"for at most {len(runs)} nodes, write smaller row groups, or set task.whole_row_groups: false"
        )
    total = len(blocks)
    hands: list[list[tuple[int, int]]] = [[] for _ in range(num_nodes)]
    lacking = (shares * total).tolist()
    for place in torch.randperm(len(runs), generator=rng).tolist():
        node = lacking.index(max(lacking))
        hands[node].append(runs[place])
        lacking[node] -= runs[place][1] - runs[place][0]
    return [Ranges(sorted(hand)) for hand in hands]


_AT_ONCE = 4096
_LEVELS = 1024


def _projections(samples: Samples, rng: torch.Generator) -> Tensor:
    """The features of each sample, rounded, on one random direction; int64, shape (n,)."""

    def chunks() -> list[tuple[int, int]]:
        return [(start, min(start + _AT_ONCE, len(samples))) for start in range(0, len(samples), _AT_ONCE)]

    def features(start: int, stop: int) -> Tensor:
        return samples.batch(torch.arange(start, stop))[0].flatten(1).double()

    low = torch.stack([features(*chunk).amin(0) for chunk in chunks()]).amin(0)
    high = torch.stack([features(*chunk).amax(0) for chunk in chunks()]).amax(0)
    direction = torch.randint(-_LEVELS, _LEVELS + 1, (len(low),), generator=rng)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    pieces: list[Tensor] = []
    for chunk in chunks():
        levels = ((features(*chunk) - low) / width * _LEVELS).round().long()
        pieces.append((levels * direction).sum(1))
    return torch.cat(pieces)
