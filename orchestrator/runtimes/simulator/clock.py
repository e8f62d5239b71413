"""The virtual clock: what happens when on simulated nodes, in the same order in every run."""

from __future__ import annotations

import heapq
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from starling.orchestrator.runtimes.simulator.state import read, written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope
    from starling.orchestrator.runtimes.events import Happening
    from starling.orchestrator.runtimes.simulator.state import Coming

Item: TypeAlias = "tuple[NodeId, int, Coming | None, int, object, int | None]"
"""An event or a resumption that is due at one moment; sorted by (node, arrival).

Of an event, the third is the event and the fourth its epoch, or ``ALWAYS``. Where a program runs on, the third is None,
the fourth the node's attempt, the fifth the result; the sixth names the exchange whose result it is instead.
"""

ALWAYS = -1
"""The epoch of events that concern no attempt at a round."""


class VirtualClock:
    """Schedules events and resumptions of programs, and holds the events to be reported."""

    def __init__(self) -> None:
        self.now = 0.0
        self.epoch = ALWAYS
        """Counts attempts at rounds: steps of exchanges of an earlier one are void."""
        self.attempts: dict[NodeId, int] = {}
        """Number of times that each node's program was begun or stopped; resumptions of an earlier attempt are void."""
        self.ready: deque[Happening] = deque()
        """Events to be reported now."""
        self._times: list[float] = []
        """A heap of the keys of the queue."""
        self._queue: dict[float, list[Item]] = {}
        self._arrival = 0

    def at(self, when: float, node: NodeId, what: Coming, epoch: int = ALWAYS) -> None:
        """Schedule an event that concerns ``node``."""
        self._arrival += 1
        self._moment(when).append((node, self._arrival, what, epoch, None, None))

    def resume_at(self, when: float, node: NodeId, result: object = None, seq: int | None = None) -> None:
        """Schedule that a node's program runs on, with ``result`` or that of exchange ``seq``."""
        self._arrival += 1
        self._moment(when).append((node, self._arrival, None, self.attempts[node], result, seq))

    def _moment(self, when: float) -> list[Item]:
        moment = self._queue.get(when)
        if moment is None:
            moment = self._queue[when] = []
            heapq.heappush(self._times, when)
        return moment

    def interrupt(self, node: NodeId) -> None:
        """Void what is scheduled for a node's program."""
        self.attempts[node] = self.attempts.get(node, 0) + 1

    def advance(self, until: float) -> list[Item] | None:
        """Go on to the next moment and return what is due, in order; None, at ``until``, if there is none by then."""
        if not self._times or self._times[0] > until:
            assert until < float("inf"), "every program waits, and nothing is on its way"
            self.now = max(self.now, until)
            return None
        self.now = heapq.heappop(self._times)
        return sorted(self._queue.pop(self.now))

    def to_json(self) -> dict[str, Any]:
        """Return the events that outlive a round as plain data, in the order in which they were scheduled."""
        items = (
            (arrival, when, node, what) for when, those in self._queue.items() for node, arrival, what, *_ in those
        )
        coming = [(when, node, what) for _, when, node, what in sorted(items, key=itemgetter(0)) if what is not None]
        return {
            "ready": [form for what in self.ready if (form := written(what)) is not None],
            "queue": [[when, node, form] for when, node, what in coming if (form := written(what)) is not None],
        }

    def bring_back(self, state: Mapping[str, Any], in_flight: Mapping[tuple[int, ...], Envelope]) -> None:
        """Schedule the events of ``to_json`` again; ``in_flight`` are messages by key and attempt."""
        ready = (read(form, in_flight) for form in state["ready"])
        self.ready.extend(cast("Happening", what) for what in ready if what is not None)
        for when, node, form in state["queue"]:
            what = read(form, in_flight)
            if what is not None:
                self.at(when, node, what)
