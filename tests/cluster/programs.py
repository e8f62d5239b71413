"""Algorithms and tasks that a user might bring, for tests of the Ray runtime; imported on the nodes."""

import os
import signal
import time
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.tasks import Samples, Task, TensorSamples
from starling.algorithms.api import Algorithm, AllGather, AllReduce, Layout, Node, Train


class Base(Algorithm):
    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 1


class Gathering(Base):
    """Gathers payloads of different sizes, and adds them up in the order of the nodes."""

    sizes: tuple[PositiveInt, ...] = (10, 20, 30, 40)

    def init(self, node: Node) -> None:
        node.shared["total"] = torch.zeros(())

    async def round(self, node: Node) -> None:
        await Train(steps=1)
        values = node.parameters[: self.sizes[node.id % len(self.sizes)]].clone()
        everyone = await AllGather({"values": values, "scale": 0.5 + node.id, "id": float(node.id)})
        total = node.shared["total"]
        for member, payload in everyone.items():
            assert payload["id"] == member
            total = total + payload["values"].sum() * payload["scale"]
        node.shared["total"] = total
        mean = await AllReduce({"b": node.parameters, "a": total.reshape(1)}, weight=1.0 + node.id)
        node.parameters.copy_(mean.value["b"] + mean.value["a"] * 1e-3)


class Dying(Base):
    """One node's process is killed in the middle of a round."""

    victim: int = 2
    round_number: int = 1

    async def round(self, node: Node) -> None:
        if (node.id, node.round, node.incarnation) == (self.victim, self.round_number, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        await AllReduce(node.parameters)


class Environment(Base):
    """Prints what a node sees of its machine."""

    async def round(self, node: Node) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        print(f"CUDA_VISIBLE_DEVICES={visible!r} threads={torch.get_num_threads()}")  # noqa: T201 - it is the test
        await AllReduce(node.parameters)


class Endless(Base):
    """Rounds that take a while."""

    seconds: float = 0.2

    async def round(self, node: Node) -> None:
        time.sleep(self.seconds)  # noqa: ASYNC251 - there is no event loop; it stands for compute
        await AllReduce(node.parameters)


class Paced(Base):
    """Rounds that take a while until there is a file, and none after that; counts those that a node has done."""

    seconds: float = 0.4
    until: str

    def init(self, node: Node) -> None:
        node.shared["mean"] = node.parameters.clone()
        node.local["done"] = 0

    async def round(self, node: Node) -> None:
        await Train(steps=1)
        node.local["done"] = node.local["done"] + 1
        print(f"done {node.local['done']} in round {node.round}")  # noqa: T201 - tests read it
        # There is no event loop; it stands for compute.
        if not Path(self.until).exists():  # noqa: ASYNC240
            time.sleep(self.seconds)  # noqa: ASYNC251
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value)
        node.shared["mean"] = mean.value.clone()


class Meeting(Base):
    """Several runs begin each round together, each of whose nodes are in one process."""

    folder: str
    runs: int

    async def round(self, node: Node) -> None:
        here = Path(self.folder)
        (here / f"{node.round}-{os.getpid()}").touch()
        limit = time.monotonic() + 60
        while len(list(here.glob(f"{node.round}-*"))) < self.runs and time.monotonic() < limit:  # noqa: ASYNC240
            time.sleep(0.01)  # noqa: ASYNC251
        await Train(steps=5)
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value)


class Faulty(Task):
    """A task whose loss raises on one node's data."""

    def train_samples(self, num_nodes: int) -> Samples:
        owners = torch.arange(num_nodes).repeat_interleave(4)
        return TensorSamples(owners.float().unsqueeze(1), owners=owners)

    def validation_samples(self, num_nodes: int) -> Samples:
        return TensorSamples(torch.zeros(2, 1))

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        if module.training and batch[0][0, 0] == 1:
            raise ZeroDivisionError("the user's mistake")
        return module(batch[0]).square().mean()


class Drifting(Faulty):
    """A task whose data are read a little differently while a file is there, as by another version of a decoder."""

    marker: str

    def train_samples(self, num_nodes: int) -> Samples:
        off = 1e-3 if Path(self.marker).exists() else 0.0
        return TensorSamples(torch.arange(64.0).unsqueeze(1) / 64 + off)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return module(batch[0]).square().mean()


class Divided(Faulty):
    """A task that divides its data at random, in each process otherwise."""

    def train_samples(self, num_nodes: int) -> Samples:
        values = torch.frombuffer(bytearray(os.urandom(40)), dtype=torch.uint8).float().unsqueeze(1)
        return TensorSamples(values)
