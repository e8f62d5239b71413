"""The nodes that a run knows, which of them are up, and what was lost with those that went."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starling.actors.wire.tickets import Returned
    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.context import RunContext
    from starling.orchestrator.runtimes.events import NodeFacts


class Roster:
    """Knows all nodes that were ever up, and counts their losses and returns."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.facts: dict[NodeId, NodeFacts] = {}
        self.down: set[NodeId] = set()
        """Lost, and not there again."""
        self.num_started = 0
        self.num_lost = 0
        self.num_joined = 0
        self.num_drained = 0
        """Left as they were told to."""
        self._nodes: tuple[NodeId, ...] = ()
        self._counted = (0, 0, 0)
        """The counts for which ``_nodes`` was made."""

    def start(self, facts: Iterable[NodeFacts]) -> None:
        """Enter the nodes that the run begins with."""
        self.facts = {one.node: one for one in facts}
        self.num_started = len(self.facts)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes that are up, without the server, sorted."""
        counts = len(self.facts), len(self.down), self.num_lost + self.num_joined + self.num_drained
        if counts != self._counted:
            self._counted = counts
            self._nodes = tuple(sorted(node for node in self.facts if node != SERVER and node not in self.down))
        return self._nodes

    @property
    def away(self) -> list[NodeFacts]:
        """The nodes that are down, without the server."""
        return [facts for node, facts in self.facts.items() if node in self.down and node != SERVER]

    @property
    def counts(self) -> dict[str, int]:
        """Counts for the summary: ``started``, ``joined``, ``lost`` and ``drained`` nodes."""
        return {
            "started": self.num_started,
            "joined": self.num_joined,
            "lost": self.num_lost,
            "drained": self.num_drained,
        }

    def is_up(self, node: NodeId) -> bool:
        """Whether ``node``, which may be the server, is up."""
        return node in self.facts and node not in self.down

    def name(self, node: NodeId) -> str:
        """Name a node and its place, for people."""
        return f"{'the server' if node == SERVER else f'node {node}'} ({self.facts[node].place})"

    def lose(self, node: NodeId, reason: str, number: int) -> str:
        """Record the loss of ``node`` in round ``number``; return a sentence about it."""
        self.down.add(node)
        self.num_lost += 1
        self._run.record("lost", round=number, node=node, reason=reason)
        return f"{self.name(node)} was lost in round {number}: {reason}"

    def leave(self, node: NodeId, number: int, nbytes: int) -> None:
        """Record that ``node`` left in round ``number``, as it was told to; ``nbytes`` of its state are kept."""
        self.down.add(node)
        self.num_drained += 1
        self._run.record("left", round=number, node=node, kept_nbytes=nbytes)

    def back(self, facts: NodeFacts) -> None:
        """Record that a node is up, again or for the first time."""
        self.facts[facts.node] = facts
        self.down.discard(facts.node)
        self.num_joined += 1
        self._run.record("up", node=facts.node, place=facts.place)

    def to_json(self) -> dict[str, Any]:
        """Return the nodes as plain data, for ``replace``."""
        return {"facts": [asdict(one) for one in self.facts.values()], "down": sorted(self.down)}

    def replace(self, facts: Mapping[NodeId, NodeFacts], down: Iterable[NodeId]) -> None:
        """Enter the nodes of a checkpoint whose processes go on; those in ``down`` were not up."""
        self.facts, self.down = dict(facts), set(down)
        self._counted = (0, 0, 0)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the counts from a checkpoint."""
        self.num_started, self.num_lost = state["started"], state["lost"]
        self.num_joined, self.num_drained = state["joined"], state["drained"]


class Residuals:
    """Follows the residuals of nodes: what their codecs have left out so far, and send later.

    A node that is lost takes its residual along.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.exist = False
        """Whether any node has ever had one."""
        self.unsent: dict[NodeId, float] = {}
        """The norm of each node's residual at its last commit."""
        self.lost: list[float] = []
        """The norms of those that were lost."""
        self._num_told = 0
        """Number of entries of ``lost`` that a round record already has."""

    def committed(self, reports: Mapping[NodeId, Returned]) -> None:
        """Take the norms from nodes that have committed a round."""
        self.unsent |= {node: report.unsent for node, report in reports.items()}
        self.exist |= any(report.unsent for report in reports.values())

    def forfeit(self, number: int, node: NodeId) -> None:
        """Record in round ``number`` that the residual of ``node`` is lost, if it had one."""
        norm = self.unsent.pop(node, 0.0)
        if norm:
            self.lost.append(norm)
            self._run.record("residual_lost", round=number, node=node, norm=norm)

    def untold(self) -> list[float]:
        """Return the norms that were lost since the last call."""
        found = self.lost[self._num_told :]
        self._num_told += len(found)
        return found

    @property
    def totals(self) -> dict[str, float]:
        """Totals for the summary: how many were lost, and the norm of all of them."""
        return {"residuals": len(self.lost), "residual_norm": math.hypot(*self.lost)}

    def to_json(self) -> list[float] | None:
        """Return the lost norms; None if no node has ever had a residual."""
        return list(self.lost) if self.exist else None

    def restore(self, lost: list[float] | None) -> None:
        """Go on from what ``to_json`` gave."""
        self.exist = lost is not None
        self.lost = lost or []
        self._num_told = len(self.lost)
