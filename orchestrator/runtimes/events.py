"""Events: what a runtime tells the controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from starling.orchestrator.protocol.events import Event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope


@dataclass(frozen=True)
class NodeFacts:
    """What is known of a node once it is up."""

    node: NodeId
    place: str
    """Where it lives, for people: ``pid 4711 on 10.0.0.3``."""
    device: str
    num_samples: int
    gpus: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Died:
    """A node's process or machine is gone."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class Up:
    """A node that was launched is there, in the initial state."""

    facts: NodeFacts
    import_s: float = 0.0
    """Of the time since it was launched: what its process took once it ran, for imports, data and model."""


@dataclass(frozen=True)
class NotUp:
    """A node that was launched did not come up."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class Notice:
    """A node is told to leave, by SIGTERM or by its machine's end being announced."""

    node: NodeId
    deadline: float
    """When it will be gone, on the runtime's clock."""
    reason: str


@dataclass(frozen=True)
class Retired:
    """A node that was told to ``retire`` is gone; what it had committed is kept for who takes its place."""

    node: NodeId
    nbytes: int
    """Of what is kept."""


@dataclass(frozen=True)
class Kept:
    """All that a node committed in a round is kept, should it die."""

    node: NodeId
    number: int
    nbytes: int


@dataclass(frozen=True)
class Loaded:
    """A node has taken over committed state."""

    node: NodeId
    source: NodeId
    """Whose: a donor's, or its own, kept from before."""
    nbytes: int


@dataclass(frozen=True)
class NotLoaded:
    """State could not be had: whoever held it is gone."""

    node: NodeId
    source: NodeId


@dataclass(frozen=True)
class Room:
    """There is room for so many processes more."""

    places: int


@dataclass(frozen=True)
class SpareLost:
    """A process that stood by, or was being started to stand by, is gone."""

    reason: str


@dataclass(frozen=True)
class Halted:
    """A cancelled node stands still."""

    node: NodeId


@dataclass(frozen=True)
class Arrived:
    """A message has come to its receiver."""

    envelope: Envelope


@dataclass(frozen=True)
class Vanished:
    """A message will not arrive: its payload was lost with its sender."""

    envelope: Envelope


@dataclass(frozen=True)
class Unreadable:
    """What a node was handed is nowhere to be had any more; it waits for something else, still for ``timeout_s``."""

    node: NodeId
    envelope: Envelope
    timeout_s: float | None = None


@dataclass(frozen=True)
class Seen:
    """Times that a node's program saw, on which its results may depend."""

    node: NodeId
    values: tuple[float, ...]


@dataclass(frozen=True)
class Used:
    """What a node's process and machine use, by name."""

    node: NodeId
    values: Mapping[str, float]


@dataclass(frozen=True)
class Log:
    """Lines for a node's log."""

    node: NodeId
    lines: tuple[str, ...]


Happening: TypeAlias = (
    Event
    | Died
    | Up
    | NotUp
    | Notice
    | Retired
    | Kept
    | Loaded
    | NotLoaded
    | Room
    | SpareLost
    | Halted
    | Arrived
    | Vanished
    | Unreadable
    | Seen
    | Used
    | Log
)
"""What a runtime reports: an event for the rendezvous, or something that only the controller understands."""


@dataclass(frozen=True)
class FinalModel:
    """The tensors that a run ends with."""

    digest: str
    safetensors: bytes | memoryview
