"""The loop of algorithms whose nodes each have rounds of their own: no barrier, messages only."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, cast

from starling.actors.host.round_order import RoundOrder
from starling.actors.wire.tickets import Receiving, Returned, Sleeping
from starling.algorithms.api import SERVER
from starling.orchestrator.control.admission import Admission
from starling.orchestrator.control.compute_watch import ComputeWatch
from starling.orchestrator.control.loop import Loop
from starling.orchestrator.control.min_nodes import MinNodes
from starling.orchestrator.control.node_rounds import NodeRounds
from starling.orchestrator.control.tally import Tally
from starling.orchestrator.errors import RunError
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.protocol.mailboxes import Mailroom
from starling.orchestrator.runtimes.events import (
    Died,
    Halted,
    Kept,
    Retired,
    Seen,
    Unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.protocol.mailboxes import Handover
    from starling.orchestrator.runtimes.events import Happening


class Asynchronous(Loop):
    """Per-node rounds: each is committed when its program returns, and the next begins.

    A round of the run is one of the server's; without a server, as many node rounds as there are nodes.
    """

    def __init__(self, state: RunState, room: Mailroom | None = None, nodes: NodeRounds | None = None) -> None:
        room = room or Mailroom(state.roster.facts, remembers=True)
        # What is kept of a node that left is its own; nobody else's comes on top.
        super().__init__(state, room, replicated=False)
        self._has_server = self._config.algorithm.has_server
        self._min_nodes = MinNodes(state, self._members)
        self._nodes = nodes or NodeRounds(state.roster.facts, has_server=self._has_server)
        self._admission = Admission(
            state, self._members, self._mail, self._nodes, lambda node: self._begin(node, joins=True)
        )
        self._watch = ComputeWatch(state.run)
        self._tally = Tally(state.recorder)
        self._begun: dict[NodeId, tuple[int, bool, bool]] = {}
        """The open round of each node, and whether it began with ``on_view_change``, and with ``join``."""
        self._readings: defaultdict[NodeId, list[float]] = defaultdict(list)
        """Clock readings of each node's program in its open round."""
        self._idle: set[NodeId] = set()
        """Have committed, or stand still, and do not begin a round: the run is about to be saved."""
        self._saving_since: float | None = None

    def run(self) -> None:
        """Go on until the configured number of rounds is done, then let everybody stand still."""
        self._tally.start()
        if self._same_processes:
            for node in sorted(self._nodes.entered):
                self._go_on(node)
        else:
            self._members.act()
            self._suffer_late_joins()
            for node in sorted(self._nodes.entered):
                self._begin(node)
            self._admission.admit()
        while not self._is_over():
            self._step()
        self._stop()

    @property
    def result(self) -> tuple[NodeId, ...]:
        """The nodes whose mean model is the run's."""
        if self._has_server:
            return (SERVER,)
        is_last = self._config.algorithm.result == "last"
        return (self._tally.last,) if is_last else tuple(sorted(self._nodes.present))

    def _is_over(self) -> bool:
        # A result that is just being restored is waited for.
        is_done = self._state.committed + 1 >= self._config.rounds
        return is_done and not self._roster.down.intersection(self.result)

    # --- one round of a node -----------------------------------------------------------------------------------------

    def _begin(self, node: NodeId, *, joins: bool = False) -> None:
        number = self._round_of(node)
        view = self._nodes.view_of(node)
        seen = self._nodes.see(node, view)
        changed = seen != view.members
        if changed:
            self._run.record(
                "view",
                node=node,
                round=number,
                number=view.number,
                members=view.members,
                joined=view.joined,
                left=view.left,
            )
        self._mail.room.begin(node, number)
        self._watch.computes(node, self._runtime.now)
        # Nobody's first round follows a change of members; a joiner's first one begins with `join` instead.
        repair = changed and seen is not None and number > 0
        begun = self._begun.get(node, (-1, False, False))
        again = begun[0] == number and not joins
        if again:
            # What it did then is done again: with other samples it would not be what it has sent.
            _, repair, joins = begun
        self._begun[node] = number, repair, joins
        readings = self._readings.pop(node, [])
        joiners = (node,) if joins and node != SERVER else ()
        places = self._state.samples.begin(number, (node,), self._nodes.present, again=again)
        order = RoundOrder(0, number, view, number - 1, repair, joiners, places, tuple(readings))
        self._runtime.programs.begin(order, (node,))
        self._strike("train", number, node)

    def _commit(self, node: NodeId, report: Returned) -> None:
        number = self._round_of(node)
        self._run.may_commit()
        self._run.record("commit", node=node, round=number)
        self._members.committed(number, {node: report})
        self._nodes.numbers[node] += 1
        self._readings.pop(node, None)
        self._watch.committed(node)
        self._mail.discard(self._mail.room.end(node))
        self._tally.add(node, report)
        if node == SERVER:
            # Should it die, it goes on from here.
            self._runtime.states.settle({SERVER: number})
            self._runtime.states.keep(SERVER, number)
        # A server that died may have to repeat rounds that it had committed, when what is kept is older.
        ends_round = node == SERVER and number > self._state.committed
        if not self._has_server:
            ends_round = self._tally.num_commits % max(1, len(self._nodes.present)) == 0
        if ends_round:
            self._round_done()
        self._strike("commit", number, node)
        if not self._is_over():
            self._go_on(node)

    def _round_done(self) -> None:
        state = self._state
        state.committed += 1
        state.members = self._roster.nodes
        reports, contributing, cost = self._tally.take()
        state.recorder.done(
            reports,
            self._nodes.last_of(self.result),
            cost,
            alike=False,
            contributing=contributing,
            in_view=len(self._nodes.present),
        )
        self._suffer_late_joins()
        if state.saving.is_due() and not self._is_over():
            self._saving_since = self._runtime.now

    def _go_on(self, node: NodeId) -> None:
        """A node stands still between two rounds: it begins the next, or leaves."""
        if node in self._members.departures.leaving:
            self._runtime.states.settle(self._nodes.last_of((node,)))
            self._members.departures.retire([node])
        elif self._saving_since is not None:
            self._idle.add(node)
        else:
            self._begin(node)

    def _round_of(self, node: NodeId) -> int:
        return self._nodes.numbers[node]

    def _suffer_late_joins(self) -> None:
        """Let nodes join whose time has come, in rounds of the run."""
        number = self._state.committed + 1
        self._suffer(self._faults.late_joins(number), number)

    # --- what happens ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        members = self._members
        if self._saving_since is not None and self._save_if_quiet(self._saving_since):
            return
        if self._is_stuck():
            happening = self._runtime.next(self._runtime.now)  # what has happened already is taken first
            if happening is None:
                message = "every node waits for a message, and none is on its way: the programs wait for one another"
                raise RunError(message)
            self._take(happening)
            return
        self._admission.check_model()
        brings_nodes = bool(self._nodes.present) and self._faults.brings_nodes  # in a round to which others may get
        happening = self._wait(self._watch.next_due(), self._min_nodes.deadline(more_join=brings_nodes))
        if happening is not None:
            self._take(happening)
        elif not members.act():
            members.transfers.retry()
            late = self._watch.late(self._nodes.numbers, self._state.committed)
            self._halt([*members.departures.withdraw(), *late])
            self._mail.expire()

    def _is_stuck(self) -> bool:
        """Whether nobody computes, no message is on its way, and nobody comes or goes who may break the deadlock."""
        room, members = self._mail.room, self._members
        moves = self._watch.any_computes or self._halting or room.num_in_flight or room.next_timeout() is not None
        changes = members.transfers.is_moving or members.departures.is_retiring or members.are_coming
        return not (moves or changes or self._min_nodes.are_missing)

    def _halt(self, nodes: Collection[NodeId]) -> None:
        for node in nodes:
            self._watch.rests(node)
            self._mail.room.stop(node)
        super()._halt(nodes)

    def _take(self, happening: Happening) -> None:
        match happening:
            case Reached(node, Returned() as report):
                # Who was told to stop in that moment goes back to the commit before, and does its round again.
                if node not in self._halting:
                    self._commit(node, report)
                return
            case Reached(node, Sleeping(seconds)):
                self._watch.computes(node, self._runtime.now + seconds)
                return
            case Seen(node, values):
                self._readings[node] += values
            case Reached(node, Receiving()) | Unreadable(node):
                self._watch.rests(node)
            case _:
                pass
        super()._take(happening)

    def _stands_still(self, node: NodeId) -> None:
        self._run.record("again", node=node, round=self._round_of(node))
        # What it has received in this round is not in its committed state, and nobody sends it again.
        if node in self._nodes.entered:  # else it is told to leave before it has been given a model
            self._mail.room.rewind(node)
        if self._saving_since is not None:
            self._idle.add(node)
        else:
            self._go_on(node)

    def _transfer_begins(self, joiner: NodeId, donor: NodeId) -> None:
        self._admission.transfer_begins(joiner, donor)
        super()._transfer_begins(joiner, donor)

    def _handed_over(self, handover: Handover) -> None:
        self._watch.computes(handover.node, self._runtime.now)
        super()._handed_over(handover)

    def _gone(self, node: NodeId) -> None:
        self._watch.rests(node)
        self._idle.discard(node)
        self._readings.pop(node, None)
        self._admission.gone(node)

    def _changed(self, happening: Happening) -> None:
        if SERVER in self._roster.down and not self._members.comes(SERVER):
            raise RunError("the server has died too often to be started again, and has the only model")
        if isinstance(happening, Kept) and happening.node == SERVER:
            self._mail.discard(self._mail.room.kept(SERVER, happening.number))
        self._admission.admit()

    def _donors(self) -> tuple[NodeId, ...]:
        return self._nodes.donors

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_if_quiet(self, since: float) -> bool:
        """Save the run if nothing moves any more, and let all begin their next round; return whether that was so.

        Once nobody computes, nodes that wait for messages are cancelled. The run has come to a stop ``since`` then.
        """
        members = self._members
        moves = self._watch.any_computes or self._halting or self._mail.room.num_in_flight
        if moves or members.transfers.pending or members.departures.is_retiring or SERVER in self._roster.down:
            return False
        waiting = [node for node in self._mail.room.receiving if node not in self._idle]
        if waiting:
            self._halt(waiting)
            return False
        self.save()
        self._state.saving.waited(self._runtime.now - since)
        self._saving_since, idle, self._idle = None, sorted(self._idle), set()
        for node in idle:
            self._go_on(node)
        return True

    def save(self) -> None:
        """Save all that is committed; no program of a round is open, or what it does is void."""
        entered = self._nodes.entered
        self._runtime.states.settle(self._nodes.last_of(entered))
        state = {
            **self._nodes.to_json(),
            **self._tally.to_json(),
            **self._admission.to_json(),
            "begun": {str(node): begun for node, begun in self._begun.items()},
            "readings": {str(node): list(values) for node, values in self._readings.items() if node in entered},
            "faults": self._faults.to_json(),
            "too_few_since": self._min_nodes.since,
        }
        server = [SERVER] if SERVER in entered else []
        nodes = [*self._members.holdings.to_save(self._roster.nodes, entered), *server]
        self._state.saving.save(state, nodes, None, self._mail, self._members, entered)

    def _restore(self, state: Mapping[str, Any], rounds: Mapping[NodeId, int] | None) -> None:
        if rounds is None:
            self._nodes.restore(state, state["entered"])
            self._min_nodes.since = state["too_few_since"]
        else:
            self._members.restore_states(rounds)
            facts = self._roster.facts.keys()
            self._nodes.restore(state, facts & rounds.keys() - self._members.holdings.new)
            for node in facts - self._nodes.entered:
                self._mail.room.leave_out(node)
        self._tally.restore(state)
        self._admission.restore(state)
        self._begun = {int(node): cast("tuple[int, bool, bool]", tuple(one)) for node, one in state["begun"].items()}
        self._readings.update({int(node): list(values) for node, values in state["readings"].items()})

    def _cancel(self) -> None:
        self._saving_since = self._runtime.now
        self._runtime.states.settle(self._nodes.last_of(self._nodes.entered))
        self._halt(sorted(self._nodes.entered - self._idle - self._halting))

    def _stop(self) -> None:
        """Cancel what still runs; it goes back to its last commit."""
        waiting = set(self._mail.room.nodes).difference(self._roster.down)
        self._runtime.states.settle(self._nodes.last_of(waiting))
        self._runtime.programs.halt(sorted(waiting))
        while waiting:
            # Bounded: a runtime ends a node that does not stand still within the grace period.
            happening = self._runtime.next(self._runtime.now + self._config.cluster.round_deadline_s)
            match happening:
                case Halted(node):
                    waiting.discard(node)
                case Died(node, reason):
                    waiting.discard(node)
                    self._roster.lose(node, reason, self._round_of(node))
                case Retired(node):
                    waiting.discard(node)
                case None:
                    pass
                case _:
                    _ = self._run.note(happening)
