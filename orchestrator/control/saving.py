"""Decides when a run is saved, and hands its state to the writer of checkpoints."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER
from starling.orchestrator.checkpoints.schedule import MAIL, complete

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.schedule import Checkpointing
    from starling.orchestrator.control.members import Members
    from starling.orchestrator.control.messaging import Mail
    from starling.orchestrator.control.run_state import RunState


class Saving:
    """Saves a run between two rounds; does nothing in a run without checkpoints."""

    def __init__(self, state: RunState, checkpoints: Checkpointing | None) -> None:
        self._state = state
        self._checkpoints = checkpoints

    @property
    def counts(self) -> dict[str, int] | None:
        """Counts for the summary; None without checkpoints."""
        return None if self._checkpoints is None else self._checkpoints.counts

    def is_due(self) -> bool:
        """Whether the round that was committed last is to be saved now."""
        return self._checkpoints is not None and self._checkpoints.is_due(self._state.committed)

    def lacks_last(self) -> bool:
        """Wait, in bounded time, until all is written; whether the last commit is not, and can be."""
        checkpoints = self._checkpoints
        return checkpoints is not None and checkpoints.join() and not checkpoints.is_saved(self._state.committed)

    def is_last_saved(self) -> bool:
        """Whether the last commit is saved, or being saved."""
        return self._checkpoints is not None and self._checkpoints.is_saved(self._state.committed)

    def save(
        self,
        loop: Mapping[str, Any],
        nodes: Sequence[NodeId],
        shared: NodeId | None,
        mail: Mail,
        members: Members,
        begun: Collection[NodeId] = (),
    ) -> None:
        """Save the run as it is between two rounds, in the background.

        Args:
            loop: what the loop over rounds knows, as plain data.
            nodes: whose state is saved.
            shared: the node that gives the shared state; None: each has its own.
            mail: messages that wait.
            members: who comes and goes.
            begun: new nodes that have more than the initial state.
        """
        assert self._checkpoints is not None
        state, runtime = self._state, self._state.run.runtime
        began = time.monotonic()
        envelopes = mail.room.waiting()
        letters = runtime.messages.export(envelopes) if envelopes else iter(())
        needed = {SERVER}.intersection(nodes) if shared is None else {shared}
        states = complete(
            runtime.states.snapshot(nodes, shared, members.holdings.kept_alone(state.roster.down, begun)), needed
        )
        saved = itertools.chain(states, ((MAIL, export) for export in letters))
        state.run.record("saving", round=state.committed, nodes=sorted(nodes))
        mine: dict[str, Any] = {"progress": state.to_json(), "loop": loop, "mail": mail.room.to_json()}
        if runtime.standing is not None:
            mine |= {"processes": runtime.standing.to_json(), "members": members.to_json()}
        self._checkpoints.save(state.committed, {**state.run.observer.on_saving(), **mine}, saved)
        self._checkpoints.waited(time.monotonic() - began)
        self.note()

    def waited(self, seconds: float) -> None:
        """Count ``seconds`` for which the run stood still as part of the next checkpoint's cost."""
        if self._checkpoints is not None:
            self._checkpoints.waited(seconds)

    def restored(self) -> None:
        """Count from a resumption as from a checkpoint that was just made."""
        if self._checkpoints is not None:
            self._checkpoints.go_on()

    def hasten(self) -> None:
        """Finish what is being written, and ask a storage that fails only once from now on."""
        if self._checkpoints is not None:
            self._checkpoints.hasten()
            self._checkpoints.join()

    def finish(self) -> None:
        """Wait, in bounded time, until all is written, and record what came of it."""
        if self._checkpoints is not None:
            self._checkpoints.join()
            self.note()

    def note(self) -> None:
        """Record what has become of checkpoints."""
        if self._checkpoints is not None:
            outcomes, self._checkpoints.outcomes = self._checkpoints.outcomes, []
            for outcome in outcomes:
                self._state.run.record("checkpoint", **outcome)
