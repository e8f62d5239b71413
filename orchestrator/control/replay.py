"""Replay: a run's log decides what a simulation would leave to time, so that it ends with the run's own bits.

``events.jsonl`` has a cluster's decisions by order of arrival. For asynchronous runs these are the order of each node's
messages, and the clock readings of its programs. For synchronous runs they are the members of each exchange, lost and
late nodes, replacements, and the donors of their state.

Attempts that were given up are not repeated. They leave traces in the optimizers' memory alone, and with
``optimizer.rollback: true`` none. Without rollback, a replay with given-up attempts or cancelled nodes has the run's
bits if the optimizer has no memory.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from starling.actors.data import Place, Position
from starling.actors.wire.tickets import Posted, Returned
from starling.algorithms.api import SERVER, Left, Timeout, View
from starling.orchestrator.config.sections import FaultsConfig
from starling.orchestrator.control.asynchronous import Asynchronous
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.control.node_rounds import NodeRounds
from starling.orchestrator.control.synchronous import Synchronous
from starling.orchestrator.errors import ConfigError, RunError
from starling.orchestrator.protocol.events import Posts, Reached, Returns, Withdrawn
from starling.orchestrator.protocol.exchange import Phase
from starling.orchestrator.protocol.mailboxes import Envelope, Mailroom
from starling.orchestrator.records import event_lines, run_files
from starling.orchestrator.runtimes.events import Loaded, NotLoaded, Retired, Up
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.loop import Loop
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.control.synchronous import Attempt
    from starling.orchestrator.protocol.events import Event
    from starling.orchestrator.records.observers import Observer
    from starling.orchestrator.runtimes.events import Happening
    from starling.orchestrator.runtimes.simulator.runtime import Simulator


Step: TypeAlias = (
    "tuple[Literal['left', 'left empty', 'up'], NodeId] | tuple[Literal['transfer'], NodeId, NodeId, Position | None]"
)
"""Events between two rounds: a node leaves, comes up, or is given another's state or its own."""


_NEVER_S = 1e9


@dataclass(frozen=True)
class Done:
    """The attempt at a round that was committed."""

    steps: list[Step]
    """Steps recorded before the round."""
    view: View
    joiners: frozenset[NodeId]
    closed: dict[int, tuple[NodeId, ...]]
    """Contributors of each exchange."""
    late: frozenset[NodeId]
    """Members that did not commit it: lost, or cancelled."""

    def given_by(self, node: NodeId) -> list[int]:
        """The exchanges to which ``node`` contributed."""
        return [seq for seq, nodes in self.closed.items() if node in nodes]

    def holds_back(self, node: NodeId, post: Posted) -> bool:
        """Whether ``node`` had not come to an exchange when that closed, or was not there any more.

        A member that only receives is in no exchange's set; it was present if it contributed to a later one.
        """
        if node not in self.late or node in self.closed.get(post.seq, ()):
            return False
        return post.contributes or post.seq > max(self.given_by(node), default=-1)


