"""The nodes of a run as they come and go: what happens to them is taken here, and what the pool decides is done.

Both loops over rounds use it. They say when a node may leave and when another may be given state, as they know when
programs stand still.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from starling.algorithms.api import SERVER
from starling.algorithms.words import listed
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
    from collections.abc import Collection, Iterable, Mapping

    from starling.actors.wire.tickets import Returned
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultEvent
    from starling.orchestrator.control.run_state import Progress
    from starling.orchestrator.runtimes.events import Happening

_WITHDRAW_FRACTION = 0.2
"""Of the time that a node is given to leave: kept for handing over what it holds."""


NOBODY_COMES = "the others have failed too often to be started again"
"""Why a run does not wait for nodes, as the end of a sentence."""


class Members:
    """Who is there."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._runtime = progress.runtime
        config = progress.config
        nodes = config.cluster.nodes
        auto = nodes.target == "auto"
        # Those for which there was no room come when there is.
        begun = set(progress.facts) if auto else set(progress.facts) | set(config.initial_nodes)
        self._pool = Pool(
            begun,
            most=config.num_nodes,
            auto=auto,
            per_process=config.cluster.nodes_per_actor,
            warm_spares=config.cluster.warm_spares,
        )
        self._pool.starting(begun - set(progress.facts))
        self.recoveries = Recoveries(progress)
        self.transfers = Transfers(progress, self.recoveries)
        self.transfers.is_kept = self._is_kept
        self.new: set[NodeId] = set()
        """Have not committed a round yet: they began with nothing but the initial state."""
        self.loaded: set[NodeId] = set()
        """Were given the committed state, and have not committed a round since."""
        self.leaving: dict[NodeId, float] = {}
        """Told to leave, and by when it has to be handing over what it holds."""
        self._withdrawn: set[NodeId] = set()
        self._retiring: set[NodeId] = set()
        self._successors: dict[NodeId, Up] = {}
        """There already, for nodes that are leaving."""
        self._kept: dict[NodeId, int] = {}
        """The round of what was kept of nodes that have left."""
        self._held: dict[NodeId, int] = {}
        """The round of what each node has: the one that it committed last, or whose state it was given."""
        self._unsent: dict[NodeId, float] = {}
        """The norm of what each node had still to send then: its residuals."""

    # --- what happens ------------------------------------------------------------------------------------------------

    def take(self, number: int, happening: Happening) -> bool:
        """Take what concerns members, in round ``number``; say whether it was that.

        Raises:
            RunError: a node is to be given state, and nobody has it any more.
        """
        match happening:
            case Up(facts):
                if facts.node in self._progress.facts and facts.node not in self._progress.down:
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
                self._kept[node] = kept_number
                self._progress.ledger.book("recovery", nbytes)
            case Room(places):
                self._pool.room(places)
            case SpareLost(reason):
                again = self._pool.spare_lost(self._runtime.now)
                advice = "another is started" if again else "too many have died, and no other is started"
                self._progress.record("spare_lost", round=number, reason=reason, advice=advice)
            case _:
                return False
        self.act()
        return True

    def _transferred(self, number: int, happening: Loaded | NotLoaded) -> None:
        if isinstance(happening, NotLoaded) and happening.source == happening.node:
            self._kept.pop(happening.node, None)  # it cannot be read
            self._forfeit(number, happening.node)
        match self.transfers.take(happening):
            case (node, True):
                # For its program, and everybody else's, nothing has happened.
                self.new.discard(node)
                self._held[node] = self._kept[node]
            case (node, False):
                self.loaded.add(node)
                self._held[node] = self._kept[node] if happening.source == node else self._progress.committed
            case None:
                pass

    def _come(self, up: Up) -> None:
        node = up.facts.node
        self._pool.up(node)
        self._progress.back(up.facts)
        self.recoveries.up(node, up.import_s)
        self.new.add(node)

    def _not_up(self, number: int, node: NodeId, reason: str) -> None:
        again = self._pool.failed(node, self._runtime.now)
        advice = "it is started again" if again else "it has failed too often to be started again"
        self._progress.record("not_up", round=number, node=node, reason=reason)
        self._say(node, f"{'the server' if node == SERVER else f'node {node}'} did not come up: {reason}; {advice}")

    def _lost(self, number: int, node: NodeId, reason: str) -> None:
        message = self._progress.lose(node, reason, number)
        again = self._pool.lost(node, self._runtime.now)
        advice = "it is started again" if again else "it has died too often to be started again"
        if node not in self._kept:  # its predecessor's residuals are, until it has committed itself
            self._forfeit(number, node)
        self._gone(node)
        self.recoveries.lost(node)
        self._say(node, f"{message}; {advice}")
        if node == SERVER and not again:
            raise RunError(f"{message}; {advice}, and nobody else has the model")
        self._succeed(node)

    def _forfeit(self, number: int, node: NodeId) -> None:
        """What ``node`` had still to send is lost with it."""
        norm = self._unsent.pop(node, 0.0)
        if norm:
            self._progress.lose_residual(number, node, norm)

    def _noticed(self, number: int, node: NodeId, deadline: float, reason: str) -> None:
        if node in self.leaving or node in self._progress.down:
            return
        now = self._runtime.now
        self.leaving[node] = deadline - _WITHDRAW_FRACTION * max(0.0, deadline - now)
        self._progress.record("notice", round=number, node=node, reason=reason, left_s=round(deadline - now, 3))
        self._say(node, f"{self._progress.name(node)} is to leave within {deadline - now:.3g} s: {reason}")
        self._pool.leaves(node, now)

    def _left(self, number: int, node: NodeId, nbytes: int) -> None:
        self._progress.leave(node, number, nbytes)
        if node not in self.new:
            # One that was cancelled in the last round has that of the round before.
            self._kept[node] = self._held.get(node, -1)
        self._gone(node)
        self._say(node, f"{self._progress.name(node)} has left in round {number}, as it was told to")
        self._succeed(node)

    def _gone(self, node: NodeId) -> None:
        self._progress.samples.gone(node)
        self.leaving.pop(node, None)
        self._retiring.discard(node)
        self._withdrawn.discard(node)
        self.new.discard(node)
        self.loaded.discard(node)
        self._held.pop(node, None)
        self.transfers.gone(node)

    def _succeed(self, node: NodeId) -> None:
        """Let who was started for a leaving node take its place."""
        up = self._successors.pop(node, None)
        if up is not None:
            self._come(up)

    def _say(self, node: NodeId, text: str) -> None:
        self._progress.observer.on_log(node, (text,))

    # --- what is done ------------------------------------------------------------------------------------------------

    def act(self) -> bool:
        """Do what the pool decides; say whether there was anything."""
        decisions = self._pool.decide(self._runtime.now, self._runtime.processes.num_spares)
        for decision in decisions:
            match decision:
                case Launch(nodes):
                    self.recoveries.launched(nodes)
                    self._progress.record("launch", nodes=nodes)
                    self._runtime.processes.launch(nodes)
                case StandBy(count):
                    self._runtime.processes.stand_by(count)
        return bool(decisions)

    def comes(self, node: NodeId) -> bool:
        """Whether ``node`` is being started, or will be."""
        return self._pool.comes(node)

    @property
    def are_coming(self) -> bool:
        """Whether anybody is."""
        return self._pool.are_coming

    def most_possible(self) -> int | None:
        """Count the nodes that are there or are being started; ``None``: more may come, as machines do."""
        config, there = self._progress.config, self._progress.nodes
        if config.cluster.nodes.target == "auto":
            return None
        return len(there) + sum(self.comes(node) for node in range(config.num_nodes) if node not in there)

    def next_due(self) -> float | None:
        """When ``act`` is to be called again, if nothing happens before."""
        return self._pool.next_due(self._runtime.processes.num_spares)

    def suffer(self, event: FaultEvent, number: int) -> None:
        """Let a scheduled fault happen, in round ``number``."""
        node = event.who
        self._progress.record("fault", round=number, kind=event.kind, node=node, phase=event.phase)
        if event.kind == "late_join":
            self._pool.want(node, self._runtime.now)
            self.act()
        elif node in self._progress.facts and node not in self._progress.down:
            self.recoveries.struck(node)
            match event.kind:
                case "kill":
                    self._runtime.processes.kill(node)
                case "hang":
                    self._runtime.processes.hang(node)
                case "preempt":
                    self._runtime.processes.preempt(node)

    def committed(self, number: int, reports: Mapping[NodeId, Returned]) -> None:
        """The nodes of ``reports`` have committed round ``number``."""
        self._pool.committed(reports)
        self.recoveries.committed(number, reports)
        self._progress.samples.committed(number, reports)
        self._unsent |= {node: report.unsent for node, report in reports.items()}
        self._progress.has_residuals |= any(report.unsent for report in reports.values())
        self.new.difference_update(reports)
        self._held |= dict.fromkeys(reports, number)
        self.loaded.clear()  # who has got state and has not committed since lacks a round
        for node in [node for node in self._kept if node in reports and node != SERVER]:
            del self._kept[node]
            self._runtime.states.release(node)

    def withdraw(self) -> list[NodeId]:
        """Nodes that have to leave now, in mid-round; the first one, and each is named once."""
        now = self._runtime.now
        due = [node for node, until in self.leaving.items() if until <= now and node not in self._withdrawn][:1]
        self._withdrawn.update(due)
        return due

    def next_withdrawal(self) -> float | None:
        """When ``withdraw`` has one to name."""
        return min((until for node, until in self.leaving.items() if node not in self._withdrawn), default=None)

    def stands_still(self, node: NodeId) -> None:
        """A node that was cancelled stands still; if it had to leave, it does so now."""
        if node in self._withdrawn:
            self.retire([node])

    def retire(self, nodes: Iterable[NodeId]) -> None:
        """Let nodes leave that stand still, and are committed as far as they will be.

        Who has not committed a round hands over nothing: it has the initial state, or what others have too, and what
        its predecessor handed over is kept for whoever comes next.
        """
        due = [node for node in nodes if node not in self._retiring]
        if due:
            self._retiring.update(due)
            self._runtime.retire(due, empty=self.new.intersection(due))

    def kept_round(self, node: NodeId) -> int:
        """The round of what is kept of ``node``; -1: nothing is."""
        return self._kept.get(node, -1)

    def _is_kept(self, node: NodeId) -> bool:
        """Return whether another node than ``node`` will come back with the committed model from its kept state.

        A donor that is told to leave while it gives is handing over: its transfer fails before its state is known to
        be kept.
        """
        last = self._progress.committed if self._progress.config.algorithm.synchronous else None
        others = self._kept.keys() - {node, SERVER}
        handing_over = self._retiring - self.new - {node, SERVER}
        return bool(handing_over) or any(last in (None, self._kept[other]) for other in others)

    def keeps(self, number: int | None) -> bool:
        """Whether anything is kept of nodes that have left: what they committed in round ``number``, if it is given."""
        return any(number in (None, kept) for node, kept in self._kept.items() if node != SERVER)

    @property
    def is_retiring(self) -> bool:
        """Whether somebody is handing over what it holds."""
        return bool(self._retiring)

    def give_state(self, number: int, node: NodeId) -> None:
        """Begin to give ``node`` what was committed last.

        Raises:
            RunError: nobody has it.
        """
        is_new = node in self.new
        position = self._progress.samples.position(node) if is_new else None
        self.transfers.begin(number, node, position, self._kept.get(node) if is_new else None)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def to_save(self, begun: Collection[NodeId] = ()) -> list[NodeId]:
        """Of whom there is state to be saved: who is there and has more than the initial one, and whose was kept.

        New nodes have no more than that, but for those that have ``begun`` with another's.
        """
        there = [node for node in self._progress.nodes if node not in self.new or node in begun]
        return sorted({*there, *self._kept} - {SERVER})

    def kept_alone(self, begun: Collection[NodeId] = ()) -> set[NodeId]:
        """Whose state is what was kept: they have left, or who has taken their place has not got it yet."""
        return self._kept.keys() & (self.new | self._progress.down) - set(begun)

    def to_json(self) -> dict[str, Any]:
        """Who comes and goes, and when, as plain data; who is being given state is given it anew."""
        return {
            "pool": self._pool.to_json(),
            "recoveries": self.recoveries.to_json(),
            "facts": [asdict(one) for one in self._progress.facts.values()],
            "down": sorted(self._progress.down),
            "new": sorted(self.new),
            "leaving": {str(node): until for node, until in self.leaving.items()},
            "withdrawn": sorted(self._withdrawn),
            "retiring": sorted(self._retiring),
            "successors": [written(up) for up in self._successors.values()],
            "kept": {str(node): number for node, number in self._kept.items()},
            "held": {str(node): number for node, number in self._held.items()},
            "unsent": {str(node): norm for node, norm in self._unsent.items()},
        }

    def revive(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave, with the same processes at the same moment."""
        self._pool.revive(state["pool"])
        self.recoveries.revive(state["recoveries"])
        self._progress.stand({one["node"]: facts(one) for one in state["facts"]}, state["down"])
        self.new = set(state["new"])
        self.leaving = {int(node): until for node, until in state["leaving"].items()}
        self._withdrawn, self._retiring = set(state["withdrawn"]), set(state["retiring"])
        ups = [cast("Up", read(one, {})) for one in state["successors"]]
        self._successors = {up.facts.node: up for up in ups}
        self._kept = {int(node): number for node, number in state["kept"].items()}
        self._held = {int(node): number for node, number in state["held"].items()}
        self._unsent = {int(node): norm for node, norm in state["unsent"].items()}

    def bring_back(self, rounds: Mapping[NodeId, int], late: Collection[NodeId] = ()) -> None:
        """Give those that are there what a checkpoint has of them; they go on as if they had never been away.

        Args:
            rounds: the committed rounds of those whose state is in the checkpoint.
            late: those that had missed the last round, and go on with their own state.

        Raises:
            RunError: they do not take it in time.
        """
        progress, cluster = self._progress, self._progress.config.cluster
        self._kept = dict(rounds)
        is_async = not progress.config.algorithm.synchronous
        # Who had been away at the last commit is given its own, and a donor's on top, before the next round.
        whole = {
            node
            for node in progress.facts
            if node in rounds and (is_async or rounds[node] == progress.committed or node in late)
        }
        self.new = set(progress.facts)
        for node in sorted(whole):
            self.give_state(progress.committed, node)
        deadline = self._runtime.now + cluster.min_nodes_timeout_s
        while whole & set(self.transfers.pending):
            happening = self._runtime.next(deadline)
            if happening is None:
                names = listed(self.transfers.pending)
                raise RunError(
                    f"nodes {names} do not take over the state of the checkpoint; waited for "
                    f"{cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"
                )
            _ = self.take(progress.committed, happening) or progress.note(happening)
        self.new -= whole - progress.down
        self.loaded -= whole
