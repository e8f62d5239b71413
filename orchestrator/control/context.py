"""Context of a run: its configuration, runtime, observers, directory and clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starling.actors.wire.tickets import Failed
from starling.orchestrator.errors import NodeFailedError
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.runtimes.events import Log, Seen, Used

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Observer
    from starling.orchestrator.runtimes.events import Happening
    from starling.orchestrator.runtimes.interface import Runtime


class RunClock:
    """Measures how long a run has taken, the time before a resumption included."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._zero = 0.0
        """The runtime's clock when all nodes were up."""
        self._began = time.monotonic()

    def start(self) -> None:
        """Let ``elapsed_s`` count from now on: all nodes are up."""
        self._zero = self._runtime.now

    @property
    def elapsed_s(self) -> float:
        """Seconds on the runtime's clock since all nodes were up."""
        return self._runtime.now - self._zero

    @property
    def wall_s(self) -> float:
        """Seconds on the machine's clock since the run began."""
        return time.monotonic() - self._began

    def to_json(self) -> dict[str, Any]:
        """Return both times as plain data."""
        return {"elapsed_s": self.elapsed_s, "seconds": self.wall_s}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the clocks to the times at which a checkpoint was made, and the runtime's count of bytes too."""
        self._runtime.set_forward(state["elapsed_s"], state["transport_nbytes"])
        self._zero = self._runtime.now - state["elapsed_s"]
        self._began = time.monotonic() - state["seconds"]


def _always() -> None:
    pass


@dataclass(frozen=True)
class RunContext:
    """Facts of a run that never change; every part of the control loop has them."""

    config: Config
    runtime: Runtime
    observer: Observer
    run_id: str
    run_dir: str
    may_commit: Callable[[], None] = _always
    """Raises if this controller is no longer the one that decides."""
    clock: RunClock = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clock", RunClock(self.runtime))

    def record(self, what: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        """Add an event to the run's log."""
        self.observer.on_event({"event": what, "at_s": round(self.clock.elapsed_s, 6), **facts})

    def say(self, node: NodeId, text: str) -> None:
        """Add a line to the log of ``node``."""
        self.observer.on_log(node, (text,))

    def note(self, happening: Happening) -> bool:
        """Pass log lines, usage and clock readings on to the record; return whether ``happening`` was one of these.

        Raises:
            NodeFailedError: a program or a task raised.
        """
        match happening:
            case Log(node, lines):
                self.observer.on_log(node, lines)
            case Used(node, values):
                self.observer.on_usage(node, values)
            case Seen(node, values):
                self.record("seen", node=node, values=values)
            case Reached(_, Failed(message, traceback)):
                raise NodeFailedError(message, traceback)
            case _:
                return False
        return True
