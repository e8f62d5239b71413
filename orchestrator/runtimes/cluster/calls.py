"""Calls of processes, and what comes of them. Base of ``processes.Processes``.

Every call's completion arrives in one queue and is handled in the controller's thread, so nothing there needs a lock.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ray import ObjectRef

    from starling.actors.remote.messages import Ready
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.events import Happening

POLL_S = 1.0
"""Longest wait for a single happening: keeps Ctrl-C and progress lively."""


@dataclass
class Actor:
    """One process and the nodes in it."""

    index: int
    nodes: tuple[NodeId, ...]
    """None while it stands by."""
    handle: Any
    launched: float
    incarnation: int = 0
    """Of its nodes: how often they had been embodied before."""
    placed: bool = False
    """Ray has found room for it."""
    ready: Ready | None = None
    alive: bool = True
    leaving: bool = False
    """It has had notice of its end."""
    is_asked: bool = False
    """What it uses; it has not answered yet."""

    @property
    def is_spare(self) -> bool:
        """Whether it stands by, or is being started for that."""
        return self.alive and not self.nodes


Handler: TypeAlias = "Callable[[Actor, Any], None]"


class Calls(ABC):
    """What was asked of processes and has not been answered, and what is to be done later."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: deque[Happening] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer = itertools.count()

    @property
    def now(self) -> float:
        return time.monotonic()

    @abstractmethod
    def _lost(self, actor: Actor, error: BaseException) -> None:
        """A call failed."""

    def _call(
        self, actor: Actor, ref: ObjectRef[Any], handler: Handler, on_error: Callable[[], None] | None = None
    ) -> None:
        """Handle a call's (small) result in the controller's thread, when it is there."""

        def done(future: Future[Any]) -> None:
            self._queue.put(lambda: self._on_done(actor, future, handler, on_error))

        future: Future[Any] = ref.future()
        future.add_done_callback(done)

    def _on_done(
        self, actor: Actor, future: Future[Any], handler: Handler, on_error: Callable[[], None] | None
    ) -> None:
        error = future.exception()
        if error is None:
            handler(actor, future.result())
            return
        if actor.alive:
            self._lost(actor, error)
        if on_error is not None:
            on_error()

    def next(self, until: float) -> Happening | None:
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

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        """Do something later, in the controller's thread."""
        heapq.heappush(self._timers, (self.now + seconds, next(self._timer), call))
