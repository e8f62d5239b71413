"""Measures how long a node takes from its loss or start to its next commit, phase by phase."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.context import RunContext


@dataclass
class _Recovery:
    """Moments on the runtime's clock."""

    struck: float | None = None
    """Time of a scheduled fault; of other faults nobody knows the moment."""
    lost: float | None = None
    launched: float | None = None
    up: float | None = None
    import_s: float = 0.0
    transfer_s: float = 0.0


class Recoveries:
    """Follows nodes from their loss, or their start, to their first commit; writes one ``recovered`` event for each.

    The event's fields are seconds, or ``null`` without such a phase. They are ``detect`` from the fault to its notice,
    ``replace`` to the new process, ``import`` of code, data and model, ``transfer`` of state, and ``first_commit`` from
    there.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._open: dict[NodeId, _Recovery] = {}

    def to_json(self) -> dict[str, Any]:
        """Return open recoveries as plain data."""
        return {str(node): asdict(one) for node, one in self._open.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self._open = {int(node): _Recovery(**one) for node, one in state.items()}

    def struck(self, node: NodeId) -> None:
        """Note that a scheduled fault happens to ``node`` now."""
        self._open.setdefault(node, _Recovery()).struck = self._run.runtime.now

    def lost(self, node: NodeId) -> None:
        """Note that ``node`` is known to be gone."""
        struck = self._open.get(node, _Recovery()).struck
        self._open[node] = _Recovery(struck=struck, lost=self._run.runtime.now)

    def launched(self, nodes: Iterable[NodeId]) -> None:
        """Note that ``nodes`` are being started."""
        for node in nodes:
            self._open.setdefault(node, _Recovery()).launched = self._run.runtime.now

    def up(self, node: NodeId, import_s: float) -> None:
        """Note that ``node`` is up; ``import_s`` seconds of the time were its own."""
        recovery = self._open.setdefault(node, _Recovery())
        recovery.up, recovery.import_s = self._run.runtime.now, import_s

    def transferred(self, node: NodeId, seconds: float) -> None:
        """Add ``seconds`` in which ``node`` was given state."""
        if node in self._open:
            self._open[node].transfer_s += seconds

    def committed(self, number: int, nodes: Iterable[NodeId]) -> None:
        """Record the recoveries of ``nodes``, which have committed a round."""
        if not self._open:
            return
        now = self._run.runtime.now
        for node in [node for node in nodes if node in self._open and self._open[node].up is not None]:
            one = self._open.pop(node)
            assert one.up is not None
            began = next((at for at in (one.struck, one.lost, one.launched) if at is not None), one.up)
            phases = {
                "detect": None if one.struck is None or one.lost is None else one.lost - one.struck,
                "replace": None if one.launched is None else one.up - (one.lost or one.launched) - one.import_s,
                "import": one.import_s,
                "transfer": one.transfer_s,
                "first_commit": now - one.up - one.transfer_s,
            }
            seconds = {phase: None if value is None else round(max(value, 0.0), 6) for phase, value in phases.items()}
            self._run.record("recovered", round=number, node=node, seconds=seconds, total_s=round(now - began, 6))
