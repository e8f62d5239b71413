"""Programs that remember what they draw, and how often each sample is committed by the word of a data ledger."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from starling.actors.data import Epoch, EpochSampler, blocks_of
from starling.actors.data.samplers import BlockDraws
from starling.actors.host.build import load_data
from starling.actors.tasks import Task, TensorSamples
from starling.algorithms.api import Algorithm, AllReduce, Batch, Layout, Node, Sleep

if TYPE_CHECKING:
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.sample_ledger import DataLedger


class Numbered(Task):
    """Samples that are their own numbers."""

    num_samples: int = 40
    owned: bool = False  # each node has samples of its own, by their numbers

    def train_samples(self, num_nodes: int) -> TensorSamples:
        numbers = torch.arange(self.num_samples)
        return TensorSamples(numbers.float()[:, None], numbers, owners=numbers % num_nodes if self.owned else None)

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        del num_nodes
        return TensorSamples(torch.zeros(1, 1), torch.zeros(1))

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (0 * module(batch[0])).sum()


class Program(Algorithm):
    """What every algorithm must have."""

    def init(self, node: Node) -> None:
        node.local["drawn"] = []

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 1


class Draws(Program):
    """Draws in three places of a round, and remembers what; exchanges between, in parts or small."""

    large: bool = False
    seconds: float = 0.0  # a round takes at least

    async def round(self, node: Node) -> None:
        drawn: list[int] = []
        for _ in range(2):
            drawn += (await Batch()).tensors[1].tolist()
            await AllReduce(torch.ones(40_000 if self.large else 1))
        drawn += (await Batch()).tensors[1].tolist()
        node.local["drawn"] = drawn
        print(node.round, *drawn)  # noqa: T201 - goes to the node's log
        if self.seconds:
            await Sleep(self.seconds)


class DrawsAlone(Program):
    """The same without a barrier."""

    synchronous: ClassVar[bool] = False
    replicated: ClassVar[bool] = False

    async def round(self, node: Node) -> None:
        drawn: list[int] = []
        for _ in range(3):
            drawn += (await Batch()).tensors[1].tolist()
            await Sleep(0.01 * (1 + node.id % 3))
        node.local["drawn"] = drawn


def rest(ledger: DataLedger) -> list[tuple[int, int, int, int]]:
    """Ranges of which a node's own place says that they are drawn, and which are with others, or with nobody."""
    state = ledger.to_json()
    handed = [tuple(segment) for node in map(int, state["extras"]) for segment in ledger.rest(node)]
    return handed + [tuple(segment) for segment in state["pool"]]


def num_complete(ledger: DataLedger) -> int:
    """Epochs of which nothing is to be drawn any more."""
    opened = [ledger.position(part).epoch for part in range(len(ledger.to_json()["sizes"]))]
    return min([*opened, *(epoch for _, epoch, _, _ in rest(ledger))])


def expected(ledger: DataLedger, config: Config) -> Counter[int]:
    """How often each sample was committed."""
    num_parts = len(ledger.to_json()["sizes"])
    data = load_data(config.task, config.data, num_parts, config.seed)

    def numbers(part: int, epoch: int, start: int, stop: int) -> list[int]:
        if start == stop:
            return []
        order = Epoch().begin(data.parts[part], config.seed, part, blocks_of(data.train))
        assert isinstance(order, EpochSampler | BlockDraws)
        return data.train.batch(torch.from_numpy(order.read(epoch, start, stop - start)))[1].tolist()

    count: Counter[int] = Counter()
    for part in range(num_parts):
        position = ledger.position(part)
        for epoch in range(position.epoch):
            count.update(numbers(part, epoch, 0, len(data.parts[part])))
        count.update(numbers(part, position.epoch, 0, position.offset))
    for segment in rest(ledger):
        count.subtract(numbers(*segment))
    return +count
