"""Operations of asynchronous programs: send and receive messages between mailboxes, and ask who answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from starling.algorithms.errors import ProgramError
from starling.algorithms.node import Node, NodeId, Payload
from starling.algorithms.operations import Operation


@dataclass(frozen=True, eq=False)
class Send(Operation[None]):
    """Put ``payload`` into the mailbox of ``to``. Messages to a node that has left are dropped.

    It counts as of the sender's round, whenever in it: a server that steps and then answers in the same round answers
    with the old version, by ``Message.staleness``. Let it answer at the begin of the next one (see ``fedbuff``).

    Bytes: those of the payload; a number counts 8.
    """

    to: NodeId
    payload: Payload


@dataclass(frozen=True)
class Message:
    """A received message."""

    sender: NodeId
    payload: Payload
    staleness: int
    """The receiver's round now, minus the receiver's round that the sender had last heard of when it sent."""
    round: int = 0
    """The sender's, in which it sent."""

    def tensor(self, name: str) -> Tensor:
        """Return the tensor ``name`` of a payload that is a mapping.

        Raises:
            ProgramError: the payload has none.
        """
        value = self._member(name)
        if not isinstance(value, Tensor):
            raise ProgramError(f"node {self.sender} sent {type(value).__name__} as {name!r}; it must be a tensor")
        return value

    def number(self, name: str) -> float:
        """Return the number ``name`` of a payload that is a mapping.

        Raises:
            ProgramError: the payload has none.
        """
        value = self._member(name)
        if isinstance(value, Tensor):
            raise ProgramError(f"node {self.sender} sent a tensor as {name!r}; it must be a number")
        return value

    def _member(self, name: str) -> Tensor | float:
        if not isinstance(self.payload, Mapping) or name not in self.payload:
            raise ProgramError(f"node {self.sender} sent a message without {name!r}")
        return self.payload[name]


@dataclass(frozen=True)
class Left:
    """Notice that a node has left: received once by every other node, after the last message of that node."""

    node: NodeId


@dataclass(frozen=True)
class Timeout:
    """Result of a ``Receive`` whose time was over without a message."""


@dataclass(frozen=True)
class Receive(Operation[Message | Left | Timeout]):
    """Take the next message, waiting until ``until_s`` on ``node.now``'s clock (``None``: as long as it takes)."""

    until_s: float | None = None


@dataclass(frozen=True)
class Ping(Operation["frozenset[NodeId]"]):
    """Return the members of ``nodes`` that answer within ``timeout_s``."""

    nodes: tuple[NodeId, ...]
    timeout_s: float


async def next_message() -> Message:
    """Receive the next message, past notices of nodes that have left."""
    while not isinstance(message := await Receive(), Message):
        pass
    return message


def model_of(node: Node) -> dict[str, Tensor]:
    """Return the payload of a node's whole model: its parameters and floating-point buffers."""
    return {"parameters": node.parameters, "buffers": node.buffers}


def take_model(node: Node, message: Message) -> None:
    """Replace a node's parameters and floating-point buffers by those of a message."""
    node.parameters.copy_(message.tensor("parameters"))
    node.buffers.copy_(message.tensor("buffers"))
