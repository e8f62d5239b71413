"""Which nodes are started again, and when. A policy: it says what is due; the loops over rounds and the runtime act."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from algorithms.api import NodeId

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 60.0
_MAX_CRASHES = 5


@dataclass
class _Lost:
    """A node that is gone."""

    num_crashes: int
    """Since it last committed a round."""
    due: float | None
    """When it is to be started again; ``None``: it is being started, or never."""


class Replacements:
    """Starts lost nodes again: at once the first time, later each time after twice as long.

    A node that dies again and again without committing a round between is given up: something is wrong with its
    machine, its data or the program, and to go on trying would hide it.
    """

    def __init__(self) -> None:
        self._lost: dict[NodeId, _Lost] = {}

    def lost(self, node: NodeId, now: float) -> bool:
        """``node`` has died; say whether it is to be started again."""
        known = self._lost.setdefault(node, _Lost(0, None))
        known.num_crashes += 1
        delay = 0.0 if known.num_crashes == 1 else min(_FIRST_DELAY_S * 2 ** (known.num_crashes - 2), _MAX_DELAY_S)
        given_up = known.num_crashes > _MAX_CRASHES
        known.due = None if given_up else now + delay
        return not given_up

    def committed(self, nodes: tuple[NodeId, ...]) -> None:
        """``nodes`` have committed a round: what was before is forgiven."""
        for node in nodes:
            self._lost.pop(node, None)

    def due(self, now: float) -> tuple[NodeId, ...]:
        """The nodes to be started now, sorted; each is named once."""
        due = sorted(node for node, one in self._lost.items() if one.due is not None and one.due <= now)
        for node in due:
            self._lost[node].due = None
        return tuple(due)

    def next_due(self) -> float | None:
        """When ``due`` is to be asked again."""
        return min((one.due for one in self._lost.values() if one.due is not None), default=None)
