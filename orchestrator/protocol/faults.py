"""Scheduled faults: which events of `faults.events` are due at a moment of a round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultEvent, FaultPhase, FaultsConfig


class Faults:
    """Hands out each scheduled event once, however often its round is tried."""

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
        """Return the events of this moment, those of ``node`` alone if it is given."""
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
        """Return the late joins of round ``number`` of the run."""
        due = [event for event in self._pending if event.kind == "late_join" and event.round == number]
        self._pending = [event for event in self._pending if event not in due]
        return due

    def missed(self, number: int) -> list[FaultEvent]:
        """Return the events of round ``number``, which is over, whose moment never came."""
        missed = [event for event in self._pending if event.round == number]
        self._pending = [event for event in self._pending if event.round != number]
        return missed

    def to_json(self) -> list[dict[str, Any]]:
        """Return the events that are still to come, as in the configuration."""
        return [event.model_dump(mode="json") for event in self._pending]
