"""Programs that use one operation each in ways that show; both runtimes run them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from starling.algorithms.api import (
    SERVER,
    Algorithm,
    AllGather,
    AllReduce,
    Batch,
    Evaluate,
    Gradient,
    Left,
    Loss,
    Message,
    NeighborAllGather,
    Node,
    NodeId,
    Ping,
    Receive,
    Send,
    Sleep,
    Start,
    Timeout,
    Train,
    View,
    Wait,
)
from starling.algorithms.closing.base import FirstK
from starling.algorithms.topologies import Ring, Topology
from tests.toys import Program


class Gossiping(Program):
    """Mixes with its neighbours; payloads of a size that travels inline, or in parts."""

    replicated: ClassVar[bool] = False
    topology: Topology = Ring()
    values: int = 3

    def init(self, node: Node) -> None:
        node.local["x"] = torch.full((self.values,), float(node.id))

    async def round(self, node: Node) -> None:
        own: Any = node.local["x"]
        inbox = await NeighborAllGather(own, self.topology)
        assert node.id not in inbox.payloads
        assert list(inbox.weights) == sorted(inbox.weights)
        node.local["x"] = inbox.mix(own)
        node.local["senders"] = list(inbox.payloads)
        node.parameters.fill_(float(inbox.mix(own)[0]))


class Overlapping(Program):
    """Starts an exchange of each kind, trains, and waits for them in another order."""

    values: int = 4

    def init(self, node: Node) -> None:
        node.shared["x"] = torch.zeros(self.values)

    async def round(self, node: Node) -> None:
        own = torch.full((self.values,), float(node.id))
        parameters = node.parameters.clone()
        sums = await Start(AllReduce({"own": own, "parameters": node.parameters}))
        names = await Start(AllGather(float(node.id)))
        await Train(steps=1)
        gathered = await Wait(names)
        assert gathered == {member: float(member) for member in node.view.members}
        between = await AllReduce(own * 2)
        reduced = await Wait(sums)
        assert torch.equal(between.value, reduced.value["own"] * 2)
        assert torch.allclose(reduced.value["parameters"], parameters)  # they were taken at the start
        node.shared["x"] = reduced.value["own"]
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value)


class Mailing(Program):
    """Sends what it has to the next node, in each round; the first node sends itself a letter too."""

    replicated: ClassVar[bool] = False
    values: int = 3

    async def round(self, node: Node) -> None:
        members = node.view.members
        to = members[(members.index(node.id) + 1) % len(members)]
        await Send(to, {"x": torch.full((self.values,), float(node.id)), "n": node.round})
        got = await Receive()
        assert isinstance(got, Message)
        assert isinstance(got.payload, dict)
        assert got.payload["n"] == node.round
        assert got.staleness == 0
        node.local["from"] = got.sender
        x: Any = got.payload["x"]
        node.parameters.fill_(float(x[0]))
        assert isinstance(await Receive(until_s=node.now + 0.2), Timeout)


class Pinging(Program):
    """Asks who is there."""

    replicated: ClassVar[bool] = False

    async def round(self, node: Node) -> None:
        answered = await Ping((*node.view.members, 99), timeout_s=0.5)
        node.local["answered"] = sorted(answered)


class Computing(Program):
    """Every operation that a node carries out by itself."""

    replicated: ClassVar[bool] = False

    async def round(self, node: Node) -> None:
        before = node.now
        await Sleep(0.05)
        assert node.now - before > 0.049  # but for rounding
        batch = await Batch(size=4)
        part = await Batch(part=node.view.members[0])
        gradient = await Gradient(batch=batch)
        there = node.parameters - 0.1 * gradient.gradient
        losses = [await Loss(batch=batch), await Loss(at=there, batch=batch)]
        assert losses[1] < losses[0]
        assert abs(losses[0] - gradient.loss) < 1e-6
        metrics = await Evaluate(at=there)
        node.local["loss"] = metrics["loss"]
        node.local["part"] = part.tensors[0]
        node.parameters.copy_(there)


class Training(Program):
    """Trains some of the parameters on small batches at a lower rate, and reports how far it went."""

    async def round(self, node: Node) -> None:
        before = node.parameters.clone()
        chosen = node.layout.entries[0]
        await Train(steps=2, batch_size=3, lr_factor=0.5, only=(chosen.name,))
        moved = node.parameters != before
        assert moved[chosen.start : chosen.stop].any()
        assert not moved[chosen.stop :].any()
        node.report(moved=(node.parameters - before).norm().item(), node=node.id)
        node.parameters.copy_((await AllReduce(node.parameters)).value)


class Hasty(Program):
    """Goes on with the first that arrive; one node is slow."""

    first: int = 2
    seconds: float = 30.0

    def init(self, node: Node) -> None:
        node.shared["count"] = 0

    async def round(self, node: Node) -> None:
        await Sleep(self.seconds if node.id == node.view.members[-1] else 0.0)
        got = await AllReduce(torch.ones(2), close=FirstK(k=self.first))
        count: Any = node.shared["count"]
        node.shared["count"] = count + len(got.members)
        node.parameters.add_(float(len(got.members)))


class InTurn(Program):
    """Takes a round of each part by turns: one run, and its processes, for all of them."""

    replicated: ClassVar[bool] = False
    parts: tuple[Algorithm, ...]

    def init(self, node: Node) -> None:
        node.shared["start"] = node.parameters.clone()
        for part in self.parts:
            part.init(node)

    async def round(self, node: Node) -> None:
        await self.parts[node.round % len(self.parts)].round(node)
        # Each begins with parameters that all have alike, near the initial ones, and shows what the last one made.
        mean = await AllReduce(node.parameters)
        start: Any = node.shared["start"]
        start = start + 1e-3 * torch.tanh(mean.value)
        node.shared["start"] = start
        node.parameters.copy_(start)


class Changing(Program):
    """Counts changes of membership in its shared state; takes part by turns."""

    def init(self, node: Node) -> None:
        node.shared["changes"] = 0

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        return (view.members[int(torch.randint(len(view.members), (1,), generator=rng))],)

    async def on_view_change(self, node: Node) -> None:
        changes: Any = node.shared["changes"]
        members = await AllGather(float(node.id))
        assert tuple(members) == node.view.members
        node.shared["changes"] = changes + 1

    async def round(self, node: Node) -> None:
        mean = await AllReduce(torch.full((2,), float(node.id)) if node.participates else None)
        assert len(mean.members) == 1


class Counting(Program):
    """Asynchronous: every node adds to what the server holds, and takes a copy."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    values: int = 3
    large: int = 0

    def init(self, node: Node) -> None:
        node.local["total"] = torch.zeros(self.values + self.large)

    async def round(self, node: Node) -> None:
        report = await Train(steps=1 + node.id)
        one = torch.full((self.values + self.large,), float(node.id + 1))
        await Send(SERVER, {"x": one, "seconds": report.seconds, "now": node.now})
        answer = await Receive()
        assert isinstance(answer, Message)
        assert isinstance(answer.payload, Tensor)
        node.local["total"] = answer.payload

    async def server(self, node: Node) -> None:
        got = await Receive()
        if isinstance(got, Left):
            node.local["left"] = got.node
            return
        assert isinstance(got, Message)
        assert isinstance(got.payload, dict)
        total: Any = node.local["total"]
        x: Any = got.payload["x"]
        # The order of arrival, staleness and times all show in the result.
        total = 0.5 * total + x + 0.01 * got.staleness + 1e-3 * float(got.payload["seconds"])
        node.local["total"] = total
        node.parameters.fill_(float(total[0]))
        await Send(got.sender, total)


class Passing(Program):
    """Asynchronous without a server: one token goes round."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    result: ClassVar[Any] = "last"

    async def round(self, node: Node) -> None:
        members = node.view.members
        place = members.index(node.id)
        count = 0.0
        if place or node.round:
            got = await Receive()
            assert isinstance(got, Message)
            assert isinstance(got.payload, float)
            count = got.payload
        await Train(steps=1)
        node.parameters.fill_(count)
        await Send(members[(place + 1) % len(members)], count + 1)
