"""What the rendezvous is told, and what it answers: plain data, shared by it, the controller and the runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.actors.wire.buffers import Signature
    from starling.actors.wire.tickets import Wants
    from starling.algorithms.api import NodeId
    from starling.algorithms.closing import ClosePolicy

# --- events -----------------------------------------------------------------------------------------------------------


class Post(NamedTuple):
    """``node`` announces its contribution to exchange ``seq``; large ones are in the store by now."""

    node: NodeId
    seq: int
    signature: Signature
    contributes: bool = True
    """False receives only."""
    weight: float = 1.0
    part_nbytes: tuple[int, ...] = ()
    """Booked size of each part; empty without a contribution."""
    result_nbytes: tuple[int, ...] = ()
    """Booked size of each part of the result."""
    inline: bool = False
    """The contribution came with the announcement."""
    waits: bool = True
    """The program is at the operation; false after a ``Start``."""
    close: ClosePolicy | None = None
    wants: Wants | None = None
    """Of a neighbour gather: whose contributions ``node`` is to receive. ``None``: everybody's."""
    skipped: str | None = None
    """Why the node has nothing to contribute, though it takes part: its values are not finite."""
    least: int = 1
    """How many contributions there have to be."""


@dataclass(frozen=True)
class Waits:
    """``node`` waits for the result of a started exchange; its ``Post`` may still be on the way."""

    node: NodeId
    seq: int


@dataclass(frozen=True)
class Secured:
    """``by`` fetched the contributions of ``got``, and (AllReduce) reduced them to one part."""

    seq: int
    part: int
    by: NodeId
    got: frozenset[NodeId]
    generation: int


@dataclass(frozen=True)
class Delivered:
    """``node`` holds the exchange's result, except the ``missing`` parts."""

    seq: int
    node: NodeId
    generation: int
    missing: frozenset[int] = frozenset()


class Return(NamedTuple):
    """``node``'s program is done and its state staged."""

    node: NodeId
    num_collectives: int
    digest: str = ""
    """Of the shared state; empty if it is not replicated."""


class Posts(NamedTuple):
    """Posts of several nodes at one moment, one after the other, that differ in nothing but the node and its wants.

    Their close policy is the usual one: no other word could close the exchange before the last of them.
    """

    first: Post
    wants: dict[NodeId, Wants | None]
    """Of each of them, in order."""

    def each(self) -> Iterator[Post]:
        """The posts one by one."""
        return (self.first._replace(node=node, wants=wants) for node, wants in self.wants.items())


class Returns(NamedTuple):
    """Returns of several nodes at one moment, one after the other, that differ in nothing but the node."""

    first: Return
    nodes: tuple[NodeId, ...]


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


Event: TypeAlias = Post | Waits | Secured | Delivered | Return | Posts | Returns | Lost | Withdrawn | Deadline | Elapsed


# --- decisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secure:
    """``by`` is to fetch ``members``' contributions to ``part`` and reduce them (a gather: fetch and keep them)."""

    seq: int
    part: int
    by: NodeId
    members: tuple[NodeId, ...]
    generation: int


@dataclass(frozen=True)
class Deliver:
    """``nodes`` are to fetch the parts of the result, each from the member that made it."""

    seq: int
    nodes: tuple[NodeId, ...]
    closed: tuple[NodeId, ...]
    makers: tuple[NodeId, ...]
    """Who made each part; empty for a gather, whose members hold everything already."""
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
    """This attempt cannot be finished; the round is to begin again with whoever is there."""

    reason: str
    least: int = 1
    """So many have to contribute."""


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
    Secure | Deliver | Close | AskAgain | Advance | Cancel | GiveUp | Abort | Commit | Diverged | ProgramsDiverge
)
