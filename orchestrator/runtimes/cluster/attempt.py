"""The running attempt at a round on Ray, and guards against late answers to calls of earlier ones."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.events import Event
    from starling.orchestrator.runtimes.cluster.actors import Handler
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop


class RunningAttempt:
    """Epoch and members of the running attempt.

    Args:
        loop: reports events.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self.epoch = -1
        self.members: tuple[NodeId, ...] = ()
        self._starts: Counter[NodeId] = Counter()

    def begin(self, epoch: int, members: tuple[NodeId, ...], nodes: Iterable[NodeId]) -> None:
        """Begin an attempt on ``nodes``: everything that was to happen to them before is void."""
        self.epoch, self.members = epoch, members
        self.interrupt(nodes)

    def interrupt(self, nodes: Iterable[NodeId]) -> None:
        """Void what ``still`` guards for ``nodes``."""
        self._starts.update(nodes)

    def timely(self, handler: Handler) -> Handler:
        """Wrap a handler so that it does nothing once another attempt has begun: late calls still return."""
        epoch = self.epoch
        return lambda actor, result: handler(actor, result) if epoch == self.epoch else None

    def still(self, node: NodeId, call: Callable[[], None]) -> Callable[[], None]:
        """Wrap a function so that it does nothing once ``node`` has been begun or halted."""
        starts = self._starts[node]
        return lambda: call() if starts == self._starts[node] else None

    def report_at(self, when: float | None, event: Event) -> None:
        """Report the end of a transfer at a moment (None: now), unless another attempt has begun by then."""
        epoch = self.epoch
        self._loop.at(when, lambda: self._loop.report(event) if epoch == self.epoch else None)
