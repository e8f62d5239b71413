"""What the controller asks of a runtime. Two keep this contract: ``simulator.Simulator`` and ``cluster.Cluster``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from orchestrator.events import Event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.host import Returned
    from algorithms.api import Layout, NodeId, View
    from orchestrator.events import Decision


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
class Raised:
    """A node's program or task raised."""

    node: NodeId
    message: str
    traceback: str | None


@dataclass(frozen=True)
class Died:
    """A node's process or machine is gone."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class Finished:
    """A node's program is done."""

    node: NodeId
    report: Returned


@dataclass(frozen=True)
class Log:
    """Lines for a node's log."""

    node: NodeId
    lines: tuple[str, ...]


Happening: TypeAlias = Event | Raised | Died | Finished | Log
"""What a runtime reports: an event for the rendezvous, or something that only the controller understands."""


@dataclass(frozen=True)
class FinalModel:
    """The tensors that a run ends with."""

    digest: str
    safetensors: bytes | memoryview


class Runtime(Protocol):
    """Carries out what the controller decides, and reports what happens."""

    virtual: bool
    """Whether ``now`` is a virtual clock."""
    layout: Layout
    """Of the parameters; known once ``start`` has returned."""
    baselines: dict[str, float]
    """What the task's validation loss compares with; known once ``start`` has returned."""

    @property
    def now(self) -> float:
        """Seconds on the runtime's clock."""
        ...

    @property
    def transport_nbytes(self) -> int | None:
        """Bytes that really moved between processes so far; ``None`` where nothing does."""
        ...

    def start(self) -> list[NodeFacts]:
        """Bring all nodes up with their initial state.

        Raises:
            StarlingError: they cannot be brought up.
        """
        ...

    def begin(self, epoch: int, number: int, view: View, committed: int) -> None:
        """Begin a round on all members of ``view``; ``committed`` is the last committed round."""
        ...

    def perform(self, decisions: Sequence[Decision]) -> None:
        """Carry out what the rendezvous decided at one moment."""
        ...

    def next(self, until: float) -> Happening | None:
        """Wait for something to happen, until ``now`` reaches ``until`` (``None`` then)."""
        ...

    def evaluate(self, node: NodeId, committed: int, max_batches: int | None) -> dict[str, float]:
        """The metrics of ``Algorithm.model`` on held-out data, computed by ``node``."""
        ...

    def finish(self, committed: int, node: NodeId) -> FinalModel:
        """Settle the last commit everywhere and fetch the model from ``node``."""
        ...

    def close(self) -> None:
        """Leave nothing behind: no process, no actor, no temporary file. Idempotent; never raises."""
        ...
