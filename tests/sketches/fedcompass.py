"""FedCompass: clients are given as many steps as let groups of them arrive together.

The server estimates each client's seconds per step s_i, and gives it Q_i in [Q_min, Q_max] steps, so that it arrives
with a group at T_g; who is not there by L_g is not waited for. When a group is complete, or L_g has come,

    x ← x - Σ_i α (1 + τ_i)^-a Δ_i / N          over its members that are there, and over late ones of other groups

Reference: Li et al., "FedCompass: Efficient Cross-Silo Federated Learning on Heterogeneous Client Devices Using a
Computing Power-Aware Scheduler", ICLR 2024, arXiv:2309.14675, and the authors' APPFL; λ is that of its configuration.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from starling.algorithms.api import SERVER, Algorithm, Layout, Left, Message, Node, Receive, Send, Timeout, Train


@dataclass
class Client:
    """What the server knows of one."""

    steps: int  # Q_i
    started: float
    speed: float = 0.0  # s_i, seconds per step; 0: not known
    group: int = -1  # -1: none


@dataclass
class Group:
    """Clients that are to arrive together."""

    expected: float  # T_g
    latest: float  # L_g; 0: it is over, and who arrives now is late
    running: list[int] = field(default_factory=list)  # C_g
    arrived: list[int] = field(default_factory=list)  # A_g


@dataclass
class Scheduler:
    """Who is in which group, and how many steps each is given."""

    min_steps: int
    max_steps: int
    slack: float  # λ
    clients: dict[int, Client] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)

    def measure(self, client: int, now: float) -> None:
        one = self.clients[client]
        speed = (now - one.started) / one.steps
        one.speed = 0.1 * one.speed + 0.9 * speed if one.speed else speed

    def assign(self, client: int, now: float) -> int:
        """AssignGroup: join the group that leaves time for most steps, or else make one."""
        one = self.clients[client]
        fits = {key: _whole((group.expected - now) / one.speed) for key, group in self.groups.items() if group.latest}
        fits = {key: steps for key, steps in fits.items() if self.min_steps <= steps <= self.max_steps}
        if fits:
            one.group = max(fits, key=fits.__getitem__)
            one.steps = fits[one.group]
        else:
            one.group, one.steps = max(self.groups, default=-1) + 1, self._steps_alone(one, now)
            duration = one.steps * one.speed
            self.groups[one.group] = Group(now + duration, now + self.slack * duration)
        self.groups[one.group].running.append(client)
        one.started = now
        return one.steps

    def _steps_alone(self, one: Client, now: float) -> int:
        """So many that it arrives with the next round of some group."""
        ends = [
            group.latest + min(self.clients[client].speed for client in group.running + group.arrived) * self.max_steps
            for group in self.groups.values()
            if group.latest > now
        ]
        options = [steps for end in ends if (steps := _whole((end - now) / one.speed)) <= self.max_steps]
        return max(*options, self.min_steps) if options else self.max_steps

    def next_timer(self) -> float | None:
        return min((group.latest for group in self.groups.values() if group.latest), default=None)

    def close(self, key: int) -> list[int]:
        """Nobody joins the group any more; those that have arrived leave it, the fastest first."""
        group = self.groups[key]
        arrived, group.arrived, group.latest = group.arrived, [], 0.0
        self._drop_if_empty(key)
        return sorted(arrived, key=lambda client: self.clients[client].speed)

    def leave(self, client: int) -> None:
        key = self.clients[client].group
        if key in self.groups and client in self.groups[key].running:
            self.groups[key].running.remove(client)
            self._drop_if_empty(key)

    def _drop_if_empty(self, key: int) -> None:
        if not self.groups[key].running and not self.groups[key].arrived:
            del self.groups[key]

    # --- between rounds it is in node.local, which holds plain data with texts for keys ------------------------------

    def save(self, node: Node) -> None:
        node.local["clients"] = {str(key): cast("Any", asdict(one)) for key, one in self.clients.items()}
        node.local["groups"] = {str(key): cast("Any", asdict(one)) for key, one in self.groups.items()}

    def load(self, node: Node) -> Scheduler:
        clients, groups = cast("dict[str, Any]", node.local["clients"]), cast("dict[str, Any]", node.local["groups"])
        self.clients = {int(key): Client(**one) for key, one in clients.items()}
        self.groups = {
            int(key): Group(one["expected"], one["latest"], list(one["running"]), list(one["arrived"]))
            for key, one in groups.items()
        }
        return self


class FedCompass(Algorithm):
    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    min_steps: PositiveInt = 20  # Q_min
    max_steps: PositiveInt = 100  # Q_max
    slack: float = Field(default=1.5, gt=1)  # λ
    lr: PositiveFloat = 0.9  # α
    staleness_exponent: NonNegativeFloat = 0.5  # a

    def init(self, node: Node) -> None:
        node.local["steps"] = self.max_steps
        node.local["clients"] = {}
        node.local["groups"] = {}
        node.local["updates"] = []  # of those that have arrived, to be aggregated
        node.local["owed"] = []  # clients that get the model of the round that begins
        node.local["log"] = []

    async def round(self, node: Node) -> None:
        given = node.parameters.clone()
        await Train(steps=cast("int", node.local["steps"]))
        await Send(SERVER, given - node.parameters)
        while not isinstance(answer := await Receive(), Message):
            pass
        payload = cast("dict[str, Any]", answer.payload)
        node.parameters.copy_(payload["model"])
        node.local["steps"] = payload["steps"]

    async def server(self, node: Node) -> None:
        """Up to the next aggregation."""
        scheduler = Scheduler(self.min_steps, self.max_steps, self.slack).load(node)
        for client in node.view.members:
            scheduler.clients.setdefault(client, Client(self.max_steps, node.now))
        updates = list(cast("list[Any]", node.local["updates"]))
        for client in cast("list[int]", node.local["owed"]):
            await self._give(client, node, scheduler)
        closed: list[int] = []
        while not closed:
            got = await Receive(until_s=scheduler.next_timer())
            match got:
                case Left(client):
                    scheduler.leave(client)
                case Timeout():
                    for key in [key for key, group in scheduler.groups.items() if 0 < group.latest <= node.now]:
                        closed += scheduler.close(key)
                case Message(client, difference, staleness):
                    version = node.round - staleness
                    updates.append({"client": client, "version": version, "difference": cast("Tensor", difference)})
                    scheduler.measure(client, node.now)
                    key = scheduler.clients[client].group
                    group = scheduler.groups.get(key)
                    if key == -1:  # its first: aggregated alone
                        closed = [client]
                    elif group is None or not group.latest or node.now > group.latest:  # late
                        scheduler.leave(client)
                        await self._give(client, node, scheduler)
                    else:
                        group.running.remove(client)
                        group.arrived.append(client)
                        if not group.running:
                            closed = scheduler.close(key)
        self._aggregate(node, scheduler, updates, closed)

    async def _give(self, client: int, node: Node, scheduler: Scheduler) -> None:
        steps = scheduler.assign(client, node.now)
        await Send(client, {"model": node.parameters, "steps": steps})

    def _aggregate(self, node: Node, scheduler: Scheduler, updates: list[Any], closed: list[int]) -> None:
        """Those of the group and all late ones; members of other groups wait for theirs."""
        waiting = {client for group in scheduler.groups.values() for client in group.arrived}
        taken = [one for one in updates if one["client"] not in waiting]
        for one in taken:
            weight = self.lr * (1 + node.round - one["version"]) ** -self.staleness_exponent / len(scheduler.clients)
            node.parameters.sub_(one["difference"], alpha=weight)
        node.local["updates"] = [one for one in updates if one["client"] in waiting]
        node.local["owed"] = [*closed]
        entry = {
            "clients": [one["client"] for one in taken],
            "ages": [node.round - one["version"] for one in taken],
            "steps": [scheduler.clients[one["client"]].steps for one in taken],
        }
        node.local["log"] = [*cast("list[Any]", node.local["log"]), entry]
        scheduler.save(node)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (2 * layout.nbytes + 8)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return self.max_steps


def _whole(steps: float) -> int:
    return math.floor(steps + 1e-6)  # 99.99999 steps are 100, less the rounding of times
