"""The event loop of the controller's thread on Ray: completed calls, timers, and events to be reported.

All completions arrive in one queue and are handled in the controller's thread, so no handler needs a lock.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from ray import ObjectRef

    from starling.orchestrator.runtimes.events import Happening

POLL_S = 1.0
"""Longest single wait: keeps Ctrl-C and progress lively."""


class EventLoop:
    """Runs completions and timers until there is an event to report.

    Args:
        clock: returns seconds; tests set their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: deque[Happening] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer = itertools.count()

    @property
    def now(self) -> float:
        """Seconds on the clock."""
        return self._clock()

    def report(self, *happenings: Happening) -> None:
        """Append events that ``next`` returns."""
        self._ready.extend(happenings)

    def report_first(self, happenings: Iterable[Happening]) -> None:
        """Put events before all others, in their order."""
        self._ready.extendleft(reversed(list(happenings)))

    def submit(self, call: Callable[[], None]) -> None:
        """Run a function in the controller's thread. May be called from any thread."""
        self._queue.put(call)

    def when_done(
        self, ref: ObjectRef[Any], on_result: Callable[[Any], None], on_error: Callable[[BaseException], None]
    ) -> None:
        """Run ``on_result`` with a remote call's (small) result, or ``on_error`` with its exception, once it ends."""

        def handle(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                on_result(future.result())
            else:
                on_error(error)

        future: Future[Any] = ref.future()
        future.add_done_callback(lambda future: self.submit(lambda: handle(future)))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Run a function in ``seconds``."""
        heapq.heappush(self._timers, (self.now + seconds, next(self._timer), call))

    def at(self, when: float | None, call: Callable[[], None]) -> None:
        """Run a function at a moment, or at once if that is past or None."""
        if when is None or when <= self.now:
            call()
        else:
            self.after(when - self.now, call)

    def next(self, until: float) -> Happening | None:
        """Return the next event, or None when the clock has reached ``until``."""
        while True:
            while self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            if self._ready:
                return self._ready.popleft()
            wait = min(until - self.now, POLL_S)
            if self._timers:
                wait = min(wait, self._timers[0][0] - self.now)
            try:
                self._queue.get(timeout=max(wait, 0.0))()
            except queue.Empty:
                if self.now >= until:
                    return None
