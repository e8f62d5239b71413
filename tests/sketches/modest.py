"""MoDeST: a small sample of the nodes trains in each round, and no server chooses it.

In round k all nodes order those that they know by hash(id, k); the first s that answer a ping are the sample S(k), the
first a of these its aggregators. An aggregator collects ⌊sf·s⌋ models of round k - 1, and sends their mean to all of
S(k); each trains it and sends the result to the aggregators of k + 1. Messages carry what the sender knows of all
nodes: the latest of each node's own statements whether it is in, by counter, and when it was last heard of.

A round of a node is one message, or its part in round 0. A node trains to the end what it has begun, also where a
later model is in its mailbox. Statements that a node joins or leaves are here the initial registry alone.
Reference: de Vos et al., "Decentralized Learning Made Practical with Client Sampling", 2023, arXiv:2302.13837 (later
called Plexus), and the authors' code for defaults.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from starling.algorithms.api import Algorithm, Layout, Message, Node, Ping, Receive, Send, Timeout, Train

TRAINED, AGGREGATED = 0, 1


class MoDeST(Algorithm):
    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    result: ClassVar[Literal["mean", "last"]] = "last"

    sample_size: PositiveInt = 10  # s
    num_aggregators: PositiveInt = 1  # a
    success_fraction: float = Field(default=1.0, gt=0, le=1)  # sf
    ping_timeout_s: PositiveFloat = 5.0  # Δt
    activity_window: PositiveInt = 50  # Δk, rounds
    aggregation_timeout_s: PositiveFloat = 300.0  # after the first model
    steps: PositiveInt = 5
    num_registered: NonNegativeInt = 0  # ids in the initial registry; 0: the members

    def init(self, node: Node) -> None:
        node.local["mean"] = node.parameters.clone()  # the last that this node was sent
        node.local["round"] = -1  # the last in which this node trained
        node.local["aggregated"] = -1  # the last for which it has aggregated
        node.local["models"] = {}  # by sender, of those that it aggregates next
        node.local["deadline_s"] = None
        node.local["counters"] = node.local["activity"] = None

    async def round(self, node: Node) -> None:
        if node.local["counters"] is None:
            count = self.num_registered or len(node.view.members)
            node.local["counters"] = torch.ones(count, dtype=torch.int64)
            node.local["activity"] = torch.zeros(count, dtype=torch.int64)
            if node.id in await self.sample(node, 0, self.sample_size):
                await self._train(node, 0)
            return
        got = await Receive(until_s=cast("float | None", node.local["deadline_s"]))
        if isinstance(got, Timeout):
            await self._aggregate(node)
        if not isinstance(got, Message):
            return
        payload = cast("dict[str, Any]", got.payload)
        self._merge(node, payload, got.sender)
        number = cast("int", payload["round"])
        if payload["kind"] == AGGREGATED and number > cast("int", node.local["round"]):
            node.parameters.copy_(payload["model"])
            node.local["mean"] = payload["model"]
            await self._train(node, number)
        elif payload["kind"] == TRAINED and number > cast("int", node.local["aggregated"]):
            await self._collect(node, got.sender, number, payload["model"])

    def model(self, node: Node) -> Tensor:
        return cast("Tensor", node.local["mean"])

    async def _train(self, node: Node, number: int) -> None:
        """Train in round k, and hand on to the aggregators of k + 1."""
        node.local["round"] = number
        await Train(steps=self.steps)
        for aggregator in await self.sample(node, number + 1, self.num_aggregators):
            await Send(aggregator, self._message(node, TRAINED, number + 1, node.parameters))

    async def _collect(self, node: Node, sender: int, number: int, model: Tensor) -> None:
        models = cast("dict[str, Any]", node.local["models"])
        if any(one["round"] > number for one in models.values()):
            return  # of a round that is past
        models = {key: one for key, one in models.items() if one["round"] == number}
        if not models:
            node.local["deadline_s"] = node.now + self.aggregation_timeout_s
        node.local["models"] = models | {str(sender): {"round": number, "model": model}}
        if len(models) + 1 >= max(1, int(self.success_fraction * self.sample_size)):
            await self._aggregate(node)

    async def _aggregate(self, node: Node) -> None:
        models = cast("dict[str, Any]", node.local["models"])
        number = next(iter(models.values()))["round"]
        ordered = [models[key]["model"] for key in sorted(models, key=int)]
        mean = torch.stack(ordered).mean(0)
        node.local["aggregated"], node.local["models"], node.local["deadline_s"] = number, {}, None
        for member in await self.sample(node, number, self.sample_size):
            await Send(member, self._message(node, AGGREGATED, number, mean))

    # --- who is known, and who is there ------------------------------------------------------------------------------

    async def sample(self, node: Node, number: int, size: int) -> list[int]:
        """The first ``size`` of the round's order that answer."""
        candidates = self.order(node, number)
        live: list[int] = []
        asked = 0
        while len(live) < size and asked < len(candidates):
            batch = candidates[asked : asked + size - len(live)]
            asked += len(batch)
            others = tuple(one for one in batch if one != node.id)
            answers = await Ping(others, self.ping_timeout_s) if others else frozenset[int]()
            live += [one for one in batch if one in answers or one == node.id]
        return live

    def order(self, node: Node, number: int) -> list[int]:
        """All that are in and were heard of lately, by hash."""
        counters, activity = cast("Tensor", node.local["counters"]), cast("Tensor", node.local["activity"])
        heard = (counters > 0) & (activity >= number - self.activity_window)
        heard[node.id] = True
        known: list[int] = heard.nonzero().flatten().tolist()
        return sorted(known, key=lambda one: hashlib.blake2b(f"{one}-{number}".encode()).digest())

    def _message(self, node: Node, kind: int, number: int, model: Tensor) -> dict[str, Tensor | float]:
        counters, activity = cast("Tensor", node.local["counters"]), cast("Tensor", node.local["activity"])
        return {"kind": kind, "round": number, "model": model, "counters": counters, "activity": activity}

    @staticmethod
    def _merge(node: Node, payload: dict[str, Any], sender: int) -> None:
        """Of each node its own latest statement: the one with the larger counter, negative for "leaves"."""
        mine, theirs = cast("Tensor", node.local["counters"]), payload["counters"]
        node.local["counters"] = torch.where(theirs.abs() > mine.abs(), theirs, mine)
        activity = torch.maximum(cast("Tensor", node.local["activity"]), payload["activity"])
        activity[sender] = max(int(activity[sender]), payload["round"])
        node.local["activity"] = activity

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (layout.nbytes + 16 * (self.num_registered or num_nodes) + 16)  # each round, one message

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.steps
