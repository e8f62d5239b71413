"""Gradient coding: s + 1 nodes compute every gradient, so that no round waits for s stragglers.

The N members of a round form G = max(1, ⌊N / (s + 1)⌋) groups, s = ``stragglers``: the w-th is in group w mod G, of s +
1 or more if there are as many. All members of a group draw one batch from each member's samples, and each computes the
mean gradient g_k over these n_k samples. A node announces its finished gradient. When a node of each group has, and
those close behind have had ``patience_s``, the round goes on without the rest. One node of each group contributes (η =
``outer.lr``):

    g = Σ_k n_k g_k / Σ_k n_k          x ← x - η g

which is the gradient of plain SGD on the batches of all N, whoever straggles.
Deviations: fractional repetition for any N, where the paper has a cyclic code unless s + 1 divides N. There is no
master: the present nodes agree on the contributors, and reduce among themselves. Statistics of batch norm move with the
samples that a node has seen; those of the contributors are averaged.
Elasticity: x is shared state; a late node and a joiner receive it. Groups are made anew for each view, and a leaver
takes its samples along. Where a whole group is lost within a round, the mean is over the others for that round. A round
needs the quorum in any case: N - s must not be below ``cluster.quorum_fraction`` · N.
Cost: 8 bytes from each to each other, and (G-1)·b·P + (N-1)·b·P, b = 4 for float32 (as a star: (G+N)·b·P); up to
64 KiB a contribution travels inline, G·(N-1)·b·P. N/G ≥ s + 1 gradients a node and round. State: P values (x).
Reference: Tandon et al., "Gradient Coding: Avoiding Stragglers in Distributed Learning", ICML 2017, arXiv:1612.03301.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from pydantic import NonNegativeFloat, NonNegativeInt

from starling.algorithms.api import (
    Algorithm,
    AllGather,
    AllReduce,
    Batch,
    Gradient,
    Layout,
    Node,
    NodeId,
    all_reduce_bytes,
)
from starling.algorithms.closing.coded import OneOfEach
from starling.algorithms.outer import SGD, OuterOptimizer
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from starling.algorithms.outer import OuterState

Groups: TypeAlias = tuple[tuple[NodeId, ...], ...]


class Shared(NodeState):
    model: Tensor  # x
    outer: OuterState


class GradientCoding(Algorithm, name="gradient_coding"):
    """SGD with gradients from fractional repetition; see the module's docstring."""

    uses_optimizer: ClassVar[bool] = False

    stragglers: NonNegativeInt = 1  # s, nodes that a round can go on without, whichever they are
    patience_s: NonNegativeFloat = 0.1  # after the first is done; 0: leaves all behind that are not needed
    outer: OuterOptimizer = SGD(lr=0.1)  # η; the nodes' own optimizers take no steps

    def init(self, node: Node) -> None:
        shared = Shared(node.shared)
        shared.model = node.parameters.clone()
        shared.outer = self.outer.init(node.parameters)

    async def round(self, node: Node) -> None:
        groups = groups_of(node.view.members, self.stragglers)
        total, num_samples = torch.zeros_like(node.parameters), 0
        for member in next(group for group in groups if node.id in group):
            report = await Gradient(batch=await Batch(part=member))
            total.add_(report.gradient, alpha=report.num_samples)
            num_samples += report.num_samples
        done = set(await AllGather(1.0, close=OneOfEach(groups=groups, grace_s=self.patience_s)))
        # Who is lost between the two exchanges is replaced by another of its group that is there.
        lost = mean = None
        while mean is None or (lost and representatives(groups, done) != set(mean.members)):
            chosen = representatives(groups, done)
            contribution = {"gradient": total / num_samples, "buffers": node.buffers} if node.id in chosen else None
            mean = await AllReduce(contribution, weight=max(1, num_samples))
            lost = chosen.difference(mean.members)
            done -= lost
        shared = Shared(node.shared)
        step, shared.outer = self.outer.update(mean.value["gradient"], shared.outer)
        shared.model = shared.model + step
        node.parameters.copy_(shared.model)
        node.buffers.copy_(mean.value["buffers"])

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        num_groups = len(groups_of(range(num_nodes), self.stragglers))
        agreed = num_nodes * (num_nodes - 1) * 8
        return agreed + all_reduce_bytes(layout.nbytes + layout.buffer_nbytes, num_nodes, num_groups)


def groups_of(members: Sequence[NodeId], stragglers: int) -> Groups:
    """Divide the members into even groups of at least s + 1, whose nodes compute equal gradients; or into one group.

    >>> groups_of(range(7), 1)
    ((0, 3, 6), (1, 4), (2, 5))
    """
    num_groups = max(1, len(members) // (stragglers + 1))
    return tuple(tuple(members[group::num_groups]) for group in range(num_groups))


def representatives(groups: Groups, done: Collection[NodeId]) -> set[NodeId]:
    """Return the first node of each group that is done, for groups in which one is.

    >>> sorted(representatives(((0, 3, 6), (1, 4), (2, 5)), {1, 3, 4, 6}))
    [1, 3]
    """
    present = ([node for node in group if node in done] for group in groups)
    return {group[0] for group in present if group}
