"""Events that a runtime reports to the controller."""

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
    """Facts of a node that is up."""

    node: NodeId
    place: str
    """Process and machine, for people: ``pid 4711 on 10.0.0.3``."""
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
    """Seconds that its process took for imports, data and model, once it ran."""


@dataclass(frozen=True)
class NotUp:
    """A node that was launched did not come up."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class Notice:
    """A node has to leave: its process got SIGTERM, or its machine's end was announced."""

    node: NodeId
    deadline: float
    """End of the node's process, on the runtime's clock."""
    reason: str


@dataclass(frozen=True)
class Retired:
    """A node that was told to ``retire`` is gone; its committed state is kept for its successor."""

    node: NodeId
    nbytes: int
    """Bytes of the kept state."""


@dataclass(frozen=True)
class Kept:
    """A copy of all that a node committed in a round is kept, should the node die."""

    node: NodeId
    number: int
    nbytes: int


@dataclass(frozen=True)
class Loaded:
    """A node has loaded committed state."""

    node: NodeId
    source: NodeId
    """The donor, or the node itself if the state is its own kept copy."""
    nbytes: int


@dataclass(frozen=True)
class NotLoaded:
    """Committed state could not be loaded: its holder is gone."""

    node: NodeId
    source: NodeId


@dataclass(frozen=True)
class Room:
    """The cluster has room for ``places`` more processes."""

    places: int


@dataclass(frozen=True)
class SpareLost:
    """A spare process is gone, or one that was being started as a spare."""

    reason: str


@dataclass(frozen=True)
class Halted:
    """A cancelled program has stopped."""

    node: NodeId


@dataclass(frozen=True)
class Arrived:
    """A message has arrived at its receiver."""

    envelope: Envelope


@dataclass(frozen=True)
class Vanished:
    """A message will never arrive: its payload was lost with its sender."""

    envelope: Envelope


@dataclass(frozen=True)
class Unreadable:
    """A delivered payload could not be fetched; the node waits for another message, for up to ``timeout_s``."""

    node: NodeId
    envelope: Envelope
    timeout_s: float | None = None


@dataclass(frozen=True)
class Seen:
    """Clock readings of a node's program, on which its results may depend."""

    node: NodeId
    values: tuple[float, ...]


@dataclass(frozen=True)
class Used:
    """System metrics of a node's process and machine, by name."""

    node: NodeId
    values: Mapping[str, float]


@dataclass(frozen=True)
class Log:
    """Lines to be added to a node's log."""

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
"""Anything that a runtime reports; an ``Event`` may be meant for the rendezvous."""


@dataclass(frozen=True)
class FinalModel:
    """The model that a run ends with."""

    digest: str
    safetensors: bytes | memoryview
