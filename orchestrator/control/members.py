"""The nodes of a run as they come and go: takes what happens to them, and does what the pool decides.

Both loops over rounds use it. They say when a node may leave and when another may be given state, as they know when
programs stand still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from starling.algorithms.api import SERVER
from starling.algorithms.words import listed
from starling.orchestrator.control.departures import Departures
from starling.orchestrator.control.holdings import Holdings
from starling.orchestrator.control.recovery_times import Recoveries
from starling.orchestrator.control.state_transfers import Transfers
from starling.orchestrator.errors import RunError
from starling.orchestrator.protocol.pool import Launch, Pool, StandBy
from starling.orchestrator.runtimes.events import (
    Died,
    Kept,
    Loaded,
    Notice,
    NotLoaded,
    NotUp,
    Retired,
    Room,
    SpareLost,
    Up,
)
from starling.orchestrator.runtimes.simulator.state import facts, read, written

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from starling.actors.wire.tickets import Returned
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultEvent
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.runtimes.events import Happening


class Members:
    """The nodes of a run: starts them, takes their losses, lets them leave, gives them state.

    Args:
        state: of the run.
        replicated: a node that comes back is given the last commit on top of what was kept of itself.
        donors: who has what was committed last.
        on_transfer: told of each transfer of state: to whom, and from whom.
    """

    def __init__(
        self,
        state: RunState,
        *,
        replicated: bool,
        donors: Callable[[], Sequence[NodeId]],
        on_transfer: Callable[[NodeId, NodeId], None],
    ) -> None:
        self._state = state
        self._run = state.run
        self._runtime = state.run.runtime
        self._roster = state.roster
        config = self._run.config
        nodes = config.cluster.nodes
        auto = nodes.target == "auto"
        # Those for which there was no room come when there is.
        there = set(self._roster.facts)
        begun = there if auto else there | set(config.initial_nodes)
        self._pool = Pool(
            begun,
            most=config.num_nodes,
            auto=auto,
            per_process=config.cluster.nodes_per_actor,
            warm_spares=config.cluster.warm_spares,
        )
        self._pool.starting(begun - there)
        self.recoveries = Recoveries(self._run)
        self.holdings = Holdings()
        self.departures = Departures(self._runtime, self.holdings)
        self.transfers = Transfers(
            state,
            self.recoveries,
            replicated=replicated,
            donors=donors,
            is_kept=self._is_kept,
            on_begin=on_transfer,
        )
        self._successors: dict[NodeId, Up] = {}
        """Started processes that will take over the nodes that are leaving."""

    # --- what happens ------------------------------------------------------------------------------------------------

    def take(self, number: int, happening: Happening) -> bool:
        """Take what concerns members, in round ``number``; return whether ``happening`` did.

        Raises:
            RunError: a node is to be given state, and nobody has it any more.
        """
        match happening:
            case Up(facts):
                if self._roster.is_up(facts.node):
                    self._successors[facts.node] = happening
                else:
                    self._come(happening)
            case NotUp(node, reason):
                self._not_up(number, node, reason)
            case Died(node, reason):
                self._lost(number, node, reason)
            case Notice(node, deadline, reason):
                self._noticed(number, node, deadline, reason)
            case Retired(node, nbytes):
                self._left(number, node, nbytes)
            case Loaded() | NotLoaded():
                self._transferred(number, happening)
            case Kept(node, kept_number, nbytes):
                self.holdings.kept[node] = kept_number
                self._state.ledger.book("recovery", nbytes)
            case Room(places):
                self._pool.room(places)
            case SpareLost(reason):
                again = self._pool.spare_lost(self._runtime.now)
                advice = "another is started" if again else "too many have died, and no other is started"
                self._run.record("spare_lost", round=number, reason=reason, advice=advice)
            case _:
                return False
        self.act()
        return True

    def _transferred(self, number: int, happening: Loaded | NotLoaded) -> None:
        holdings = self.holdings
        if isinstance(happening, NotLoaded) and happening.source == happening.node:
            holdings.kept.pop(happening.node, None)  # it cannot be read
            self._state.residuals.forfeit(number, happening.node)
        if isinstance(happening, Loaded) and happening.node in holdings.new:
            # Its draws go on where it last committed, also if it was told more in a round for which it was late.
            self._state.samples.set_back(happening.node)
        match self.transfers.take(happening):
            case (node, True):
                holdings.restored(node)  # for its program, and everybody else's, nothing has happened
            case (node, False):
                is_own = happening.source == node
                holdings.given(node, holdings.kept[node] if is_own else self._state.committed)
            case None:
                pass

    def _come(self, up: Up) -> None:
        node = up.facts.node
        self._pool.up(node)
        self._roster.back(up.facts)
        self.recoveries.up(node, up.import_s)
        self.holdings.new.add(node)

    def _not_up(self, number: int, node: NodeId, reason: str) -> None:
        again = self._pool.failed(node, self._runtime.now)
        advice = "it is started again" if again else "it has failed too often to be started again"
        self._run.record("not_up", round=number, node=node, reason=reason)
        who = "the server" if node == SERVER else f"node {node}"
        self._run.say(node, f"{who} did not come up: {reason}; {advice}")

    def _lost(self, number: int, node: NodeId, reason: str) -> None:
        message = self._roster.lose(node, reason, number)
        again = self._pool.lost(node, self._runtime.now)
        advice = "it is started again" if again else "it has died too often to be started again"
        if node not in self.holdings.kept:  # its predecessor's residuals are, until it has committed itself
            self._state.residuals.forfeit(number, node)
        self._gone(node)
        self.recoveries.lost(node)
        self._run.say(node, f"{message}; {advice}")
        if node == SERVER and not again:
            raise RunError(f"{message}; {advice}, and nobody else has the model")
        self._succeed(node)

    def _noticed(self, number: int, node: NodeId, deadline: float, reason: str) -> None:
        if node in self.departures.leaving or node in self._roster.down:
            return
        now = self._runtime.now
        self.departures.noticed(node, deadline)
        self._run.record("notice", round=number, node=node, reason=reason, left_s=round(deadline - now, 3))
        self._run.say(node, f"{self._roster.name(node)} is to leave within {deadline - now:.3g} s: {reason}")
        self._pool.leaves(node, now)

    def _left(self, number: int, node: NodeId, nbytes: int) -> None:
        self._roster.leave(node, number, nbytes)
        self.holdings.left(node)
        self._gone(node)
        self._run.say(node, f"{self._roster.name(node)} has left in round {number}, as it was told to")
        self._succeed(node)

    def _gone(self, node: NodeId) -> None:
        self._state.samples.set_back(node)
        self.departures.gone(node)
        self.holdings.gone(node)
        self.transfers.gone(node)

    def _succeed(self, node: NodeId) -> None:
        """Let the successor of a node that has gone take its place, if it is up."""
        up = self._successors.pop(node, None)
        if up is not None:
            self._come(up)

    # --- what is done ------------------------------------------------------------------------------------------------

    def act(self) -> bool:
        """Do what the pool decides; return whether there was anything."""
        decisions = self._pool.decide(self._runtime.now, self._runtime.processes.num_spares)
        for decision in decisions:
            match decision:
                case Launch(nodes):
                    self.recoveries.launched(nodes)
                    self._run.record("launch", nodes=nodes)
                    self._runtime.processes.launch(nodes)
                case StandBy(count):
                    self._runtime.processes.stand_by(count)
        return bool(decisions)

    def comes(self, node: NodeId) -> bool:
        """Return whether ``node`` is being started, or will be."""
        return self._pool.comes(node)

    @property
    def are_coming(self) -> bool:
        """Whether any node is being started, or will be."""
        return self._pool.are_coming

    def most_possible(self) -> int | None:
        """Count the nodes that are up or are being started; return None if more may come, as machines do."""
        config, there = self._run.config, self._roster.nodes
        if config.cluster.nodes.target == "auto":
            return None
        return len(there) + sum(self.comes(node) for node in range(config.num_nodes) if node not in there)

    def next_due(self) -> float | None:
        """Return when ``act`` is to be called again, if nothing happens before."""
        due = self._pool.next_due(self._runtime.processes.num_spares), self.transfers.next_due()
        return min((moment for moment in due if moment is not None), default=None)

    def suffer(self, event: FaultEvent, number: int) -> None:
        """Let a scheduled fault happen, in round ``number``."""
        node = event.who
        self._run.record("fault", round=number, kind=event.kind, node=node, phase=event.phase)
        if event.kind == "late_join":
            self._pool.want(node, self._runtime.now)
            self.act()
        elif self._roster.is_up(node):
            self.recoveries.struck(node)
            match event.kind:
                case "kill":
                    self._runtime.processes.kill(node)
                case "hang":
                    self._runtime.processes.hang(node)
                case "preempt":
                    self._runtime.processes.preempt(node)

    def committed(self, number: int, reports: Mapping[NodeId, Returned]) -> None:
        """Take note that the nodes of ``reports`` have committed round ``number``."""
        self._pool.committed(reports)
        self.recoveries.committed(number, reports)
        self._state.samples.committed(number, reports)
        self._state.residuals.committed(reports)
        for node in self.holdings.committed(number, reports.keys()):
            self._runtime.states.release(node)

    def _is_kept(self, node: NodeId) -> bool:
        """Return whether another node than ``node`` will come back with the committed model from its kept state.

        A donor that is told to leave while it gives is handing over: its transfer fails before its state is known to
        be kept.
        """
        if self._run.config.algorithm.has_server and node != SERVER:
            return True  # the server has the only model: once it cannot be started again, the run ends
        last = self._state.committed if self._run.config.algorithm.synchronous else None
        handing_over = self.departures.handing_over - {node, SERVER}
        return bool(handing_over) or self.holdings.keeps(last, other_than=node)

    def give_state(self, number: int, node: NodeId) -> None:
        """Begin to give ``node`` what was committed last.

        Raises:
            RunError: nobody has it.
        """
        is_new = node in self.holdings.new
        position = self._state.samples.position(node) if is_new else None
        self.transfers.begin(number, node, position, self.holdings.kept.get(node) if is_new else None)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return who comes and goes, and when, as plain data."""
        return {
            "pool": self._pool.to_json(),
            "recoveries": self.recoveries.to_json(),
            **self._roster.to_json(),
            **self.holdings.to_json(),
            **self.departures.to_json(),
            "successors": [written(up) for up in self._successors.values()],
            "unsent": {str(node): norm for node, norm in self._state.residuals.unsent.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave, with the same processes at the same moment."""
        self._pool.restore(state["pool"])
        self.recoveries.restore(state["recoveries"])
        self._roster.replace({one["node"]: facts(one) for one in state["facts"]}, state["down"])
        self.holdings.restore(state)
        self.departures.restore(state)
        ups = [cast("Up", read(one, {})) for one in state["successors"]]
        self._successors = {up.facts.node: up for up in ups}
        self._state.residuals.unsent = {int(node): norm for node, norm in state["unsent"].items()}

    def restore_states(self, rounds: Mapping[NodeId, int], late: Collection[NodeId] = ()) -> None:
        """Give nodes that were started anew their state from a checkpoint; they go on as if they had never been away.

        Args:
            rounds: the committed rounds of the nodes whose state is in the checkpoint.
            late: nodes that had missed the last round, and go on with their own state.

        Raises:
            RunError: they do not take it in time.
        """
        state, roster, holdings = self._state, self._roster, self.holdings
        cluster, is_async = self._run.config.cluster, not self._run.config.algorithm.synchronous
        holdings.kept = dict(rounds)
        # Who had been away at the last commit is given its own, and a donor's on top, before the next round.
        whole = {
            node
            for node in roster.facts
            if node in rounds and (is_async or rounds[node] == state.committed or node in late)
        }
        holdings.new |= roster.facts.keys()
        for node in sorted(whole):
            self.give_state(state.committed, node)
        deadline = self._runtime.now + cluster.min_nodes_timeout_s
        while whole & set(self.transfers.pending):
            happening = self._runtime.next(deadline)
            if happening is None:
                names = listed(self.transfers.pending)
                raise RunError(
                    f"nodes {names} do not take over the state of the checkpoint; waited for "
                    f"{cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"
                )
            _ = self.take(state.committed, happening) or self._run.note(happening)
        holdings.new -= whole - roster.down
        holdings.loaded -= whole
