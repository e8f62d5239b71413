"""The page to read first: an algorithm is a program of one node.

An algorithm is written from the point of view of one node, as a coroutine that does one round. Everything that costs
compute or reaches outside the node is an *operation* that the program awaits::

    class LocalSGD(Algorithm, name="local_sgd"):
        steps: PositiveInt = 10

        async def round(self, node: Node) -> None:
            await Train(steps=self.steps)
            mean = await AllReduce(node.parameters)
            node.parameters.copy_(mean.value)

A coroutine cannot be stored, and need not be: a round is the unit of work. State that outlives a round lives in
``node.parameters``, ``node.buffers``, ``node.shared`` and ``node.local``, and nowhere else.

Rules that every program keeps:

* Assign to ``node.shared[…]`` and ``node.local[…]``; never write into what they hold. Assignments are staged, and
  become current when the round commits. ``node.parameters`` and ``node.buffers`` are written in place. A ``NodeState``
  gives keys types: ``Shared(node.shared).anchor``.
* Members may branch only on what all of them share (view, round, shared state, results), never on local state:
  collective operations are matched by their position in the program.
* Randomness comes from ``node.rng(purpose)``.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from starling.algorithms.aggregators.gram import GramAggregator, refuse_hidden
from starling.algorithms.codecs import Codec
from starling.algorithms.collectives import AllGather, AllReduce, Handle, Inbox, NeighborAllGather, Reduced, Start, Wait
from starling.algorithms.costs import INLINE_LIMIT_BYTES, PART_BYTES, all_reduce_bytes
from starling.algorithms.layout import Layout
from starling.algorithms.messages import Left, Message, Ping, Receive, Send, Timeout
from starling.algorithms.node import SERVER, Node, NodeId, Payload, State, View
from starling.algorithms.noise import Perturbed
from starling.algorithms.operations import (
    Batch,
    Evaluate,
    Gradient,
    GradientReport,
    Loss,
    Operation,
    Sleep,
    Step,
    Train,
    TrainReport,
)
from starling.algorithms.registry import Part
from starling.algorithms.rules import DataBatch, Rule
from starling.algorithms.state import NodeState
from starling.algorithms.topologies import Topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "INLINE_LIMIT_BYTES",
    "PART_BYTES",
    "SERVER",
    "Algorithm",
    "AllGather",
    "AllReduce",
    "Batch",
    "DataBatch",
    "Evaluate",
    "Gradient",
    "GradientReport",
    "Handle",
    "Inbox",
    "Layout",
    "Left",
    "Loss",
    "Message",
    "NeighborAllGather",
    "Node",
    "NodeId",
    "NodeState",
    "Operation",
    "Payload",
    "Perturbed",
    "Ping",
    "Receive",
    "Reduced",
    "Rule",
    "Send",
    "Sleep",
    "Start",
    "State",
    "Step",
    "Timeout",
    "Train",
    "TrainReport",
    "View",
    "Wait",
    "all_reduce_bytes",
    "whole_round",
]


class Algorithm(Part, family="algorithm", catalog="starling.algorithms"):
    """Define the program of one node. Fields are hyper-parameters; the state of a run lives in the node."""

    replicated: ClassVar[bool] = True
    """Shared state is bit-identical on all members; digests are compared at every commit."""
    synchronous: ClassVar[bool] = True
    """All members do the same round; otherwise each has its own, committed when its program returns.

    ``rounds`` of a run then counts the server's, or without a server those of the average node.
    """
    result: ClassVar[Literal["mean", "last"]] = "mean"
    """Without replicas or server a run ends with the mean of all ``model``s, or the last committer's (of a token)."""
    averages_buffers: ClassVar[bool] = False
    """Each round ends with the mean of all nodes' floating-point buffers, uncompressed: see ``whole_round``."""
    uses_optimizer: ClassVar[bool] = True
    """Rounds take steps of the nodes' own optimizers; otherwise there is no learning-rate schedule."""

    @model_validator(mode="after")
    def _aggregator_sees_contributions(self) -> Self:
        parts = list(dict(self).values())
        for aggregator, codec in itertools.product(parts, parts):
            if isinstance(aggregator, GramAggregator) and isinstance(codec, Codec):
                refuse_hidden(aggregator, codec)
        return self

    def validate_for(self, num_nodes: int) -> None:
        """Raise ``SettingsError`` if the algorithm, or its topology, cannot run on ``num_nodes`` nodes."""
        for part in dict(self).values():
            if isinstance(part, Topology):
                part.validate_for(num_nodes)

    def init(self, node: Node) -> None:
        """Make the initial state: before round 0, or on joining without a donor."""

    @abstractmethod
    async def round(self, node: Node) -> None:
        """Do one round."""

    async def server(self, node: Node) -> None:
        """Do one round of the coordinator, for asynchronous algorithms that have one: a program on one more node.

        That node is ``SERVER``; it has the model but no data, and meets the others in their mailboxes only.
        """
        raise NotImplementedError

    @property
    def has_server(self) -> bool:
        """Say whether the algorithm has a ``server`` program, whose model is then the run's."""
        return type(self).server is not Algorithm.server

    def participants(self, view: View, rng: torch.Generator) -> tuple[NodeId, ...]:
        """Choose the round's cohort; ``rng`` is derived from (seed, round), so that all members choose alike."""
        del rng
        return view.members

    async def on_view_change(self, node: Node) -> None:
        """Repair what a change of membership breaks.

        Runs before ``round``, as its first part, on all members when the view changed; not in a run's first round.
        """

    async def join(self, node: Node) -> None:
        """Run after a state transfer, on the joiner."""

    def unsent(self, node: Node) -> float:
        """Return the norm of the residuals that ``node`` still has to send; they are lost with the node."""
        del node
        return 0.0

    def sealed(self, node: Node) -> bytes | None:
        """Return the log's record of the round that ``node`` has just done: a few bytes, equal on all members."""

    @property
    def steps_at_commit(self) -> bool:
        """Say whether rounds leave ``node.parameters`` alone, and ``replay`` changes them on commit.

        Nodes then keep no committed copy of the parameters: a rollback has nothing to undo.
        """
        return False

    def replay(self, node: Node, record: bytes) -> None:
        """Repeat round ``node.round`` on ``node``'s parameters and shared state, given its ``record``."""
        raise NotImplementedError

    def model(self, node: Node) -> Tensor:
        """Return the parameters to evaluate, save and digest, shape (P,); see ``result`` if not replicated."""
        return node.parameters

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int | None:
        """Return the payload bytes of one round over all nodes, without losses; ``None``: not known in advance.

        The mean of ``averages_buffers`` is not among them: see ``buffer_bytes``. The rounds of an asynchronous
        algorithm are those that a run's ``rounds`` count.
        """
        del layout, num_nodes
        return None

    def round_bytes(self, layout: Layout, num_nodes: int, number: int, num_rounds: int) -> int | None:
        """Return the payload bytes of round ``number`` of ``num_rounds``, if rounds differ; ``None``: not known.

        ``expected_bytes`` is then a typical round's.
        """
        del number, num_rounds
        return self.expected_bytes(layout, num_nodes)

    def buffer_bytes(self, layout: Layout, num_nodes: int) -> int:
        """Return the payload bytes of the mean of buffers that ends a round with ``averages_buffers``, else 0."""
        return all_reduce_bytes(layout.buffer_nbytes, num_nodes) if self.averages_buffers else 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int | None:
        """Return the local steps of a node in one round, at ``batch_size`` samples to a step; ``None``: not known.

        By default the field ``inner_steps`` or ``steps`` says it, or else ``epochs``: an algorithm with other rounds
        overrides this. Plans and learning-rate schedules need the steps. Where they are not known, a schedule needs
        its own ``optimizer.schedule.total_steps``. 0: no step of the node's optimizer, as without ``uses_optimizer``.
        """
        if not self.uses_optimizer:
            return 0
        fields = dict(self)
        steps = fields.get("inner_steps") or fields.get("steps")
        if isinstance(steps, int):
            return steps
        epochs = fields.get("epochs")
        return epochs * math.ceil(num_samples / batch_size) if isinstance(epochs, int) else None

    def node_rounds(self, num_nodes: int) -> float:
        """Return the rounds that a node does in one of the run, on average; it is 1 unless a server counts rounds."""
        del num_nodes
        return 1.0


async def whole_round(algorithm: Algorithm, node: Node, *, joins: bool = False, repairs: bool = False) -> None:
    """Run one round of a node with all that the contract puts around ``Algorithm.round``.

    ``join`` comes first on a node that was given another's state, then ``on_view_change`` where the view has changed.
    With ``averages_buffers`` the round ends with the mean of all nodes' floating-point buffers.
    """
    if joins:
        await algorithm.join(node)
    if repairs:
        await algorithm.on_view_change(node)
    await algorithm.round(node)
    if algorithm.averages_buffers and node.buffers.numel():
        node.buffers.copy_((await AllReduce(node.buffers)).value)
