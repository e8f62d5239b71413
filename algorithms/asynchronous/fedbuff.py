"""FedBuff: a server steps as soon as enough updates are in, each discounted by its staleness.

A worker i takes ``steps`` local steps from the model x_s that it was given, to y_i, sends the difference and waits for
the model as it is by then. The server discounts each update by its age τ_i, and takes its step t with learning rate
γ = ``outer.lr`` when K = ``buffer_size`` of them are in:

    Δ_i = x_s - y_i          τ_i = t - s          s(τ) = (1 + τ)^-a          a = ``staleness_exponent``
    x ← x - γ (1/K) Σ_i s(τ_i) Δ_i          t ← t + 1

All are answered at once, but for the one that fills the buffer: it waits for the step, and gets x after it.
Deviations: a worker asks for work whenever it has none; no server chooses among many. Floating-point buffers become
the mean of those of the K. A worker that skips a round (``on_nan``) sends a difference of zero.
Elasticity: the server alone has state that must not be lost. A lost worker's unfinished update is lost with it, and
nobody waits. A new worker begins with the server's model, and its first update is as old as that model.
``max_staleness`` drops updates that are too old. A configured K stays as it is, also above the number of workers; by
default it is that of the workers who are there when a step begins.
Cost: 2·K·b·P bytes per round of the server, b = 4 for float32, and what is on its way when the run ends. State: x and
the sum of the differences on the server, the model it was given on a worker, P values each.
Reference: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, arXiv:2106.06639,
Algorithms 1 and 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from starling.algorithms.api import SERVER, Algorithm, Layout, Node, Send, Train
from starling.algorithms.messages import model_of, next_message, take_model
from starling.algorithms.outer import SGD, OuterOptimizer
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId
    from starling.algorithms.outer import OuterState


class ServerLocal(NodeState):
    outer: OuterState
    waiting: NodeId | None  # the worker that filled the last buffer and was not answered yet


class FedBuff(Algorithm, name="fedbuff"):
    """Federated learning with buffered asynchronous aggregation; see the module's docstring."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    buffer_size: PositiveInt | None = None  # K, updates in a step; null: half of the workers, at most the paper's 10
    steps: PositiveInt = 10  # optimizer steps of a worker between two exchanges with the server
    staleness_exponent: NonNegativeFloat = 0.5  # a; 0: old updates count like fresh ones
    max_staleness: NonNegativeInt | None = None  # in steps of the server; older updates are dropped; null: none
    outer: OuterOptimizer = SGD(lr=1.0)  # γ; plain averaging

    def init(self, node: Node) -> None:
        if node.id == SERVER:
            local = ServerLocal(node.local)
            local.outer = self.outer.init(node.parameters)
            local.waiting = None

    async def round(self, node: Node) -> None:
        given = node.parameters.clone()
        await Train(steps=self.steps)
        await Send(SERVER, {"parameters": given - node.parameters, "buffers": node.buffers})
        take_model(node, await next_message())

    async def server(self, node: Node) -> None:
        local, model = ServerLocal(node.local), model_of(node)
        # The worker that filled the last buffer is answered only now: in the old round it would pass for one that
        # has heard of the old model.
        if local.waiting is not None:
            await Send(local.waiting, model)
        difference, buffers = torch.zeros_like(node.parameters), torch.zeros_like(node.buffers)
        num_updates, size = 0, self.size_among(len(node.view.members))
        while True:
            message = await next_message()
            if self.max_staleness is None or message.staleness <= self.max_staleness:
                difference.add_(message.tensor("parameters"), alpha=self.discount(message.staleness))
                buffers.add_(message.tensor("buffers"))
                num_updates += 1
            if num_updates == size:
                break
            await Send(message.sender, model)
        difference.div_(size)
        step, local.outer = self.outer.update(difference, local.outer)
        node.parameters.add_(step)
        node.buffers.copy_(buffers.div_(size))
        local.waiting = message.sender

    def size_among(self, num_workers: int) -> int:
        """Return K for so many workers.

        With as many updates in a step as there are workers each would wait in vain for the model that it brought forth.

        >>> [FedBuff().size_among(num_workers) for num_workers in (1, 2, 5, 8, 100)]
        [1, 1, 3, 4, 10]
        """
        return self.buffer_size or min(10, max(1, (num_workers + 1) // 2))

    def discount(self, staleness: int) -> float:
        """Return s(τ), the weight of an update from the model of τ steps ago."""
        return (1 + staleness) ** -self.staleness_exponent

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 2 * self.size_among(num_nodes) * (layout.nbytes + layout.buffer_nbytes)

    def node_rounds(self, num_nodes: int) -> float:
        return self.size_among(num_nodes) / num_nodes
