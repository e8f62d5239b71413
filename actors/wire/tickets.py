"""Tickets report the latest operation of a node's program to the runtime that drives it.

Those of every round are named tuples: a thousand nodes make thousands in each, at a fifth of a frozen dataclass's cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from starling.actors.data import Position
    from starling.actors.wire.buffers import Buffer, Signature, TensorSpec
    from starling.algorithms.api import Batch, Evaluate, Gradient, Loss, NodeId, Step, Train
    from starling.algorithms.closing import ClosePolicy

Wants: TypeAlias = "frozenset[NodeId | tuple[NodeId, ...]]"
"""In-neighbours of a node; a row of nodes is the first of them that is in."""


def among(wants: Wants, closed: Container[NodeId]) -> set[NodeId]:
    """Return those of ``closed`` that ``wants`` comes to.

    >>> sorted(among(frozenset({1, 2, (3, 4)}), {1, 4}))
    [1, 4]
    """
    firsts = (one if isinstance(one, int) else next((node for node in one if node in closed), None) for one in wants)
    return {node for node in firsts if node is not None and node in closed}


Compute: TypeAlias = "Train | Batch | Gradient | Step | Loss | Evaluate"
"""Operations that a node carries out by itself."""


class Posted(NamedTuple):
    """The program awaits a collective operation, or has started one, and contributes to it (or only receives)."""

    seq: int
    signature: Signature
    specs: tuple[TensorSpec, ...] | None
    """Specs of the contributed tensors; ``None``: nothing is contributed."""
    weight: float
    part_nbytes: tuple[int, ...]
    """Booked bytes of each part."""
    result_nbytes: tuple[int, ...]
    """Booked bytes of each part of the result; empty for a gather."""
    inline: Buffer | None
    """The contribution itself, if it is small."""
    close: ClosePolicy | None
    """``None`` is the usual one, ``Quorum``."""
    wants: Wants | None = None
    """In-neighbours of this round, in a neighbour gather."""
    waits: bool = True
    """False after a ``Start``: the program runs on at once."""
    skipped: str | None = None
    """Why the node, which trains in this round, has nothing to contribute (``on_nan: skip``)."""
    least: int = 1
    """Minimum number of contributions that the exchange needs."""
    measures: bool = False
    """Contributions are measured before they are combined."""

    @property
    def contributes(self) -> bool:
        """Whether there is a contribution; False receives only."""
        return self.specs is not None

    @property
    def nbytes(self) -> int:
        """Booked bytes of all parts."""
        return sum(self.part_nbytes)


@dataclass(frozen=True)
class Waiting:
    """The program waits for a started exchange."""

    seq: int


@dataclass(frozen=True)
class Sending:
    """The program sends a message, and runs on at once."""

    to: NodeId
    letter: int
    """Names the message among those of its node."""
    specs: tuple[TensorSpec, ...]
    nbytes: int
    inline: Buffer | None
    """The payload itself, if it is small."""


@dataclass(frozen=True)
class Receiving:
    """The program waits for a message."""

    timeout_s: float | None


@dataclass(frozen=True)
class Sleeping:
    """The program lets time pass."""

    seconds: float


@dataclass(frozen=True)
class Pinging:
    """The program asks who is there."""

    nodes: tuple[NodeId, ...]
    timeout_s: float


class Returned(NamedTuple):
    """The program is done; its state is staged."""

    digest: str
    num_collectives: int
    loss: float | None
    """Mean training loss of the round; ``None`` without training."""
    num_samples: int
    train_seconds: float
    record: bytes | None = None
    """``Algorithm.sealed``."""
    position: Position | None = None
    """The node's position in its data; ``None``: unchanged since the last commit, or the node has no data."""
    num_drawn: int = 0
    """Training samples that the node has drawn in this round, from any sampler."""
    num_void: int = 0
    """Samples drawn in rounds since the last commit that were given up."""
    unsent: float = 0.0
    """``Algorithm.unsent``."""
    metrics: dict[str, float] | None = None
    """``Node.report``; ``None``: nothing was reported."""


def mean_loss(losses: Sequence[tuple[float, int]]) -> float | None:
    """Average mean losses, each of so many samples, over the samples; ``None`` without losses.

    Where nothing is known of samples, each loss counts alike.

    >>> mean_loss([(1.0, 2), (4.0, 1)])
    2.0
    """
    total = sum(count for _, count in losses)
    if not total:
        return sum(loss for loss, _ in losses) / len(losses) if losses else None
    return sum(loss * count for loss, count in losses) / total


@dataclass(frozen=True)
class Failed:
    """The program, or the task that it trains, raised."""

    message: str
    traceback: str | None
    """``None`` if the message says all there is to say."""


class Computing(NamedTuple):
    """The program awaits compute; never leaves the host's process."""

    operation: Compute


@dataclass(frozen=True)
class Stale:
    """The program was cancelled."""


Ticket: TypeAlias = Posted | Waiting | Sending | Receiving | Sleeping | Pinging | Returned | Failed | Computing | Stale


@dataclass(frozen=True)
class Contributed:
    """One member's inline contribution, as the rendezvous passes it on to all members."""

    node: NodeId
    weight: float
    specs: tuple[TensorSpec, ...]
    data: Buffer


@dataclass(frozen=True)
class Measured:
    """``by`` has fetched the contributions of ``got``, and measured one part of them."""

    seq: int
    part: int
    by: NodeId
    got: frozenset[NodeId]
    generation: int
    values: Buffer = field(compare=False)
    """The measure, as bytes."""


@dataclass(frozen=True)
class Secured:
    """``by`` has fetched the contributions of ``got``, and (AllReduce) reduced them to one part."""

    seq: int
    part: int
    by: NodeId
    got: frozenset[NodeId]
    generation: int
