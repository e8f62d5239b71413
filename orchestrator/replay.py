"""Replay: a run's log decides what a simulation would leave to time, so that it ends with the run's own bits.

What a cluster decides by who came first is in ``events.jsonl``: of asynchronous runs, which message each node received
next and what its programs saw of the clock; of synchronous ones, who was in each exchange, and who was too late.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from algorithms.api import SERVER, Left, Timeout, View
from orchestrator.asynchronous import Asynchronous
from orchestrator.controller import Controller
from orchestrator.errors import ConfigError, RunError
from orchestrator.events import Deadline, Post
from orchestrator.mailroom import Envelope, Mailroom
from orchestrator.rendezvous import Phase
from orchestrator.runtime import Finished
from orchestrator.synchronous import Synchronous

if TYPE_CHECKING:
    from actors.tickets import Returned
    from algorithms.api import NodeId
    from orchestrator.config import Config
    from orchestrator.events import Event
    from orchestrator.progress import Progress
    from orchestrator.records import Observer
    from orchestrator.runtime import Happening
    from orchestrator.simulator import Simulator
    from orchestrator.synchronous import Attempt


@dataclass
class History:
    """What a run's log says."""

    path: Path
    digest: str | None
    """That the run ended with."""
    received: defaultdict[NodeId, deque[tuple[int, int, int] | Left | Timeout]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    seen: defaultdict[NodeId, list[float]] = field(default_factory=lambda: defaultdict(list))
    rounds: defaultdict[NodeId, int] = field(default_factory=lambda: defaultdict(int))
    """Committed by each node of an asynchronous run."""
    last: NodeId = 0
    """The node, not the server, that committed last."""
    views: dict[tuple[NodeId, int], View] = field(default_factory=dict)
    """From which round of a node on it had another view."""
    lost: set[NodeId] = field(default_factory=set)
    closed: dict[int, dict[int, tuple[NodeId, ...]]] = field(default_factory=dict)
    """Of each round: who was in which exchange."""
    late: defaultdict[int, set[NodeId]] = field(default_factory=lambda: defaultdict(set))
    """Of each round: who was cancelled."""

    @staticmethod
    def read(run_dir: str | Path) -> History:
        """Read the log of a finished run.

        Raises:
            ConfigError: there is none, or it is not whole.
        """
        path = Path(run_dir)
        try:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            lines = (path / "events.jsonl").read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines]
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
            raise ConfigError(f"--replay {path}: {reason}; it takes the directory of a finished run") from None
        except ValueError as error:
            raise ConfigError(f"--replay {path}: its log is damaged ({error})") from None
        if summary.get("status") != "finished":
            raise ConfigError(
                f"--replay {path}: that run is {summary.get('status')}, and only a finished one has an end"
            )
        history = History(path, summary.get("digest"))
        for event in events:
            history._take(event)
        if history.lost and history.closed:
            raise ConfigError(f"--replay {path}: that run lost nodes, and replaying a synchronous one is not built yet")
        return history

    def _take(self, event: dict[str, Any]) -> None:
        node = event.get("node", 0)
        match event["event"]:
            case "received":
                self.received[node].append(_outcome(event["outcome"]))
            case "seen":
                self.seen[node] += event["values"]
            case "view":
                members, left = tuple(event["members"]), tuple(event["left"])
                self.views[node, event["round"]] = View(event["number"], members, left=left)
            case "lost":
                self.lost.add(node)
            case "late":
                self.late[event["round"]].add(node)
            case "commit" if "closed" in event:
                self.closed[event["round"]] = {int(seq): tuple(nodes) for seq, nodes in event["closed"].items()}
            case "commit":
                self.rounds[node] += 1
                self.last = self.last if node == SERVER else node
            case _:
                pass


def _outcome(logged: Any) -> tuple[int, int, int] | Left | Timeout:  # noqa: ANN401 - from JSON
    if logged == "timeout":
        return Timeout()
    if isinstance(logged, dict):
        return Left(logged["left"])
    sender, number, place = logged
    return sender, number, place


