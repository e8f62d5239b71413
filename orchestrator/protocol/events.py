"""Events that the rendezvous takes and decisions that it returns: plain data, shared with controller and runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from starling.actors.wire.tickets import Measured, Secured

if TYPE_CHECKING:
    from starling.actors.wire.tickets import Posted, Returned, Ticket
    from starling.algorithms.api import NodeId

# --- events -----------------------------------------------------------------------------------------------------------


class Reached(NamedTuple):
    """A node's program has reached an operation, or its end. Large contributions are in the store by now."""

    node: NodeId
    ticket: Ticket


class Posts(NamedTuple):
    """Several nodes post at one moment, one after the other: their tickets differ in nothing but ``wants``.

    Their close policy is the usual one: no other word could close the exchange before the last of them.
    """

    tickets: dict[NodeId, Posted]


class Returns(NamedTuple):
    """Several nodes' programs end at one moment, one after the other, with one digest and number of collectives."""

    tickets: dict[NodeId, Returned]


@dataclass(frozen=True)
class Delivered:
    """``node`` holds the exchange's result, except the ``missing`` parts."""

    seq: int
    node: NodeId
    generation: int
    missing: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Lost:
    """``node`` is dead."""

    node: NodeId


@dataclass(frozen=True)
class Withdrawn:
    """``node`` cannot be waited for any longer."""

    node: NodeId
    reason: str = "its time to leave is over"


@dataclass(frozen=True)
class Deadline:
    """The time for which stragglers are waited for is over; while the round goes on, it comes again."""


@dataclass(frozen=True)
class Elapsed:
    """The time is over after which the close policy of exchange ``seq`` is to be asked again."""

    seq: int


Event: TypeAlias = Reached | Posts | Returns | Measured | Secured | Delivered | Lost | Withdrawn | Deadline | Elapsed


# --- decisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """``by`` is to fetch ``members``' contributions to ``part``, measure them, and keep them."""

    seq: int
    part: int
    by: NodeId
    members: tuple[NodeId, ...]
    generation: int
    held: frozenset[NodeId] = frozenset()
    """Members whose contributions to the part ``by`` has fetched before."""


@dataclass(frozen=True)
class Secure:
    """``by`` is to fetch ``members``' contributions to ``part`` and reduce them (a gather: fetch and keep them)."""

    seq: int
    part: int
    by: NodeId
    members: tuple[NodeId, ...]
    generation: int
    held: frozenset[NodeId] = frozenset()
    """Members whose contributions to the part ``by`` has fetched before, to measure them."""
    measured: tuple[Measured, ...] = ()
    """The measures of all parts, in order, of ``members`` alone; none if the aggregator does not measure."""


@dataclass(frozen=True)
class Deliver:
    """``nodes`` are to fetch the parts of the result, each from the member that made it."""

    seq: int
    nodes: tuple[NodeId, ...]
    closed: tuple[NodeId, ...]
    makers: tuple[NodeId, ...]
    """Maker of each part; empty for a gather, whose members hold everything already."""
    generation: int


@dataclass(frozen=True)
class Close:
    """The exchange is closed, with the contributions of ``closed``."""

    seq: int
    closed: tuple[NodeId, ...]
    inline: bool


@dataclass(frozen=True)
class AskAgain:
    """``Elapsed(seq)`` is to come in ``after_s`` seconds."""

    seq: int
    after_s: float


@dataclass(frozen=True)
class Advance:
    """The exchange is closed: ``nodes`` run on with the result."""

    seq: int
    nodes: tuple[NodeId, ...]
    closed: tuple[NodeId, ...]
    inline: bool


@dataclass(frozen=True)
class Cancel:
    """``node``'s round is over: it is too late, or nobody could fetch what it contributed."""

    node: NodeId
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Fetches of what ``node`` held will never succeed."""

    node: NodeId


@dataclass(frozen=True)
class Abort:
    """Give up this attempt: the round begins again with the nodes that are present."""

    reason: str
    least: int = 1
    """Minimum number of contributions that the aggregator needs."""


@dataclass(frozen=True)
class Commit:
    """The round's results become current on ``members``."""

    members: tuple[NodeId, ...]


@dataclass(frozen=True)
class Diverged:
    """The shared state of replicated members differs: ``groups`` of equal digests, largest first."""

    groups: tuple[tuple[NodeId, ...], ...]
    healed: bool = False
    """The first group commits; the others are cancelled, and will be given its state."""


@dataclass(frozen=True)
class ProgramsDiverge:
    """Two members' programs await different operations at the same place."""

    seq: int
    first: NodeId
    second: NodeId
    message: str


Decision: TypeAlias = (
    Measure
    | Secure
    | Deliver
    | Close
    | AskAgain
    | Advance
    | Cancel
    | GiveUp
    | Abort
    | Commit
    | Diverged
    | ProgramsDiverge
)
