"""Waits, in bounded time, for as many nodes as a run needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from starling.algorithms.words import listed
from starling.orchestrator.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Collection

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.members import Members
    from starling.orchestrator.control.run_state import RunState

NOBODY_COMES = "the others have failed too often to be started again"
"""Why a run does not wait for nodes, as the end of a sentence."""


class MinNodes:
    """Compares the nodes that are up, and those that can come, with ``cluster.nodes.min`` and the aggregator's need."""

    def __init__(self, state: RunState, members: Members) -> None:
        self._state = state
        self._members = members
        self._cluster = state.run.config.cluster
        self.wanted = 0
        """Nodes without which the round, begun once, could not be finished: its aggregator needs as many."""
        self.since: float | None = None
        """Start of the shortage of nodes, or None, in a run that waits with ``deadline``."""

    @property
    def _least(self) -> int:
        return max(self._cluster.nodes.min, self.wanted)

    @property
    def are_missing(self) -> bool:
        """Whether there are too few nodes."""
        return len(self._state.roster.nodes) < self._least

    @property
    def are_out_of_reach(self) -> bool:
        """Whether there are too few even with all that may come."""
        most = self._members.most_possible()
        return most is not None and most < self._least

    def __str__(self) -> str:
        """Say how many nodes there are, and how many are needed by whom."""
        least, there = self._cluster.nodes.min, len(self._state.roster.nodes)
        if there < least or not self.wanted:
            return f"{there} nodes are there, and cluster.nodes.min is {least}"
        return f"{there} nodes are there, and the round's aggregator needs {self.wanted}"

    def give_up(self, number: int, halting: Collection[NodeId]) -> NoReturn:
        """End a run that has waited long enough before round ``number``.

        Raises:
            RunError: says who is missing, or does not become ready.
        """
        what = str(self)
        if not self.are_missing:
            what = f"nodes {listed(sorted(self._unready(halting)))} do not become ready"
        raise RunError(f"round {number}: {what}; {self._waited}")

    def give_up_joiners(self, halting: Collection[NodeId]) -> bool:
        """Give up the nodes that are being given state, for too long; return False if those that are ready are too few.

        A run goes on without them: they are started again, as often as others that die.
        """
        pending = self._members.transfers.pending
        ready = set(self._state.roster.nodes) - self._unready(halting)
        if not pending or len(ready) < self._least:
            return False
        for node in pending:
            reason = f"it was not given the model within {self._cluster.min_nodes_timeout_s:g} s"
            self._state.run.runtime.processes.give_up(node, f"{reason} (cluster.min_nodes_timeout_s)")
        return True

    def _unready(self, halting: Collection[NodeId]) -> set[NodeId]:
        members = self._members
        return {*halting, *members.transfers.pending, *members.departures.leaving}

    @property
    def _waited(self) -> str:
        return f"waited for {self._cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"

    def deadline(self, *, more_join: bool) -> float | None:
        """Return until when to wait for the missing nodes, None if none are missing.

        Args:
            more_join: nodes that the configuration lets join later may come in time.

        Raises:
            RunError: it is over, or too few can come.
        """
        if not self.are_missing:
            self.since = None
            return None
        now, patience_s = self._state.run.runtime.now, self._cluster.min_nodes_timeout_s
        self.since = now if self.since is None else self.since
        if self.are_out_of_reach and not more_join:
            raise RunError(f"{self}; {NOBODY_COMES}")
        if self.since + patience_s <= now:
            raise RunError(f"{self}; {self._waited}")
        return self.since + patience_s
