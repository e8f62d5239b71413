"""Algorithms that do what ours do not, and remember what a check needs; and a task whose nodes' losses are unequal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from starling.actors.tasks import Task, TensorSamples
from starling.algorithms.api import (
    SERVER,
    Algorithm,
    AllGather,
    AllReduce,
    Batch,
    Gradient,
    Layout,
    Left,
    Message,
    NeighborAllGather,
    Node,
    Receive,
    Send,
    Start,
    Timeout,
    Train,
    View,
    Wait,
)
from starling.algorithms.closing import ClosePolicy, Quorum
from starling.algorithms.codecs import Codec, Identity
from starling.algorithms.seeds import generator
from starling.algorithms.topologies import Ring, Topology

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId

LARGE = 20_000
"""Values that travel in parts."""


class Norm(nn.BatchNorm1d):
    """Batch norm that lets a batch of one pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input) if len(input) > 1 else input


class Unequal(Task):
    """Least squares; samples are their own numbers, and every one has another target, some far away."""

    num_samples: int = 37
    width: int = 3  # 3000: the model travels in parts
    batch_norm: bool = False
    dropout: bool = False

    def train_samples(self, num_nodes: int) -> TensorSamples:
        rng = generator("unequal")
        inputs = torch.randn(self.num_samples, 6, generator=rng)
        targets = torch.randn(self.num_samples, generator=rng) * torch.logspace(-1, 1, self.num_samples)
        return TensorSamples(inputs, torch.arange(self.num_samples), targets)

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        return self.train_samples(num_nodes)

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(6, self.width)]
        layers += [Norm(self.width)] if self.batch_norm else []
        layers += [nn.Dropout(0.5)] if self.dropout else []
        return nn.Sequential(*layers)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, _, targets = batch
        return 0.1 * (module(inputs).mean(dim=1) - targets).square().mean()


class Program(Algorithm):
    """What every algorithm must have."""

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 1


async def _numbers() -> list[int]:
    batch = await Batch()
    await Gradient(batch=batch)
    return batch.tensors[1].tolist()


class Drawing(Program):
    """Draws between exchanges of all kinds; who takes part is chosen anew in each round."""

    large: bool = False
    close: ClosePolicy = Quorum()
    codec: Codec = Identity()
    fraction: float = 1.0
    topology: Topology = Ring()

    def init(self, node: Node) -> None:
        node.local["drawn"] = []
        node.shared["sum"] = torch.zeros(3)

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        chosen = torch.rand(len(view.members), generator=rng) <= self.fraction
        return tuple(node for node, is_in in zip(view.members, chosen, strict=True) if is_in) or view.members[:1]

    async def round(self, node: Node) -> None:
        size = LARGE if self.large else 3
        drawn = await _numbers()
        noise = torch.randn(size, generator=node.rng("noise"))
        first = await AllReduce(noise if node.participates else None, codec=self.codec, close=self.close)
        drawn += await _numbers()
        inbox = await NeighborAllGather({"x": noise, "count": len(drawn)}, self.topology, self.close)
        drawn += await _numbers()
        node.parameters.add_(0.01 * inbox.mix(noise, "x")[0])
        last = await AllReduce({"parameters": node.parameters, "x": first.value}, weight=1.0 + node.id)
        node.parameters.copy_(last.value["parameters"])
        node.shared["sum"] = cast("Tensor", node.shared["sum"]) + last.value["x"][:3]
        node.local["drawn"] = drawn


class Mixer(Program):
    """Gossip of parameters that move by 1 before each exchange: what comes out can be worked out from the log."""

    replicated: ClassVar[bool] = False

    topology: Topology = Ring()
    close: ClosePolicy = Quorum()
    started: bool = False

    def init(self, node: Node) -> None:
        node.parameters.copy_(torch.randn(node.parameters.shape, generator=generator("mixer", node.id)))

    async def round(self, node: Node) -> None:
        await Gradient()
        node.parameters.add_(1.0)
        operation = NeighborAllGather(node.parameters, self.topology, self.close)
        if not self.started:
            node.parameters.copy_((await operation).mix(node.parameters))
            return
        own = node.parameters.clone()
        handle = await Start(operation)
        await Gradient()
        node.parameters.copy_((await Wait(handle)).mix(own))


