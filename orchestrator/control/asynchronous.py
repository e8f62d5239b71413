"""The loop of algorithms whose nodes each have rounds of their own: no barrier, messages only."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, cast

from starling.actors.wire.tickets import Receiving, Returned, Sleeping
from starling.algorithms.api import SERVER, View
from starling.orchestrator.control.members import NOBODY_COMES, Members
from starling.orchestrator.control.messaging import Mail
from starling.orchestrator.errors import RunError
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.protocol.faults import Faults
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes.events import (
    Died,
    Halted,
    Kept,
    Retired,
    Seen,
    Unreadable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultPhase
    from starling.orchestrator.control.run_state import Progress
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover, Mailroom
    from starling.orchestrator.runtimes.events import Happening


_MAX_LATE = 10
"""How often a node may be late at one round while the run stands still."""


class Asynchronous:
    """Per-node rounds: each is committed when its program returns, and the next begins.

    A round of the run is one of the server's; without a server, as many node rounds as there are nodes.
    """

    def __init__(self, progress: Progress, room: Mailroom | None = None) -> None:
        self._progress = progress
        self._runtime = progress.runtime
        self._config = progress.config
        self._mail = Mail(progress, room, self._handed_over)
        self._members = Members(progress)
        # What is kept of a node that left is its own; nobody else's comes on top.
        self._members.transfers.replicated = False
        self._members.transfers.on_begin = self._transfers
        self._faults = Faults(self._config.faults)
        self._view_number = 0
        self._present = set(progress.nodes)
        """Who is in, but for the server."""
        self._entered = set(progress.facts)
        """Who is in."""
        self._rounds: dict[NodeId, int] = dict.fromkeys(progress.facts, 0)
        """Committed, of each node."""
        self._seen: dict[NodeId, tuple[NodeId, ...]] = {}
        """The members of the last view of each node."""
        self._begun: dict[NodeId, tuple[int, bool, bool]] = {}
        """The open round of each node, and whether it began with ``on_view_change``, and with ``join``."""
        self._readings: defaultdict[NodeId, list[float]] = defaultdict(list)
        """What the programs of each node have seen of the clock in their open round."""
        self._working: dict[NodeId, float] = {}
        """Since when each node computes, of those that do not wait for a message."""
        self._halting: set[NodeId] = set()
        self._known: dict[NodeId, dict[NodeId, int]] = {}
        """Of which rounds of others the state of a node has heard that is to join: its own or its donor's."""
        self._late: dict[NodeId, tuple[int, int]] = {}
        """Of nodes that were late: how often, since the run had done so many rounds."""
        self._too_few_since: float | None = None
        self._num_commits = 0
        """Of nodes that are not the server."""
        self._last = -1
        self._since: list[Returned] = []
        """Reports since the last recorded round."""
        self._contributed: set[NodeId] = set()
        self._mark = (0.0, 0, 0)
        """Clock, payload and transport at the last recorded round."""
        self._is_revived = False
        self._stands = False
        """It goes on from a checkpoint, with the processes of then."""
        self._idle: set[NodeId] = set()
        """Have committed, or stand still, and do not begin a round: the run is about to be saved."""
        self._saving_since: float | None = None
        self._mail.room.remembers = True

    def run(self) -> None:
        """Go on until the configured number of rounds is done, then let everybody stand still."""
        if not self._is_revived:
            self._mark = self._now()
        if self._stands:
            for node in sorted(self._entered):
                self._go_on(node)
        else:
            self._members.act()
            self._strike_late()
            for node in sorted(self._entered):
                self._begin(node)
            self._admit()
        while not self._is_over():
            self._step()
        self._stop()

    @property
    def result(self) -> tuple[NodeId, ...]:
        """Whose mean model is the run's."""
        algorithm = self._config.algorithm
        if algorithm.has_server:
            return (SERVER,)
        return (self._last,) if algorithm.result == "last" else tuple(sorted(self._present))

    def _is_over(self) -> bool:
        # A result that is just being restored is waited for.
        return self._progress.committed + 1 >= self._config.rounds and not self._progress.down.intersection(self.result)

    def _begin(self, node: NodeId, *, joins: bool = False) -> None:
        number = self._rounds[node]
        view = self._view_of(node, number)
        seen = self._seen.get(node)
        self._seen[node] = view.members
        changed = seen != view.members
        if changed:
            self._progress.record(
                "view",
                node=node,
                round=number,
                number=view.number,
                members=view.members,
                joined=view.joined,
                left=view.left,
            )
        self._mail.room.begin(node, number)
        self._working[node] = self._runtime.now
        # Nobody's first round follows a change of members; a joiner's first one begins with `join` instead.
        repair = changed and seen is not None and number > 0
        begun = self._begun.get(node)
        if begun is not None and begun[0] == number and not joins:
            _, repair, joins = begun  # what it did then is done again
        self._begun[node] = number, repair, joins
        readings = self._readings.pop(node, [])
        self._runtime.programs.begin(
            0,
            number,
            view,
            number - 1,
            (node,),
            repair=repair,
            joiners=(node,) if joins and node != SERVER else (),
            places=self._progress.samples.begin(number, (node,), self._present),
            seen=readings,
        )
        self._strike("train", node)

    def _view_of(self, node: NodeId, number: int) -> View:
        """The view in which ``node`` does its round ``number``; changes count against the last that it saw."""
        del number
        members = tuple(sorted(self._present))
        seen = self._seen.get(node, members if self._view_number else ())
        joined = tuple(sorted(set(members).difference(seen)))
        left = tuple(sorted(set(seen).difference(members)))
        return View(self._view_number, members, joined, left)

    def _step(self) -> None:
        members = self._members
        if self._saving_since is not None and self._is_quiet():
            self._save_now()
            return
        if self._is_stuck():
            happening = self._runtime.next(self._runtime.now)  # what has happened already is taken first
            if happening is None:
                message = "every node waits for a message, and none is on its way: the programs wait for one another"
                raise RunError(message)
            self._note(happening)
            return
        timeout = self._mail.next_timeout()
        moments = timeout, members.next_due(), members.next_withdrawal(), self._next_late(), self._patience()
        happening = self._runtime.next(min((moment for moment in moments if moment is not None), default=math.inf))
        if happening is not None:
            self._note(happening)
            return
        if members.act():
            return
        self._halt([*members.withdraw(), *self._too_late()])
        if timeout is not None and timeout <= self._runtime.now:
            self._mail.expire()

    def _is_stuck(self) -> bool:
        """Whether nobody computes, no message is on its way, and nobody comes or goes who may break the deadlock."""
        room, members = self._mail.room, self._members
        moves = self._working or self._halting or room.num_in_flight or room.next_timeout() is not None
        changes = members.transfers.is_moving or members.is_retiring or members.are_coming
        return not (moves or changes or len(self._progress.nodes) < self._config.cluster.nodes.min)

    # --- who works too long, and who is missing ----------------------------------------------------------------------

    def _next_late(self) -> float | None:
        if not self._working:
            return None
        return min(self._working.values()) + self._config.cluster.round_deadline_s

    def _too_late(self) -> list[NodeId]:
        """Nodes that have computed for longer than ``round_deadline_s`` without a word."""
        limit = self._config.cluster.round_deadline_s
        late = sorted(node for node, since in self._working.items() if since + limit <= self._runtime.now)
        for node in late:
            self._progress.record("late", node=node, round=self._rounds[node], reason="it has not been heard of")
            self._count_late(node, limit)
        return late

    def _count_late(self, node: NodeId, limit: float) -> None:
        """Count that ``node`` was late.

        Raises:
            RunError: it is so again and again, and nobody else takes the run any further.
        """
        committed = self._progress.committed
        times, since = self._late.get(node, (0, committed))
        times = times + 1 if since == committed else 1
        self._late[node] = times, committed
        if times == _MAX_LATE:
            who = f"{'the server' if node == SERVER else f'node {node}'} cannot finish its round {self._rounds[node]}"
            raise RunError(
                f"{who}: it computes for longer than {limit:g} s without a word, tried {times} times; "
                "raise cluster.round_deadline_s if it is only slow"
            )

    def _halt(self, nodes: list[NodeId]) -> None:
        for node in nodes:
            self._working.pop(node, None)
            self._mail.room.stop(node)
        self._halting.update(nodes)
        if nodes:
            self._runtime.programs.halt(nodes)

    def _patience(self) -> float | None:
        """When the run has been waiting for ``nodes.min`` nodes long enough.

        Raises:
            RunError: it has, or it waits in vain: too few can come, or whoever comes finds nobody who has a model.
        """
        self._check_model()
        cluster, there = self._config.cluster, len(self._progress.nodes)
        if there >= cluster.nodes.min:
            self._too_few_since = None
            return None
        now = self._runtime.now
        self._too_few_since = now if self._too_few_since is None else self._too_few_since
        message = f"{there} nodes are there, and cluster.nodes.min is {cluster.nodes.min}"
        most = self._members.most_possible()
        joins_later = self._present and self._faults.brings_nodes  # in a round to which the others may get
        if most is not None and most < cluster.nodes.min and not joins_later:
            raise RunError(f"{message}; {NOBODY_COMES}")
        if self._too_few_since + cluster.min_nodes_timeout_s <= now:
            waited = f"{cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"
            raise RunError(f"{message}; waited for {waited}")
        return self._too_few_since + cluster.min_nodes_timeout_s

    def _check_model(self) -> None:
        """Say so at once when all who had a trained model are gone, and nothing of theirs is kept.

        Raises:
            RunError: it is so.
        """
        members = self._members
        if self._config.algorithm.has_server or self._present or not any(self._rounds.values()):
            return
        if not (members.keeps(None) or members.loaded or members.transfers.pending or members.is_retiring):
            raise RunError(f"round {self._progress.committed + 1}: no node is left that has a model that was trained")

    # --- what happens ------------------------------------------------------------------------------------------------

    def _note(self, happening: Happening) -> None:
        match happening:
            case Reached(node, Returned() as report):
                # Who was told to stop in that moment goes back to the commit before, and does its round again.
                if node not in self._halting:
                    self._commit(node, report)
            case Halted(node):
                self._halting.discard(node)
                self._progress.record("again", node=node, round=self._rounds[node])
                # What it has received in this round is not in its committed state, and nobody sends it again.
                if node in self._entered:  # else it is told to leave before it has been given a model
                    self._mail.room.rewind(node)
                if self._saving_since is not None:
                    self._idle.add(node)
                else:
                    self._go_on(node)
            case Seen(node, values):
                self._readings[node] += values
                self._progress.note(happening)
            case Reached(node, Sleeping(seconds)):
                self._working[node] = self._runtime.now + seconds
            case Reached(node, Receiving()) | Unreadable(node):
                self._working.pop(node, None)
                self._mail.take(happening)
            case _:
                _ = self._changed(happening) or self._progress.note(happening) or self._mail.take(happening)

    def _transfers(self, joiner: NodeId, donor: NodeId) -> None:
        # A joiner is no older than what it begins with.
        self._known[joiner] = self._mail.room.known(donor) | {donor: self._rounds[donor]}
        for node in (joiner, donor):
            self._strike("transfer", node)

    def _handed_over(self, handover: Handover) -> None:
        self._working[handover.node] = self._runtime.now
        if isinstance(handover.outcome, Delivery):
            self._strike("receive", handover.node)

    def _changed(self, happening: Happening) -> bool:
        """Take what concerns members; say whether it was that."""
        members = self._members
        if isinstance(happening, Died | Retired):
            self._gone(happening.node)
        members.transfers.donors = self._donors()
        if not members.take(self._progress.committed + 1, happening):
            return False
        if SERVER in self._progress.down and not members.comes(SERVER):
            raise RunError("the server has died too often to be started again, and has the only model")
        if isinstance(happening, Kept) and happening.node == SERVER:
            self._forget(self._mail.room.kept(SERVER, happening.number))
        self._admit()
        return True

    def _admit(self) -> None:
        """Let those begin that have all that they need; see to it that the others get it."""
        members = self._members
        there = set(self._progress.nodes) | ({SERVER} & self._progress.facts.keys() - self._progress.down)
        members.transfers.donors = self._donors()
        for node in sorted(there - self._entered - set(members.transfers.pending)):
            self._rounds.setdefault(node, 0)
            if node not in members.new or node in members.loaded or not self._needs_state(node):
                self._enter(node)
            elif node == SERVER or not self._config.algorithm.has_server or self._donors():
                # Else the server is away, and has the only model: its return is waited for.
                members.give_state(self._rounds[node], node)
        members.transfers.donors = self._donors()
        members.transfers.retry()

    def _donors(self) -> tuple[NodeId, ...]:
        """Who has a model that has been trained: the server alone, if there is one."""
        if self._config.algorithm.has_server:
            return (SERVER,) if SERVER in self._entered else ()
        return tuple(node for node in sorted(self._present) if self._rounds[node])

    def _needs_state(self, node: NodeId) -> bool:
        """Whether anything has been committed that a joiner must have."""
        if node == SERVER or self._config.algorithm.has_server:
            return self._rounds[SERVER] > 0
        return any(self._rounds.values())

    def _gone(self, node: NodeId) -> None:
        self._working.pop(node, None)
        self._halting.discard(node)
        self._entered.discard(node)
        self._idle.discard(node)
        self._readings.pop(node, None)
        if node == SERVER:
            # It will be embodied anew; what is sent to it waits.
            self._mail.room.stop(SERVER)
            return
        if node in self._present:
            self._known[node] = self._mail.room.known(node)
            self._present.discard(node)
            self._view_number += 1
            self._forget(self._mail.room.clear(node))
            self._mail.left(node)

    def _enter(self, node: NodeId) -> None:
        """A node has all that it needs, and begins."""
        self._entered.add(node)
        if node == SERVER:
            self._rounds[SERVER] = self._members.kept_round(SERVER) + 1
            self._mail.room.again(SERVER)
        else:
            self._mail.room.join(node, self._known.pop(node, {}))
            self._present.add(node)
            self._view_number += 1
        self._begin(node, joins=True)

    def _strike(self, phase: FaultPhase, node: NodeId, number: int | None = None) -> None:
        """Let the scheduled faults of this moment of a node happen; ``number`` is its round, if not the open one."""
        number = self._rounds[node] if number is None else number
        for event in self._faults.due(number, phase, node):
            self._members.suffer(event, number)

    def _strike_late(self) -> None:
        """Let those join whose time has come, in rounds of the run."""
        number = self._progress.committed + 1
        for event in self._faults.late_joins(number):
            self._members.suffer(event, number)

    def _commit(self, node: NodeId, report: Returned) -> None:
        progress, number = self._progress, self._rounds[node]
        progress.may_commit()
        progress.record("commit", node=node, round=number)
        self._members.committed(number, {node: report})
        self._rounds[node] += 1
        self._late.pop(node, None)
        self._readings.pop(node, None)
        self._working.pop(node, None)
        self._forget(self._mail.room.end(node))
        if node != SERVER:
            self._num_commits += 1
            self._last = node
            self._since.append(report)
            self._contributed.add(node)
        else:
            # Should it die, it goes on from here.
            self._runtime.states.settle({SERVER: number})
            self._runtime.states.keep(SERVER, number)
        by_server = self._config.algorithm.has_server
        # A server that died may have to repeat rounds that it had committed, when what is kept is older.
        if node == SERVER and number > progress.committed if by_server else self._is_turn():
            self._round_done()
        self._strike("commit", node, number)
        if not self._is_over():
            self._go_on(node)

    def _go_on(self, node: NodeId) -> None:
        """A node stands still between two rounds: it begins the next, or leaves."""
        if node in self._members.leaving:
            self._runtime.states.settle({node: self._rounds[node] - 1})
            self._members.retire([node])
        elif self._saving_since is not None:
            self._idle.add(node)
        else:
            self._begin(node)

    def _forget(self, envelopes: list[Envelope]) -> None:
        """Nobody will be handed these messages again."""
        for envelope in envelopes:
            self._runtime.messages.discard(envelope.sender, envelope.letter)

    def _is_turn(self) -> bool:
        return self._num_commits % max(1, len(self._present)) == 0

    def _round_done(self) -> None:
        progress = self._progress
        progress.committed += 1
        progress.members = progress.nodes
        before, self._mark = self._mark, self._now()
        clock, payload, transport = (now - then for now, then in zip(self._mark, before, strict=True))
        progress.round_done(
            self._since,
            {node: self._rounds[node] - 1 for node in self.result},
            alike=False,
            contributing=len(self._contributed),
            in_view=len(self._present),
            late=0,
            payload_bytes=int(payload),
            transport_bytes=None if self._runtime.transport_nbytes is None else int(transport),
            seconds=clock,
        )
        self._since, self._contributed = [], set()
        self._strike_late()
        checkpoints = progress.checkpoints
        if checkpoints is not None and checkpoints.is_due(progress.committed) and not self._is_over():
            self._saving_since = self._runtime.now

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        """Whether nothing moves any more; first, whether nobody computes, and who waits for messages is stopped."""
        moves = self._working or self._halting or self._mail.room.num_in_flight
        if moves or self._members.transfers.pending or self._members.is_retiring or SERVER in self._progress.down:
            return False
        waiting = [node for node in self._mail.room.receiving if node not in self._idle]
        self._halt(waiting)
        return not waiting

    def _save_now(self) -> None:
        """Everybody stands still: save that, and let all begin their next round."""
        checkpoints = self._progress.checkpoints
        assert checkpoints is not None
        assert self._saving_since is not None
        self.save()
        checkpoints.waited(self._runtime.now - self._saving_since)
        self._saving_since, idle, self._idle = None, sorted(self._idle), set()
        for node in idle:
            self._go_on(node)

    def save(self) -> None:
        """Have all that is committed saved; no program of a round is open, or what it does is void."""
        self._runtime.states.settle({node: self._rounds[node] - 1 for node in self._entered})
        now = self._now()
        state = {
            "view": self._view_number,
            "present": sorted(self._present),
            "rounds": {str(node): number for node, number in self._rounds.items()},
            "seen": {str(node): members for node, members in self._seen.items()},
            "begun": {str(node): begun for node, begun in self._begun.items()},
            "readings": {str(node): list(values) for node, values in self._readings.items() if node in self._entered},
            "known": {
                str(node): {str(other): number for other, number in known.items()}
                for node, known in self._known.items()
            },
            "commits": self._num_commits,
            "last": self._last,
            "since": [[one.loss, one.num_samples, one.train_seconds] for one in self._since],
            "contributed": sorted(self._contributed),
            "mark": [value - then for value, then in zip(now, self._mark, strict=True)],
            "faults": self._faults.to_json(),
            "entered": sorted(self._entered),
            "too_few_since": self._too_few_since,
        }
        server = [SERVER] if SERVER in self._entered else []
        nodes = [*self._members.to_save(self._entered), *server]
        self._progress.save(state, nodes, None, self._mail, self._members, self._entered)

    def revive(self, state: Mapping[str, Any], mail: Mapping[str, Any], rounds: Mapping[NodeId, int]) -> list[Envelope]:
        """Go on from what ``save`` gave, and return the messages that wait; ``rounds`` are the nodes' last ones."""
        self._members.bring_back(rounds)
        self._entered = {node for node in self._progress.facts if node in rounds and node not in self._members.new}
        self._go_on_with(state)
        for node in set(self._progress.facts) - self._entered:
            self._mail.room.leave_out(node)
        return self._mail.room.revive(mail)

    def stand(self, state: Mapping[str, Any], mail: Mapping[str, Any], members: Mapping[str, Any]) -> list[Envelope]:
        """The same where processes are what they were, and at the same moment; ``members`` are these nodes'."""
        self._members.revive(members)
        self._entered = set(state["entered"])
        self._go_on_with(state)
        self._stands, self._too_few_since = True, state["too_few_since"]
        return self._mail.room.revive(mail, exactly=True)

    def _go_on_with(self, state: Mapping[str, Any]) -> None:
        self._is_revived = True
        self._present = self._entered - {SERVER}
        self._view_number = state["view"] + (self._present != set(state["present"]))
        self._rounds = {int(node): number for node, number in state["rounds"].items()}
        self._seen = {int(node): tuple(members) for node, members in state["seen"].items()}
        self._begun = {int(node): cast("tuple[int, bool, bool]", tuple(one)) for node, one in state["begun"].items()}
        self._readings.update({int(node): list(values) for node, values in state["readings"].items()})
        self._known = {
            int(node): {int(other): number for other, number in known.items()} for node, known in state["known"].items()
        }
        self._num_commits, self._last = state["commits"], state["last"]
        self._since = [Returned("", 0, loss, count, seconds) for loss, count, seconds in state["since"]]
        self._contributed = set(state["contributed"])

    def go_on_from(self, mark: Sequence[float]) -> None:
        """The clock has been set: the last recorded round was so long ago, and so many bytes."""
        seconds, payload, transport = self._now()
        self._mark = seconds - mark[0], payload - int(mark[1]), transport - int(mark[2])

    @property
    def in_flight(self) -> Sequence[Envelope]:
        """Messages that were sent and have not arrived."""
        return self._mail.room.in_flight

    def stand_still(self) -> None:
        """Cancel what runs, in bounded time: what was committed last can be saved then."""
        self._saving_since = self._runtime.now
        self._runtime.states.settle({node: self._rounds[node] - 1 for node in self._entered})
        self._halt(sorted(self._entered - self._idle - self._halting))
        deadline = self._runtime.now + self._config.cluster.cancel_grace_s + 1.0
        while self._halting and self._runtime.now < deadline:
            happening = self._runtime.next(deadline)
            if happening is not None:
                self._note(happening)

    def _now(self) -> tuple[float, int, int]:
        return self._runtime.now, self._progress.ledger.payload, self._runtime.transport_nbytes or 0

    def _stop(self) -> None:
        """Cancel what still runs; it goes back to its last commit."""
        waiting = set(self._mail.room.nodes).difference(self._progress.down)
        self._runtime.states.settle({node: self._rounds[node] - 1 for node in waiting})
        self._runtime.programs.halt(sorted(waiting))
        while waiting:
            # Bounded: a runtime ends a node that does not stand still within the grace period.
            happening = self._runtime.next(self._runtime.now + self._config.cluster.round_deadline_s)
            match happening:
                case Halted(node):
                    waiting.discard(node)
                case Died(node, reason):
                    waiting.discard(node)
                    self._progress.lose(node, reason, self._rounds[node])
                case Retired(node):
                    waiting.discard(node)
                case None:
                    pass
                case _:
                    _ = self._progress.note(happening)