@dataclass
class RunHistory:
    """Parse a run's log into the course of its rounds."""

    path: Path
    digest: str | None
    """Digest with which the run ended."""
    received: defaultdict[NodeId, deque[tuple[int, int, int] | Left | Timeout]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    seen: defaultdict[NodeId, list[float]] = field(default_factory=lambda: defaultdict(list))
    rounds: defaultdict[NodeId, int] = field(default_factory=lambda: defaultdict(int))
    """Number of rounds that each node of an asynchronous run committed."""
    last: NodeId = 0
    """The node, not the server, that committed last."""
    views: dict[tuple[NodeId, int], View] = field(default_factory=dict)
    """Views by the node and the first of its rounds that has the view."""
    lost: set[NodeId] = field(default_factory=set)
    start: tuple[NodeId, ...] = ()
    """Nodes at the start."""
    parts: int | None = None
    """Number of parts into which the data were divided."""
    plans: dict[tuple[NodeId, int], Place] = field(default_factory=dict)
    """Sampling plans by the node and the first of its rounds that follows the plan."""
    rounds_done: dict[int, Done] = field(default_factory=dict)
    """Outcome of each round of a synchronous run."""
    _steps: list[Step] = field(default_factory=list)
    """Steps since the last commit."""
    _begun: dict[str, Any] = field(default_factory=dict)
    _whole: dict[NodeId, tuple[int, int]] = field(default_factory=dict)
    """Numbers of received messages and of clock readings in each node's committed rounds."""

    def plan(self, node: NodeId, number: int) -> Place | None:
        """Return what ``node`` draws from round ``number`` on; None if that is what it drew before."""
        return self.plans.get((node, number))

    @staticmethod
    def read(run_dir: str | Path) -> RunHistory:
        """Read the log of a finished run.

        Raises:
            ConfigError: there is none, or it is not whole.
        """
        path = Path(run_dir)
        summary = run_files.summary(path)
        if summary is None or not Folder(path).exists(event_lines.NAME):
            lacks = "summary.json" if summary is None else event_lines.NAME
            raise ConfigError(f"--replay {path}: it has no {lacks}; it takes the directory of a finished run")
        if summary.status != "finished":
            raise ConfigError(f"--replay {path}: that run is {summary.status}, and only a finished one has an end")
        history = RunHistory(path, summary.digest)
        for event in event_lines.read(path):
            history._take(event)
        if history.lost and not history.rounds_done:
            raise ConfigError(
                f"--replay {path}: in that run nodes came and went, and it is asynchronous; "
                "then only a synchronous one can be replayed"
            )
        return history

    def _take(self, event: dict[str, Any]) -> None:
        node = event.get("node", 0)
        match event["event"]:
            case "received":
                self.received[node].append(_outcome(event["outcome"]))
            case "seen":
                self.seen[node] += event["values"]
            case "view":
                self.views[node, event["round"]] = _view(event, event["members"])
            case "start":
                self.start, self.parts = tuple(event["nodes"]), event.get("parts")
            case "again":
                self._again(node)
            case "resume" if not event.get("same_processes"):
                # What brought nodes back is nothing that happened between rounds.
                self._steps = []
            case "lost":
                self.lost.add(node)
            case "left" | "up" as what:
                self.lost.add(node)
                self._steps.append((what if event.get("kept_nbytes", 1) else "left empty", node))
            case "transfer":
                position = event["position"]
                given = None if position is None else Position(*position)
                self._steps.append(("transfer", node, event["donor"], given))
            case "plan":
                self.plans[node, event["round"]] = Place.of(event["extras"], event["position"])
            case "begin":
                # Who comes up, or leaves, while a round is going on does so before the next.
                self._begun = event | {"num_steps": len(self._steps)}
            case "commit" if "closed" in event:
                self._commit(event)
            case "commit":
                self._whole[node] = len(self.received[node]), len(self.seen[node])
                self.rounds[node] += 1
                self.last = self.last if node == SERVER else node
            case _:
                pass

    def _commit(self, event: dict[str, Any]) -> None:
        """The attempt that was begun last is committed."""
        begun, steps = self._begun, self._steps
        if not begun:
            raise ConfigError(f"--replay {self.path}: its log has a commit of a round that was never begun")
        self._steps = steps[begun["num_steps"] :]
        self.rounds_done[event["round"]] = Done(
            steps=steps[: begun["num_steps"]],
            view=_view(begun, begun["view"]),
            joiners=frozenset(begun["joiners"]),
            closed={int(seq): tuple(nodes) for seq, nodes in event["closed"].items()},
            late=frozenset(begun["view"]).difference(event["committed"]),
        )

    def _again(self, node: NodeId) -> None:
        """The node was stopped in mid-round, for a checkpoint, and did its round again."""
        received, seen = self._whole.get(node, (0, 0))
        while len(self.received[node]) > received:
            self.received[node].pop()
        del self.seen[node][seen:]


def _view(event: dict[str, Any], members: list[NodeId]) -> View:
    return View(event["number"], tuple(members), joined=tuple(event["joined"]), left=tuple(event["left"]))


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
        self,
        config: Config,
        runtime: Simulator,
        observer: Observer,
        history: RunHistory,
        *,
        run_id: str,
        run_dir: str,
        may_commit: Callable[[], None],
    ) -> None:
        # What happened is in the log: nothing else is to happen. Who was late was so by another clock.
        cluster = config.cluster.model_copy(update={"round_deadline_s": _NEVER_S})
        calm = config.model_copy(update={"faults": FaultsConfig(), "cluster": cluster})
        super().__init__(
            calm, runtime, observer, run_id=run_id, run_dir=run_dir, may_commit=may_commit, script=history.plan
        )
        runtime.standing.initial = tuple(node for node in history.start if node != SERVER)
        runtime.num_parts = history.parts
        self._simulator = runtime
        self._history = history

    def _loop(self) -> Loop:
        if self._run.config.algorithm.synchronous:
            return SynchronousReplay(self._state, self._history, self._simulator)
        self._simulator.host.times.replay(self._history.seen)
        return AsynchronousReplay(self._state, self._history)


class ReplayRoom(Mailroom):
    """Hands messages over in the order of the log."""

    def __init__(self, history: RunHistory, nodes: tuple[NodeId, ...]) -> None:
        super().__init__(nodes, remembers=True)
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


class ReplayRounds(NodeRounds):
    """Gives nodes the views that the log has."""

    def __init__(self, history: RunHistory, nodes: tuple[NodeId, ...]) -> None:
        super().__init__(nodes, has_server=SERVER in nodes)
        self._history = history
        self._views: dict[NodeId, View] = {}

    def view_of(self, node: NodeId) -> View:
        """Return the view of the node's next round, or that of the round before if the log has no other."""
        logged = self._history.views.get((node, self.numbers[node]))
        self._views[node] = known = logged or self._views.get(node) or super().view_of(node)
        return known


