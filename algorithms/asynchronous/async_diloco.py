"""Asynchronous DiLoCo: a server takes an outer step with every update, and delays its momentum.

A worker w takes n_w steps from the model that it was given, to θ_w, and sends g = θ_given - θ_w. The server steps at
once and answers with the new model. With ``rule: delayed_nesterov`` (N_b = ``buffer_size``, ε = ``lr``,
β = ``momentum``, c = ``between``; B and m begin at 0) momentum changes with every N_b-th g alone:

    B ← B + g
    every N_b-th:    m ← β m + B / N_b          θ ← θ - ε ((1 - c N_b + c) β m + g / N_b)          B ← 0
    the others:      θ ← θ - ε (c β m + g / N_b)

With c = 0 the N_b steps together are one of Nesterov's with the mean of their g. ``delayed_sgd`` waits for N_b updates
and takes that one. With ``dynamic_steps`` a worker takes n_w = ⌊H v_w / max v⌋ steps, so that none is late by much; v
are steps per second as last measured, H = ``inner_steps``.

Deviations: a worker draws its own samples. Floating-point buffers move by 1/N_b towards those of the worker. The
formulas are those of public code (halos), to the same values; the paper is unread.
Elasticity: a worker that is gone loses one update; a new one begins with the server's model. N_b by the number of
workers is that of when B was 0. The server has θ, m and B, and must not be lost.
Cost: 2·(b·P + 8) bytes for an update and its answer, b = 4 for float32; a round of the server is one update, or all
that come within ``grace_s``. State: 3·P values on the server, P on a worker.
Reference: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024, arXiv:2401.09135, Alg. 1 to 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from starling.algorithms.api import SERVER, Algorithm, Left, Message, Node, Receive, Send, Timeout, Train
from starling.algorithms.errors import SettingsError
from starling.algorithms.messages import model_of, next_message, take_model
from starling.algorithms.outer import Nesterov, tensor_in
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, NodeId


class Local(NodeState):
    steps: int  # n_w


class ServerLocal(NodeState):
    waiting: list[NodeId]  # workers that were not answered yet
    speeds: dict[str, list[float]]  # by worker: steps per second, and when they were measured
    count: int  # of updates in B
    size: int  # N_b since B was 0
    buffer: Tensor  # B
    velocity: Tensor  # m


class AsyncDiLoCo(Algorithm, name="async_diloco"):
    """DiLoCo without a barrier; see the module's docstring."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    inner_steps: PositiveInt = 50  # H, steps of the fastest worker between two exchanges; the paper's (secondary)
    rule: Literal["delayed_nesterov", "delayed_sgd"] = "delayed_nesterov"  # step with each update, or with N_b
    buffer_size: PositiveInt | None = None  # N_b, updates to a change of momentum; null: as there are workers
    between: Annotated[float, Field(ge=0, le=1)] = 0.0  # c, how much momentum steps in between have; at most 1 / N_b
    lr: PositiveFloat | None = None  # ε; null: 0.7, and 0.2 with delayed_sgd, which does not bear more
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5  # β; ours, as 0.9 is far behind it with few workers
    dynamic_steps: bool = True  # slow workers take fewer steps
    speed_timeout_s: PositiveFloat = 600.0  # after which what was measured of a worker is forgotten
    grace_s: NonNegativeFloat = 0.0  # the first of some updates is answered when these are over, or all are in

    def validate_for(self, num_nodes: int) -> None:
        super().validate_for(num_nodes)
        if self.between * (size := self.buffer_size or num_nodes) > 1 + 1e-9:
            raise SettingsError(f"algorithm.between: {self.between:g} is more than 1/{size}, one for each update")

    def init(self, node: Node) -> None:
        Local(node.local).steps = self.inner_steps
        if node.id == SERVER:
            local = ServerLocal(node.local)
            local.waiting, local.speeds, local.count, local.size = [], {}, 0, 0
            local.buffer = local.velocity = torch.zeros_like(node.parameters)

    async def round(self, node: Node) -> None:
        local, given = Local(node.local), node.parameters.clone()
        report = await Train(steps=local.steps)
        speed = report.num_steps / report.seconds if report.seconds > 0 else 0.0
        await Send(SERVER, {"update": given - node.parameters, "buffers": node.buffers, "speed": speed})
        message = await next_message()
        take_model(node, message)
        local.steps = int(message.number("steps"))

    async def server(self, node: Node) -> None:
        # Whoever waits is answered only now: in the old round it would pass for one that has heard of the old model.
        for worker in ServerLocal(node.local).waiting:
            await Send(worker, {**model_of(node), "steps": self.steps_of(node, worker)})
        waiting: list[NodeId] = []
        there, until = set(node.view.members), None
        while until is None or (self.grace_s and there.difference(waiting)):
            message = await Receive(until)
            if isinstance(message, Timeout):
                break
            if isinstance(message, Left):
                there.discard(message.node)
                continue
            until = node.now + self.grace_s if until is None else until
            waiting.append(message.sender)
            there.add(message.sender)  # it may have come since the round began
            self._apply(node, message, len(there))
        ServerLocal(node.local).waiting = waiting

    def _apply(self, node: Node, message: Message, num_workers: int) -> None:
        local, update, speed = ServerLocal(node.local), message.tensor("update"), message.number("speed")
        if speed > 0:
            local.speeds = {**local.speeds, str(message.sender): [speed, node.now]}
        buffer, count = local.buffer + update, local.count + 1
        size = self.buffer_size or (local.size if local.count else num_workers)
        full, velocity = count >= size, local.velocity
        if self.rule == "delayed_sgd":
            if full:
                nesterov = Nesterov(lr=self.step_size, momentum=self.momentum)
                step, state = nesterov.update(buffer.div(size), {"velocity": velocity})
                node.parameters.add_(step)
                velocity = tensor_in(state, "velocity")
        else:
            velocity = velocity * self.momentum + buffer / size if full else velocity
            share = 1 - self.between * size + self.between if full else self.between
            node.parameters.sub_((velocity * (share * self.momentum)).add_(update / size), alpha=self.step_size)
        node.buffers.lerp_(message.tensor("buffers"), 1 / size)
        local.velocity, local.count, local.size = velocity, 0 if full else count, size
        local.buffer = torch.zeros_like(buffer) if full else buffer

    @property
    def step_size(self) -> float:
        """Return ε; with ``delayed_sgd`` steps are late by one, and 0.7 diverges on a quadratic with momentum."""
        return self.lr or (0.7 if self.rule == "delayed_nesterov" else 0.2)

    def steps_of(self, node: Node, worker: NodeId) -> int:
        """Return n_w by the speeds that the server has measured; H for a worker without one."""
        known = ServerLocal(node.local).speeds.items()
        speeds = {name: speed for name, (speed, at) in known if node.now - at <= self.speed_timeout_s}
        if (own := speeds.get(str(worker))) is None or not self.dynamic_steps:
            return self.inner_steps
        return max(1, int(self.inner_steps * own / max(speeds.values()) + 1e-9))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 2 * (layout.nbytes + layout.buffer_nbytes + 8)

    def node_rounds(self, num_nodes: int) -> float:
        return 1.0 if self.grace_s else 1 / num_nodes  # with ``grace_s`` the server waits for all, if it is long enough
