"""Scheduled faults: what `faults.events` says is to happen, at which moment of which round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultEvent, FaultPhase, FaultsConfig


class Faults:
    """Tells what is due; each event happens once, however often its round is tried."""

    def __init__(self, config: FaultsConfig) -> None:
        self._pending = list(config.events)

    @property
    def is_pending(self) -> bool:
        """Whether any are to come."""
        return bool(self._pending)

    @property
    def brings_nodes(self) -> bool:
        """Whether a node is to join in a later round."""
        return any(event.kind == "late_join" for event in self._pending)

    def due(self, number: int, phase: FaultPhase, node: NodeId | None = None) -> list[FaultEvent]:
        """The events of this moment: of ``node`` alone, if the moment is one node's."""
        if not self._pending:
            return []
        due = [
            event
            for event in self._pending
            if (event.round, event.phase) == (number, phase) and node in (None, event.who)
        ]
        self._pending = [event for event in self._pending if event not in due]
        return due

    def late_joins(self, number: int) -> list[FaultEvent]:
        """Who joins late, in round ``number`` of the run."""
        due = [event for event in self._pending if event.kind == "late_join" and event.round == number]
        self._pending = [event for event in self._pending if event not in due]
        return due

    def missed(self, number: int) -> list[FaultEvent]:
        """The events of round ``number``, which is over, that never were due."""
        missed = [event for event in self._pending if event.round == number]
        self._pending = [event for event in self._pending if event.round != number]
        return missed

    def to_json(self) -> list[dict[str, Any]]:
        """The events that are still to come, as in the configuration."""
        return [event.model_dump(mode="json") for event in self._pending]
