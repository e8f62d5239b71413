"""One exchange of a rendezvous, from the first announcement to the last who runs on; see ``rendezvous``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.actors.wire.tickets import Measured, Posted
    from starling.algorithms.api import NodeId


class Phase(enum.Enum):
    """Phase of an exchange."""

    OPEN = "open"
    MEASURING = "measuring"
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
    """The target while measuring and securing; who is in, afterwards."""
    generation: int = 0
    """Grows when parts are made anew; answers to an older request are dropped."""
    makers: dict[int, NodeId] = field(default_factory=dict)
    """The node that makes each part."""
    secured: dict[int, frozenset[NodeId]] = field(default_factory=dict)
    """The contributors to each finished part. Gathers: keyed by the fetching member instead, active ones only."""
    measured: dict[int, Measured] = field(default_factory=dict)
    """The measure of each part, of ``closed`` alone once all parts are measured."""
    fetched: dict[tuple[int, NodeId], frozenset[NodeId]] = field(default_factory=dict)
    """Whose contributions to a part a maker has, by part and maker; kept only if they are measured."""
    told: set[NodeId] = field(default_factory=set)
    """Makers that have the measures of all parts."""
    asked: tuple[Phase, int] | None = None
    """Phase and generation at the deadline before."""
    delivered: set[NodeId] = field(default_factory=set)
    """Active members that hold the result."""

    @property
    def inline(self) -> bool:
        """Whether all contributions came with their announcements."""
        return all(post.inline is not None for post in self.posts.values() if post.contributes)

    @property
    def measures(self) -> bool:
        """Contributions are measured before they are combined."""
        return any(post.measures for post in self.posts.values())

    @property
    def num_parts(self) -> int:
        """Number of parts into which each contribution is cut; every contribution has as many."""
        return max(len(post.part_nbytes) for post in self.posts.values())

    @property
    def made(self) -> Mapping[int, object]:
        """The parts that are finished in this phase."""
        return self.measured if self.phase is Phase.MEASURING else self.secured

    @property
    def measures_in_order(self) -> tuple[Measured, ...]:
        """The measures of all parts; empty if contributions are not measured."""
        return tuple(self.measured[part] for part in sorted(self.measured))

    def held(self, part: int, by: NodeId) -> frozenset[NodeId]:
        """Return the members whose contributions to ``part`` the maker ``by`` has kept since it measured them."""
        return self.fetched.get((part, by), frozenset())

    def wanted(self, by: NodeId) -> tuple[NodeId, ...]:
        """Return the members of ``closed`` whose contributions ``by`` is to have, its own included."""
        wants = self.posts[by].wants
        if wants is None:
            return self.closed
        those = among(wants, frozenset(self.closed))
        return tuple(node for node in self.closed if node in those or node == by)
