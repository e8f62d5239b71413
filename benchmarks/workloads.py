"""The smallest task and algorithms that isolate what is measured: a bare vector, and rounds that only exchange it."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from starling.actors.replica.staged_state import StagedState
from starling.actors.tasks import Samples, Task, TensorSamples
from starling.actors.training.slab import Slab
from starling.algorithms.aggregators import Mean
from starling.algorithms.aggregators.krum import MultiKrum
from starling.algorithms.api import Algorithm, AllReduce, Layout, Node, Start, Train, Wait, all_reduce_bytes
from starling.algorithms.low_communication.diloco import DiLoCo


class Vector(Task):
    """A vector of ``size`` trainable values, a step on which takes ``step_s`` seconds and no core."""

    size: PositiveInt
    step_s: NonNegativeFloat = 0.0

    def train_samples(self, num_nodes: int) -> Samples:
        return TensorSamples(torch.zeros(max(num_nodes, 2), 1))

    def validation_samples(self, num_nodes: int) -> Samples:
        return TensorSamples(torch.zeros(1, 1))

    def build(self) -> nn.Module:
        module = nn.Module()
        module.register_parameter("vector", nn.Parameter(torch.zeros(self.size)))
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        time.sleep(self.step_s)
        return cast("Tensor", module.vector)[0] * 0 + batch[0].sum()


class Filled(Vector):
    """A vector of values that all differ, and that a step moves towards zero."""

    def build(self) -> nn.Module:
        module = nn.Module()
        start = torch.randn(self.size, generator=torch.Generator().manual_seed(0))
        module.register_parameter("vector", nn.Parameter(start))
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return cast("Tensor", module.vector).square().sum() / 2 + batch[0].sum()


class ExchangeOnly(Algorithm):
    """A round is one AllReduce of the parameters and nothing else."""

    timed: bool = False
    """Print the operation's seconds to the node's log."""

    async def round(self, node: Node) -> None:
        began = node.now
        await AllReduce(node.parameters)
        if self.timed:
            print(f"all_reduce {node.now - began:.6f}")  # how a program hands figures to a benchmark

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return all_reduce_bytes(layout.nbytes, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 1


class Comparing(ExchangeOnly):
    """Each second round's AllReduce measures contributions before it adds up all of them."""

    timed: bool = True

    async def round(self, node: Node) -> None:
        aggregator = Mean() if node.round % 2 else MultiKrum(f=0)
        began = node.now
        await AllReduce(node.parameters, aggregator=aggregator)
        print(f"all_reduce {node.now - began:.6f}")

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return all_reduce_bytes(layout.nbytes, num_nodes, aggregator=MultiKrum(f=0))


class Plain(Algorithm):
    """A round is ``steps`` steps and nothing else."""

    replicated: ClassVar[bool] = False

    steps: PositiveInt

    async def round(self, node: Node) -> None:
        await Train(steps=self.steps)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps


class Overlapped(Algorithm):
    """A round is an AllReduce of ``size`` values and a step: one of them, one after the other, or at once."""

    size: PositiveInt
    how: Literal["exchange", "train", "sequential", "overlapped"]

    def init(self, node: Node) -> None:
        node.local["x"] = torch.zeros(self.size)

    async def round(self, node: Node) -> None:
        x: Any = node.local["x"]
        if self.how == "overlapped":
            handle = await Start(AllReduce(x))
            await Train(steps=1)
            await Wait(handle)
            return
        if self.how != "exchange":
            await Train(steps=1)
        if self.how != "train":
            await AllReduce(x)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0 if self.how == "train" else all_reduce_bytes(4 * self.size, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 0 if self.how == "exchange" else 1


class Alternating(DiLoCo):
    """DiLoCo whose processes, in odd rounds, make no digests and no copies to go back to. For runs without losses."""

    def init(self, node: Node) -> None:
        super().init(node)
        _make_switchable()

    async def round(self, node: Node) -> None:
        global _is_elastic  # noqa: PLW0603 - of this process, as what it switches
        _is_elastic = node.round % 2 == 0
        await super().round(node)


_is_elastic = True
"""Whether the round that was begun last has what elasticity needs."""


def _make_switchable() -> None:
    digest, commit = StagedState.digest, Slab.commit

    def digest_or_not(state: StagedState) -> str:
        return digest(state) if _is_elastic else "none"

    def commit_or_not(slab: Slab, start: int, stop: int) -> None:
        # Made when the next round begins, and counted there: even ones come after odd ones.
        if not _is_elastic:
            commit(slab, start, stop)

    StagedState.digest, Slab.commit = digest_or_not, commit_or_not
