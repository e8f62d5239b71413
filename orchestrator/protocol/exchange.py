"""One exchange of a rendezvous, from the first announcement to the last who runs on; see ``rendezvous``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import among

if TYPE_CHECKING:
    from starling.actors.wire.tickets import Posted
    from starling.algorithms.api import NodeId


class Phase(enum.Enum):
    """Phase of an exchange."""

    OPEN = "open"
    SECURING = "securing"
    DELIVERING = "delivering"
    CLOSED = "closed"


@dataclass
class Exchange:
    """One collective operation of all members."""

    seq: int
    is_gather: bool = False
    first_at: float | None = None
    """Time of the first contribution; nodes that only receive may post at once, and do not count."""
    first_s: float = 0.0
    """Seconds to the first contribution, from the round's begin or the last close before it."""
    phase: Phase = Phase.OPEN
    posts: dict[NodeId, Posted] = field(default_factory=dict)
    """While open: of active members only."""
    waiting: set[NodeId] = field(default_factory=set)
    closed: tuple[NodeId, ...] = ()
    """The target while securing; who is in, afterwards."""
    generation: int = 0
    """Grows when parts are made anew; answers to an older request are dropped."""
    makers: dict[int, NodeId] = field(default_factory=dict)
    """The node that makes each part."""
    secured: dict[int, frozenset[NodeId]] = field(default_factory=dict)
    """The contributors to each finished part. Gathers: keyed by the fetching member instead, active ones only."""
    asked: tuple[Phase, int] | None = None
    """Phase and generation at the deadline before."""
    delivered: set[NodeId] = field(default_factory=set)
    """Active members that hold the result."""

    @property
    def inline(self) -> bool:
        """Whether all contributions came with their announcements."""
        return all(post.inline is not None for post in self.posts.values() if post.contributes)

    @property
    def num_parts(self) -> int:
        """Number of parts into which each contribution is cut; every contribution has as many."""
        return max(len(post.part_nbytes) for post in self.posts.values())

    def wanted(self, by: NodeId) -> tuple[NodeId, ...]:
        """Return the members of ``closed`` whose contributions ``by`` is to have, its own included."""
        wants = self.posts[by].wants
        if wants is None:
            return self.closed
        those = among(wants, frozenset(self.closed))
        return tuple(node for node in self.closed if node in those or node == by)