class AsynchronousReplay(Asynchronous):
    """Every node does the rounds that it committed, and what its last messages needed."""

    def __init__(self, state: RunState, history: RunHistory) -> None:
        nodes = tuple(state.roster.facts)
        super().__init__(state, ReplayRoom(history, nodes), ReplayRounds(history, nodes))
        self._history = history

    @property
    def result(self) -> tuple[NodeId, ...]:
        if self._config.algorithm.has_server:
            return (SERVER,)
        if self._config.algorithm.result == "last":
            return (self._history.last,)
        return tuple(node for node in self._roster.nodes if node not in self._history.lost)

    def _is_over(self) -> bool:
        return all(self._round_of(node) >= count for node, count in self._history.rounds.items())

    def _commit(self, node: NodeId, report: Returned) -> None:
        if self._round_of(node) < self._history.rounds[node]:
            super()._commit(node, report)

    def _step(self) -> None:
        if self._mail.room.stuck(self._mail.room.nodes):
            message = (
                f"--replay {self._history.path}: its log does not fit its configuration and this version of the code"
            )
            raise RunError(message)
        super()._step()


class SynchronousReplay(Synchronous):
    """Synchronous loop that repeats the recorded absences.

    A late or lost node's contribution is held back until the other members have posted.
    """

    def __init__(self, state: RunState, history: RunHistory, simulator: Simulator) -> None:
        super().__init__(state)
        self._history = history
        self._simulator = simulator

    def _done(self, number: int) -> Done:
        done = self._history.rounds_done.get(number)
        if done is None:
            raise RunError(f"--replay {self._history.path}: its log has no round {number}")
        return done

    def _assemble(self, number: int) -> None:
        """Let happen what happened between the last round and this one."""
        done = self._done(number)
        while (happening := self._runtime.next(self._runtime.now)) is not None:
            self._take(happening)
        self._settle()
        for step in done.steps:
            match step:
                case ("left" | "left empty" as how, node):
                    self._simulator.retire([node], empty=[node] if how == "left empty" else ())
                    self._mail.left(node)
                case ("up", node):
                    self._roster.back(self._simulator.processes.embody_again(node))
                    self._members.holdings.new.add(node)
                    self._mail.left(node)
                    self._mail.room.join(node)
                case ("transfer", node, donor, position) if node != donor:
                    self._runtime.states.transfer(node, donor, position)
                case ("transfer", node, _, _):
                    self._runtime.states.restore(node)
                case _:
                    raise AssertionError(step)
        # The clock may stand still meanwhile: what has been given is there already.
        while self._runtime.next(self._runtime.now) is not None:
            pass
        self._members.holdings.loaded = set(done.joiners)

    def _next_view(self) -> View:
        return self._done(self._state.committed + 1).view

    def _note(self, attempt: Attempt, happening: Happening) -> Event | None:
        done = self._done(attempt.number)
        match happening:
            case Posts(posts):
                allowed = {node: post for node, post in posts.items() if not done.holds_back(node, post)}
                return Posts(allowed) if allowed else None
            case Returns(reports) if done.late & reports.keys():
                punctual = {node: report for node, report in reports.items() if node not in done.late}
                return super()._note(attempt, Returns(punctual)) if punctual else None
            case Reached(node, Posted() as post) if done.holds_back(node, post):
                return None
            case Reached(node, Returned()) if node in done.late:
                return None
            case Reached(node, Posted() as post):
                # The log knows when it closed; its policy is not asked again.
                return Reached(node, post._replace(close=None))
            case Loaded() | NotLoaded() | Retired() | Up():
                return None  # done before the round
            case _:
                return super()._note(attempt, happening)

    def _next(self, attempt: Attempt) -> Event | None:
        node = self._next_to_go(attempt)
        return super()._next(attempt) if node is None else Withdrawn(node, "the log says that it was late, or lost")

    def _next_to_go(self, attempt: Attempt) -> NodeId | None:
        """A node that was late or lost, if all that it gave is taken, and others wait for nobody but its like.

        One by one, in the order of what they missed: who goes takes along what it has said in exchanges that are open.
        """
        rendezvous, done = attempt.rendezvous, self._done(attempt.number)
        late = done.late & rendezvous.active
        if not late:
            return None
        punctual = rendezvous.active - late
        taken = {seq for seq, exchange in rendezvous.exchanges.items() if exchange.phase is not Phase.OPEN}
        spent = {node for node in late if taken.issuperset(done.given_by(node))}
        for seq, exchange in sorted(rendezvous.exchanges.items()):
            is_ready = punctual | (late & set(done.closed.get(seq, ()))) <= exchange.posts.keys()
            if exchange.phase is Phase.OPEN and is_ready and (missing := spent - exchange.posts.keys()):
                return min(missing)
        return min(spent, default=None) if punctual <= rendezvous.returned.keys() else None
