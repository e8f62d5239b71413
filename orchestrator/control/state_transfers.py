"""Gives nodes the last committed state: from what was kept of them, and from donors.

Only a node that has the last committed round can be a donor: one that is new can never overwrite the model. Several
joiners are spread over several donors. A donor that dies meanwhile is followed by another.

A transfer may fail before its donor's death is known, or though the donor lives. So a present donor is asked again
before the run ends for want of a donor.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.algorithms.words import listed
from starling.orchestrator.errors import RunError
from starling.orchestrator.runtimes.events import Loaded, NotLoaded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starling.actors.data import Position
    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.recovery_times import Recoveries
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.runtimes.events import Happening


@dataclass
class _Joiner:
    """A node on its way to the committed state."""

    number: int
    """Round that it is to join."""
    began: float
    place: int
    position: Position | None
    refused: Counter[NodeId] = field(default_factory=Counter)
    """Transfers that failed, by donor."""
    catches_up: bool = True
    """Whether the node may still try to repeat the rounds that it missed, which needs no donor's state."""
    kept: int | None = None
    """Round of the node's own kept state, or None."""
    restored: bool = False
    """Whether the node has its own kept state again."""
    waits: bool = False
    """Whether the node waits for a donor to appear."""
    again_at: float = -math.inf
    """Earliest time, on the runtime's clock, at which a donor is asked again."""


_MOST_FAILURES = 3
"""Transfers from one donor to one joiner."""
_PAUSE_S = 1.0
"""Seconds before a donor is asked again: by then a donor's death is usually known."""


class Transfers:
    """The transfers that are under way.

    Args:
        state: of the run.
        recoveries: told how long each took.
        replicated: what was kept of a node itself is old when others have committed since, and a donor's comes on top.
        donors: who has what was committed last.
        is_kept: whether somebody else than this node will come back with what was committed last, from what was kept.
        on_begin: told of each transfer: to whom, and from whom.
    """

    def __init__(
        self,
        state: RunState,
        recoveries: Recoveries,
        *,
        replicated: bool,
        donors: Callable[[], Sequence[NodeId]],
        is_kept: Callable[[NodeId], bool],
        on_begin: Callable[[NodeId, NodeId], None],
    ) -> None:
        self._state = state
        self._run = state.run
        self._runtime = state.run.runtime
        self._recoveries = recoveries
        self._replicated = replicated
        self._donors = donors
        self._is_kept = is_kept
        self._on_begin = on_begin
        self._joiners: dict[NodeId, _Joiner] = {}

    @property
    def pending(self) -> tuple[NodeId, ...]:
        """Nodes that are being given state, sorted."""
        return tuple(sorted(self._joiners))

    @property
    def is_moving(self) -> bool:
        """Whether any node is being given state, and does not only wait for a donor."""
        return any(not joiner.waits for joiner in self._joiners.values())

    def begin(self, number: int, node: NodeId, position: Position | None, kept: int | None) -> None:
        """Give ``node`` the committed state, that of its own from round ``kept`` first; its data go on at ``position``.

        Raises:
            RunError: nobody has it.
        """
        joiner = _Joiner(number, self._runtime.now, len(self._joiners), position, kept=kept)
        self._joiners[node] = joiner
        if kept is None or not self._runtime.states.restore(node):
            self._ask_donor(node, joiner)

    def _ask_donor(self, node: NodeId, joiner: _Joiner) -> None:
        there = [donor for donor in self._donors() if donor != node]
        donors = [donor for donor in there if donor not in joiner.refused]
        joiner.waits = not donors and self._is_kept(node)
        if joiner.waits:
            joiner.refused.clear()  # who could not give may be who comes back
            return
        again = [donor for donor in there if joiner.refused[donor] < _MOST_FAILURES]
        if not donors and again:
            joiner.waits = self._runtime.now < joiner.again_at
            if joiner.waits:
                return
            donors = again
        if not donors:
            del self._joiners[node]
            committed = self._state.committed
            which = f"the model of round {committed}" if committed >= 0 else "a model that was trained"
            if there:
                failed = f"{_MOST_FAILURES} transfers from each of nodes {listed(sorted(there))} failed"
                raise RunError(f"round {joiner.number}: node {node} cannot be given {which}: {failed}")
            raise RunError(f"round {joiner.number}: no node is left that has {which}")
        donor = donors[joiner.place % len(donors)]
        # Kept state says itself where the node's data go on.
        position = None if joiner.restored else joiner.position
        transcript = self._state.sealed.transcript(self._state.committed) if joiner.catches_up else None
        if transcript is None:
            self._runtime.states.transfer(node, donor, position)
        else:
            # Whoever cannot, says so, and is given a donor's state then.
            joiner.catches_up = False
            self._runtime.states.replay(node, donor, *transcript, position)
        self._on_begin(node, donor)

    def next_due(self) -> float | None:
        """Return when to ``retry`` next for the sake of time; None: not before something happens."""
        now = self._runtime.now
        return min((one.again_at for one in self._joiners.values() if one.waits and one.again_at > now), default=None)

    def retry(self) -> None:
        """Ask again for nodes for which there was no donor.

        Raises:
            RunError: nobody has it any more.
        """
        for node in [node for node, joiner in self._joiners.items() if joiner.waits]:
            self._ask_donor(node, self._joiners[node])

    def take(self, happening: Happening) -> tuple[NodeId, bool] | None:
        """Take what concerns transfers; return who has got all now, and whether it lacks nothing that it ever had."""
        match happening:
            case Loaded(node, source, nbytes) if node in self._joiners:
                return self._loaded(node, source, nbytes)
            case NotLoaded(node, source) if node in self._joiners:
                joiner = self._joiners[node]
                if source != node:
                    joiner.refused[source] += 1
                    joiner.again_at = self._runtime.now + _PAUSE_S
                self._ask_donor(node, joiner)
            case _:
                pass
        return None

    def gone(self, node: NodeId) -> None:
        """``node`` is gone, and needs nothing."""
        self._joiners.pop(node, None)

    def _loaded(self, node: NodeId, source: NodeId, nbytes: int) -> tuple[NodeId, bool] | None:
        joiner, state = self._joiners[node], self._state
        seconds = round(self._runtime.now - joiner.began, 6)
        state.ledger.book("recovery", nbytes)
        self._run.record(
            "transfer",
            round=joiner.number,
            node=node,
            donor=source,
            nbytes=nbytes,
            seconds=seconds,
            position=joiner.position,
        )
        if source == node:
            joiner.restored = True
            if self._replicated and joiner.kept != state.committed:
                self._ask_donor(node, joiner)
                return None
        del self._joiners[node]
        self._recoveries.transferred(node, seconds)
        # Without a barrier everybody's last round is its own.
        is_last = joiner.kept == state.committed or not self._run.config.algorithm.synchronous
        return node, source == node and is_last
