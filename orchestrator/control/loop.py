"""The skeleton of both loops over rounds: waits for what happens next, and takes what may happen at any time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from starling.orchestrator.control.members import Members
from starling.orchestrator.control.messaging import Mail
from starling.orchestrator.protocol.faults import Faults
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.events import Died, Halted, Retired

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import Any

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultEvent, FaultPhase
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover, Mailroom
    from starling.orchestrator.runtimes.events import Happening


class Loop(ABC):
    """A loop over rounds.

    Args:
        state: of the run.
        room: the mailboxes of its nodes.
        replicated: a node that comes back is given the last commit on top of what was kept of itself.
    """

    def __init__(self, state: RunState, room: Mailroom, *, replicated: bool) -> None:
        self._state = state
        self._roster = state.roster
        self._run = state.run
        self._config = state.run.config
        self._runtime = state.run.runtime
        self._faults = Faults(self._config.faults)
        self._mail = Mail(state, room, self._handed_over)
        self._members = Members(state, replicated=replicated, donors=self._donors, on_transfer=self._transfer_begins)
        self._halting: set[NodeId] = set()
        """Nodes that were cancelled and do not stand still yet."""
        self._is_restored = False
        self._same_processes = False
        """Whether the loop goes on from a checkpoint with the checkpoint's processes."""

    # --- what a loop is asked for ------------------------------------------------------------------------------------

    @abstractmethod
    def run(self) -> None:
        """Do all rounds."""

    @property
    @abstractmethod
    def result(self) -> tuple[NodeId, ...]:
        """The nodes whose mean model is the run's."""

    @abstractmethod
    def save(self) -> None:
        """Save the last commit; no program of a round is open, or what it does is void."""

    def restore(self, saved: Mapping[str, Any], rounds: Mapping[NodeId, int] | None) -> list[Envelope]:
        """Go on from a checkpoint, and return the messages that wait.

        Args:
            saved: what the controller had saved.
            rounds: the committed rounds of its nodes, which were started anew; None: processes go on as they were.
        """
        self._is_restored, self._same_processes = True, rounds is None
        if rounds is None:
            self._members.restore(saved["members"])
        self._restore(saved["loop"], rounds)
        return self._mail.room.restore(saved["mail"], exactly=rounds is None)

    def stand_still(self) -> None:
        """Cancel what runs, in bounded time: what was committed last can be saved then."""
        self._cancel()
        deadline = self._runtime.now + self._config.cluster.cancel_grace_s + 1.0
        while self._halting and self._runtime.now < deadline:
            happening = self._runtime.next(deadline)
            if happening is not None:
                self._take(happening)

    @property
    def in_flight(self) -> Sequence[Envelope]:
        """Messages that were sent and have not arrived."""
        return self._mail.room.in_flight

    # --- how the two loops differ ------------------------------------------------------------------------------------

    @abstractmethod
    def _restore(self, state: Mapping[str, Any], rounds: Mapping[NodeId, int] | None) -> None:
        """Go on from what ``save`` gave, as ``restore`` says."""

    @abstractmethod
    def _cancel(self) -> None:
        """Cancel all open rounds."""

    @abstractmethod
    def _round_of(self, node: NodeId) -> int:
        """Return the open round of ``node``, or its next one."""

    @abstractmethod
    def _gone(self, node: NodeId) -> None:
        """The process of ``node`` is gone; members do not know it yet."""

    @abstractmethod
    def _changed(self, happening: Happening) -> None:
        """Something happened to members, who know it."""

    @abstractmethod
    def _stands_still(self, node: NodeId) -> None:
        """A cancelled node stands still."""

    # --- what both do ------------------------------------------------------------------------------------------------

    def _wait(self, *moments: float | None) -> Happening | None:
        """Wait for what happens next, until the first of ``moments`` and of those of members and messages."""
        members = self._members
        ours = self._mail.next_timeout(), members.next_due(), members.departures.next_withdrawal()
        known = (moment for moment in (*moments, *ours) if moment is not None)
        return self._runtime.next(min(known, default=math.inf))

    def _take(self, happening: Happening) -> None:
        """Take what may happen at any time: to members, messages and the record."""
        if isinstance(happening, Died | Retired):
            self._halting.discard(happening.node)
            self._gone(happening.node)
        if self._members.take(self._state.committed + 1, happening):
            self._changed(happening)
            return
        match happening:
            case Halted(node):
                self._halting.discard(node)
                self._stands_still(node)
            case _:
                _ = self._run.note(happening) or self._mail.take(happening)

    def _halt(self, nodes: Collection[NodeId]) -> None:
        """Cancel the programs of ``nodes``, which go back to their last commit."""
        self._halting.update(nodes)
        if nodes:
            self._runtime.programs.halt(list(nodes))

    def _strike(self, phase: FaultPhase, number: int, node: NodeId | None = None) -> None:
        """Let the scheduled faults of this moment of round ``number`` happen, on ``node`` alone if it is given."""
        self._suffer(self._faults.due(number, phase, node), number)

    def _suffer(self, events: Iterable[FaultEvent], number: int) -> None:
        for event in events:
            self._members.suffer(event, number)

    def _donors(self) -> Sequence[NodeId]:
        """Return the nodes that can give the last commit.

        Where none that made it is left, those can that got it since: they have the same bits.
        """
        return self.result or sorted(self._members.holdings.loaded.difference(self._roster.down))

    def _transfer_begins(self, joiner: NodeId, donor: NodeId) -> None:
        for node in (joiner, donor):
            self._strike("transfer", self._round_of(node), node)

    def _handed_over(self, handover: Handover) -> None:
        if isinstance(handover.outcome, Delivery):
            self._strike("receive", self._round_of(handover.node), handover.node)