class ReplayController(Controller):
    """Drives a simulation as a log says."""

    def __init__(
        self, config: Config, runtime: Simulator, observer: Observer, history: History, *, run_id: str, run_dir: str
    ) -> None:
        super().__init__(config, runtime, observer, run_id=run_id, run_dir=run_dir)
        self._simulator = runtime
        self._history = history

    def _loop(self) -> Synchronous | Asynchronous:
        if self._progress.config.algorithm.synchronous:
            return SynchronousReplay(self._progress, self._history)
        self._simulator.host.times.replay(self._history.seen)
        return AsynchronousReplay(self._progress, self._history)


class ReplayRoom(Mailroom):
    """Hands messages over in the order of the log."""

    def __init__(self, history: History, nodes: tuple[NodeId, ...]) -> None:
        super().__init__(nodes)
        self._expected = history.received

    def receive(self, node: NodeId, timeout_s: float | None, now: float) -> list[Any]:
        """Wait for what the log says comes next, however long that takes here."""
        del timeout_s
        return super().receive(node, None, now)

    def _choose(self, node: NodeId, queue: deque[Envelope | Left | Timeout]) -> Envelope | Left | Timeout | None:
        expected = self._expected[node]
        if not expected:
            return None
        what = expected[0]
        if isinstance(what, tuple):
            found = next((one for one in queue if isinstance(one, Envelope) and one.key == what), None)
            if found is None:
                return None
            queue.remove(found)
            expected.popleft()
            return found
        expected.popleft()
        return what


class AsynchronousReplay(Asynchronous):
    """Every node does the rounds that it committed, and what its last messages needed."""

    def __init__(self, progress: Progress, history: History) -> None:
        super().__init__(progress, ReplayRoom(history, tuple(progress.facts)))
        self._history = history
        self._views: dict[NodeId, View] = {}

    @property
    def result(self) -> tuple[NodeId, ...]:
        if self._config.algorithm.has_server:
            return (SERVER,)
        if self._config.algorithm.result == "last":
            return (self._history.last,)
        return tuple(node for node in self._progress.nodes if node not in self._history.lost)

    def _is_over(self) -> bool:
        return all(self._rounds[node] >= count for node, count in self._history.rounds.items())

    def _view_of(self, node: NodeId, number: int) -> View:
        self._views[node] = self._history.views.get((node, number), self._views.get(node, self._view))
        return self._views[node]

    def _commit(self, node: NodeId, report: Returned) -> None:
        if self._rounds[node] < self._history.rounds[node]:
            super()._commit(node, report)

    def _step(self) -> None:
        if self._mail.room.stuck(self._mail.room.nodes):
            message = (
                f"--replay {self._history.path}: its log does not fit its configuration and this version of the code"
            )
            raise RunError(message)
        super()._step()


class SynchronousReplay(Synchronous):
    """Who was too late is so again: what it would contribute is held back until the others have posted."""

    def __init__(self, progress: Progress, history: History) -> None:
        super().__init__(progress)
        self._history = history

    def _note(self, attempt: Attempt, happening: Happening) -> Event | None:
        late = self._history.late[attempt.number]
        closed = self._history.closed.get(attempt.number, {})
        match happening:
            case Post(node, seq) if node in late and node not in closed.get(seq, ()):
                return None
            case Finished(node) if node in late:
                return None
            case Post():
                # The log knows when it closed; its policy is not asked again.
                return replace(happening, close=None)
            case _:
                return super()._note(attempt, happening)

    def _next(self, attempt: Attempt) -> Event | None:
        return Deadline() if self._only_late_are_missing(attempt) else super()._next(attempt)

    def _only_late_are_missing(self, attempt: Attempt) -> bool:
        rendezvous, late = attempt.rendezvous, self._history.late[attempt.number]
        if not late & rendezvous.active:
            return False
        punctual = rendezvous.active - late
        closed = self._history.closed.get(attempt.number, {})
        for seq, exchange in rendezvous.exchanges.items():
            if exchange.phase is Phase.OPEN and exchange.waiting:
                expected = punctual | (late & rendezvous.active & set(closed.get(seq, ())))
                return expected <= exchange.posts.keys()
        return punctual <= rendezvous.returned.keys()