class Overlapping(Program):
    """Two exchanges at once, waited for in the other order, while the node trains on what it contributes."""

    close: ClosePolicy = Quorum()

    def init(self, node: Node) -> None:
        node.shared["total"] = 0.0
        node.shared["seen"] = []

    async def on_view_change(self, node: Node) -> None:
        total = await AllReduce(torch.tensor([float(node.id)]))
        node.shared["total"] = float(total.value)

    async def join(self, node: Node) -> None:
        node.local["joined"] = node.round

    async def round(self, node: Node) -> None:
        await Train(steps=1)
        first = await Start(AllReduce(node.parameters, close=self.close))
        second = await Start(AllGather({"x": torch.tensor([float(node.id)]), "n": node.round}, close=self.close))
        await Train(steps=2)
        seen = await Wait(second)
        mean = await Wait(first)
        node.shared["seen"] = sorted(seen)
        node.shared["total"] = cast("float", node.shared["total"]) + float(mean.value.double().sum())
        node.parameters.copy_(mean.value)


class Letters(Program):
    """Each tells the next, and all agree on what was told."""

    large: bool = False
    patience_s: float = 0.3

    def init(self, node: Node) -> None:
        node.shared["told"] = torch.zeros(2)

    async def round(self, node: Node) -> None:
        members, place = node.view.members, node.view.members.index(node.id)
        before = members[place - 1]
        await Train(steps=1)
        await Send(members[(place + 1) % len(members)], {"x": torch.full((LARGE if self.large else 2,), node.id)})
        until, told = node.now + self.patience_s, torch.zeros(2)
        while not isinstance(what := await Receive(until), Timeout):
            if isinstance(what, Message):
                told = cast("dict[str, Tensor]", what.payload)["x"][:2] + 1.0
                break
            if what.node == before:
                break
        mean = await AllReduce({"told": told, "parameters": node.parameters})
        node.shared["told"] = mean.value["told"]
        node.parameters.copy_(mean.value["parameters"])


class Drifting(Program):
    """Now and then a node's shared state is not that of the others."""

    chance: float = 0.05

    def init(self, node: Node) -> None:
        node.shared["sum"] = torch.zeros(2)

    async def round(self, node: Node) -> None:
        mean = await AllReduce(torch.ones(2))
        wrong = float(torch.rand((), generator=node.rng("wrong"))) < self.chance
        node.shared["sum"] = cast("Tensor", node.shared["sum"]) + mean.value + wrong


class Chatter(Program):
    """Workers and a server, both with limits to how long they wait."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    large: bool = False
    patience_s: float = 0.2

    def init(self, node: Node) -> None:
        node.local["drawn"] = []
        node.local["waiting"] = []

    async def round(self, node: Node) -> None:
        drawn = await _numbers() + await _numbers()
        await Send(SERVER, {"x": torch.full((LARGE if self.large else 2,), 1.0 + node.id), "n": node.round})
        what: Any = await Receive(node.now + 5 * self.patience_s)
        if isinstance(what, Message):
            node.parameters.copy_(cast("dict[str, Tensor]", what.payload)["parameters"])
        node.local["drawn"] = drawn + await _tail()

    async def server(self, node: Node) -> None:
        for worker in cast("list[int]", node.local["waiting"]):
            await Send(worker, {"parameters": node.parameters})
        waiting: list[int] = []
        until = node.now + self.patience_s
        while len(waiting) < 2:
            what = await Receive(until)
            if isinstance(what, Timeout):
                break
            if isinstance(what, Left):
                waiting = [one for one in waiting if one != what.node]
                continue
            waiting.append(what.sender)
            payload = cast("dict[str, Tensor]", what.payload)
            node.parameters.add_(payload["x"][0] * 0.9**what.staleness)
        node.local["waiting"] = waiting


async def _tail() -> list[int]:
    """Drawn last, which a node that is cancelled as it waits has not done."""
    return await _numbers()


class Wanderer(Program):
    """Nodes that tell somebody what they have, and take what comes in time; no server."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    patience_s: float = 0.05

    def init(self, node: Node) -> None:
        node.local["drawn"] = []

    async def round(self, node: Node) -> None:
        drawn = await _numbers()
        others = [other for other in node.view.members if other != node.id]
        if others:
            to = others[int(torch.randint(len(others), (), generator=node.rng("to")))]
            await Send(to, node.parameters)
        until = node.now + self.patience_s
        while not isinstance(what := await Receive(until), Timeout):
            if isinstance(what, Left):
                continue
            node.parameters.lerp_(cast("Tensor", what.payload), 0.5 / (1 + max(0, what.staleness)))
        node.local["drawn"] = drawn + await _tail()
