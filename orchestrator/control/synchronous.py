"""The loop over rounds that all members do together. One round reads top to bottom: view, begin, events, commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import Posted, Returned, Secured, Waiting
from starling.algorithms.api import View
from starling.algorithms.words import listed
from starling.orchestrator.control.members import NOBODY_COMES, Members
from starling.orchestrator.control.messaging import Mail
from starling.orchestrator.errors import DivergedError, ProgramsDivergeError, RunError
from starling.orchestrator.protocol.events import (
    Abort,
    AskAgain,
    Cancel,
    Close,
    Commit,
    Deadline,
    Deliver,
    Delivered,
    Diverged,
    Elapsed,
    Lost,
    Posts,
    ProgramsDiverge,
    Reached,
    Returns,
    Secure,
    Withdrawn,
)
from starling.orchestrator.protocol.faults import Faults
from starling.orchestrator.protocol.mailboxes import Delivery, Mailroom
from starling.orchestrator.protocol.rendezvous import Rendezvous
from starling.orchestrator.runtimes.events import Died, Halted, Retired

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import FaultPhase
    from starling.orchestrator.control.run_state import Progress
    from starling.orchestrator.protocol.events import Decision, Event
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover
    from starling.orchestrator.runtimes.events import Happening


_MAX_ATTEMPTS = 10
_MOST_GROUPS = 4
"""Of replicas that differ, shown in a message."""
"""At one round."""


@dataclass
class Attempt:
    """One attempt at one round."""

    number: int
    rendezvous: Rendezvous
    began: float
    deadline: float
    closed: dict[int, tuple[NodeId, ...]] = field(default_factory=dict)
    reports: dict[NodeId, Returned] = field(default_factory=dict)
    again: list[tuple[float, int]] = field(default_factory=list)
    """When the close policies of which exchanges are to be asked again."""
    late: set[NodeId] = field(default_factory=set)
    """Cancelled."""
    heard_at: float = 0.0
    """When enough of them were last heard of: the begin, or the last close."""
    is_silent: bool = False
    """It was given up because too few were heard of."""
    disturbed: bool = False
    """A node was lost, or late."""
    aborted: str | None = None
    """Why it cannot be finished."""


class Synchronous:
    """Rounds with a barrier at their end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._runtime = progress.runtime
        self._config = progress.config
        self._mail = Mail(progress, Mailroom(progress.facts, lockstep=True), self._handed_over)
        self._members = Members(progress)
        self._members.transfers.replicated = self._config.algorithm.replicated
        self._members.transfers.on_begin = self._transfers
        self._view = View(0, ())
        """Of the last committed round."""
        self._epoch = -1
        self._late: set[NodeId] = set()
        """Cancelled in the last committed round, which they have missed, and not given its state since."""
        self._halting: set[NodeId] = set()
        """Cancelled, and not standing still yet."""
        self._faults = Faults(self._config.faults)
        self._number = 0
        self._wanted = 0
        """Nodes without which the round, begun once, could not be finished: its aggregator needs as many."""
        self._is_revived = False
        self._stands = False
        """It goes on from a checkpoint, with the processes of then."""

    def run(self) -> None:
        """Do all rounds; one that cannot be finished begins again with whoever is there."""
        if not self._stands:
            self._members.act()
        if self._is_revived:
            self._end_round(self._progress.committed)  # which a checkpoint is made before
        for number in range(self._progress.committed + 1, self._config.rounds):
            tries, was_silent, self._wanted = 1, False, 0
            while (attempt := self._attempt(number)).aborted is not None:
                if tries == _MAX_ATTEMPTS:
                    raise RunError(f"round {number} cannot be finished, tried {tries} times: {attempt.aborted}")
                # Who hangs has been replaced after the first time; who is only slow is so again.
                if not attempt.disturbed or (was_silent and attempt.is_silent):
                    # With the same nodes and the same samples it would end in the same way.
                    raise RunError(f"round {number} cannot be finished: {attempt.aborted}")
                tries, was_silent = tries + 1, attempt.is_silent
        self._runtime.states.settle(dict.fromkeys(self._progress.members, self._progress.committed))

    @property
    def result(self) -> tuple[NodeId, ...]:
        """Whose mean model is the run's; all are alike if the algorithm is replicated."""
        return tuple(node for node in self._progress.members if self._is_sound(node))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Have the last commit saved; no program of a round is open, or what it does is void."""
        self._settle()
        view = self._view
        state = {
            "view": [view.number, view.members, view.joined, view.left],
            "epoch": self._epoch,
            "late": sorted(self._late),
            "halting": sorted(self._halting),
            "faults": self._faults.to_json(),
        }
        shared = min(self.result) if self._config.algorithm.replicated else None
        self._progress.save(state, self._members.to_save(), shared, self._mail, self._members)

    def revive(self, state: Mapping[str, Any], mail: Mapping[str, Any], rounds: Mapping[NodeId, int]) -> list[Envelope]:
        """Go on from what ``save`` gave, and return the messages that wait; ``rounds`` are the nodes' last ones."""
        self._go_on_from(state)
        if not self._config.algorithm.replicated:
            self._late = set(state.get("late", ())) & self._progress.facts.keys()
        self._members.bring_back(rounds, self._late)
        return self._mail.room.revive(mail)

    def stand(self, state: Mapping[str, Any], mail: Mapping[str, Any], members: Mapping[str, Any]) -> list[Envelope]:
        """The same where processes are what they were, and at the same moment; ``members`` are these nodes'."""
        self._go_on_from(state)
        self._stands = True
        self._late, self._halting = set(state["late"]), set(state["halting"])
        self._members.revive(members)
        return self._mail.room.revive(mail, exactly=True)

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        self._view = View(state["view"][0], *map(tuple, state["view"][1:]))
        self._epoch = state["epoch"]
        self._is_revived = True

    @property
    def in_flight(self) -> Sequence[Envelope]:
        """Messages that were sent and have not arrived."""
        return self._mail.room.in_flight

    def stand_still(self) -> None:
        """Cancel what runs, in bounded time: what was committed last can be saved then."""
        self._settle()  # else what is cancelled goes back to the commit before
        there = [node for node in self._progress.nodes if node in self._progress.members]
        self._halting.update(there)
        self._mail.room.forget(self._progress.committed + 1)
        self._runtime.programs.halt(there)
        deadline = self._runtime.now + self._config.cluster.cancel_grace_s + 1.0
        while self._halting and self._runtime.now < deadline:
            happening = self._runtime.next(deadline)
            if happening is not None:
                self._between(self._progress.committed + 1, happening)

    def _is_sound(self, node: NodeId) -> bool:
        """Whether a node holds what was committed last, having been there."""
        return node not in self._progress.down and node not in self._members.new and node not in self._late

    # --- one round ---------------------------------------------------------------------------------------------------

    def _attempt(self, number: int) -> Attempt:
        progress = self._progress
        self._epoch += 1
        self._number = number
        self._assemble(number)
        view = self._next_view()
        joiners = tuple(node for node in view.members if node in self._members.loaded)
        need = self._config.need_of(len(view.members))
        now = self._runtime.now
        rendezvous = Rendezvous(
            view.members,
            need,
            replicated=self._config.algorithm.replicated,
            heal=self._config.on_divergence == "heal",
            began=now,
        )
        attempt = Attempt(number, rendezvous, now, now + self._config.cluster.round_deadline_s, heard_at=now)
        transport, booked = self._runtime.transport_nbytes, progress.ledger.payload
        repair = view.changed and progress.committed >= 0
        progress.record(
            "begin",
            round=number,
            epoch=self._epoch,
            view=view.members,
            need=need,
            number=view.number,
            joined=view.joined,
            left=view.left,
            joiners=joiners,
            repair=repair,
        )
        for node in view.members:
            self._mail.room.begin(node, number)
        self._runtime.programs.begin(
            self._epoch,
            number,
            view,
            progress.committed,
            view.members,
            repair=repair,
            joiners=joiners,
            places=progress.samples.begin(number, view.members, view.members),
        )
        self._strike("train", number)
        try:
            while not rendezvous.over:
                event = self._next(attempt)
                if event is not None:
                    self._act(attempt, rendezvous.handle(event, self._runtime.now))
        finally:
            progress.ledger.book("peer", rendezvous.payload_nbytes)
        if attempt.aborted is not None:
            self._abandon(attempt)
            return attempt
        self._view, self._late = view, attempt.late - progress.down
        contributors = attempt.closed[max(attempt.closed)] if attempt.closed else ()
        progress.record("commit", round=number, closed=attempt.closed, committed=progress.members)
        self._members.committed(number, {node: attempt.reports[node] for node in progress.members})
        progress.seal(number, view, attempt.reports[progress.members[0]].record, self.result)
        moved = self._runtime.transport_nbytes
        progress.round_done(
            [attempt.reports[node] for node in progress.members],
            dict.fromkeys(self.result, number),
            alike=self._config.algorithm.replicated,
            contributing=len(contributors),
            in_view=len(view.members),
            late=len(attempt.late),
            payload_bytes=progress.ledger.payload - booked,
            transport_bytes=None if moved is None else moved - (transport or 0),
            seconds=self._runtime.now - attempt.began,
        )
        if progress.checkpoints is not None and progress.checkpoints.is_due(number):
            self.save()
        self._end_round(number)
        return attempt

    def _end_round(self, number: int) -> None:
        """Let happen what is to happen when round ``number`` is committed, and say what could not happen in it."""
        self._strike("commit", number)
        for event in self._faults.missed(number):
            line = f"faults.events: round {number} has no moment {event.phase!r}; nothing happened to this node"
            self._progress.observer.on_log(event.who, (line,))

    def _next_view(self) -> View:
        """All nodes that have what was committed last; a change counts against the last committed round."""
        progress, last = self._progress, self._view
        lacking = self._lacking()
        members = tuple(node for node in progress.nodes if node not in lacking)
        joined = tuple(sorted(set(members).difference(progress.members) | (self._members.new & set(members))))
        left = tuple(sorted(set(last.members).difference(members)))
        return View(last.number + bool(last.members and (joined or left)), members, joined, left)

    def _abandon(self, attempt: Attempt) -> None:
        """Cancel who is left of an attempt: all go back to the last commit."""
        survivors = [node for node in attempt.rendezvous.view if node not in self._progress.down]
        self._mail.room.forget(attempt.number)
        self._halting.update(survivors)
        self._runtime.programs.halt(survivors)

    def _strike(self, phase: FaultPhase, number: int, node: NodeId | None = None) -> None:
        """Let the scheduled faults of this moment happen."""
        for event in self._faults.due(number, phase, node):
            self._members.suffer(event, number)

    def _transfers(self, joiner: NodeId, donor: NodeId) -> None:
        for node in (joiner, donor):
            self._strike("transfer", self._number, node)

    def _handed_over(self, handover: Handover) -> None:
        if isinstance(handover.outcome, Delivery):
            self._strike("receive", self._number, handover.node)

    def _next(self, attempt: Attempt) -> Event | None:
        """Wait for what happens next; return what is for the rendezvous."""
        active = attempt.rendezvous.active
        if self._mail.room.stuck(active):
            names = listed(sorted(active))
            message = f"round {attempt.number}: nodes {names} all wait for messages, and none is on its way"
            raise RunError(message)
        timeout, elapsed = self._mail.next_timeout(), min(attempt.again, default=None)
        moments = [
            timeout,
            None if elapsed is None else elapsed[0],
            self._members.next_due(),
            self._members.next_withdrawal() if self._members.leaving else None,
        ]
        until = min(moment for moment in (attempt.deadline, *moments) if moment is not None)
        happening = self._runtime.next(until)
        if happening is not None:
            return self._note(attempt, happening)
        if self._members.act():
            return None
        for node in self._members.withdraw():
            return Withdrawn(node)
        now = self._runtime.now
        if timeout is not None and timeout <= now:
            self._mail.expire()
            return None
        if elapsed is not None and elapsed[0] <= now:
            attempt.again.remove(elapsed)
            return Elapsed(elapsed[1])
        if attempt.deadline > now:
            return None
        cluster = self._config.cluster
        attempt.deadline = now + cluster.round_deadline_s
        # Whoever hangs is found also where nobody waits for it yet, or where too few would be left without it.
        self._runtime.processes.probe(sorted(attempt.rendezvous.active))
        patience = cluster.round_deadline_s + cluster.min_nodes_timeout_s
        if not attempt.rendezvous.is_waited_for:
            attempt.heard_at = now  # all of them compute, which may take as long as it takes
        if now - attempt.heard_at >= patience:
            attempt.is_silent = attempt.disturbed = True
            attempt.rendezvous.over = True
            reason = (
                f"too few nodes have been heard of for {patience:g} s "
                "(cluster.round_deadline_s + min_nodes_timeout_s); raise round_deadline_s if they are only slow"
            )
            self._act(attempt, [Abort(reason)])
            return None
        return Deadline()

    def _note(self, attempt: Attempt, happening: Happening) -> Event | None:
        """Keep what is for the controller; return what is for the rendezvous."""
        match happening:
            case Returns(reports):
                attempt.reports.update(reports)
                return happening
            case Posts(posts):
                if self._faults.is_pending:
                    for node in posts:
                        self._strike("post", attempt.number, node)
                return happening
            case Reached(node, Returned() as report):
                attempt.reports[node] = report
                return happening
            case Died(node) | Retired(node):
                self._between(attempt.number, happening)
                attempt.disturbed = True
                return Lost(node)
            case Reached(node, Posted()):
                self._strike("post", attempt.number, node)
                return happening
            case Reached(_, Waiting()) | Secured() | Delivered():
                return happening
            case _:
                self._between(attempt.number, happening)
        return None

    def _between(self, number: int, happening: Happening) -> None:
        """Take what may happen at any time."""
        progress, members = self._progress, self._members
        if isinstance(happening, Died | Retired):
            self._halting.discard(happening.node)
            self._mail.left(happening.node)
        if members.take(number, happening):
            for node in progress.nodes:
                self._mail.room.join(node)
            return
        match happening:
            case Halted(node):
                self._halting.discard(node)
                members.stands_still(node)
            case _:
                _ = progress.note(happening) or self._mail.take(happening)

    def _act(self, attempt: Attempt, decisions: list[Decision]) -> None:
        self._runtime.perform(decisions)
        number, record = attempt.number, self._progress.record
        for decision in decisions:
            match decision:
                case Close(seq, closed, inline):
                    attempt.closed[seq] = closed
                    if inline:  # both of its steps at once
                        self._strike("secure", number)
                        self._strike("deliver", number)
                    attempt.heard_at = self._runtime.now
                    attempt.deadline = attempt.heard_at + self._config.cluster.round_deadline_s
                case AskAgain(seq, after_s):
                    attempt.again = [one for one in attempt.again if one[1] != seq]
                    attempt.again.append((self._runtime.now + after_s, seq))
                case Commit(members):
                    self._progress.may_commit()
                    self._progress.committed, self._progress.members = number, members
                case Secure():
                    self._strike("secure", number)
                case Deliver():
                    self._strike("deliver", number)
                case Cancel(node, reason):
                    record("late", round=number, node=node, reason=reason)
                    advice = "; raise cluster.round_deadline_s if it is only slow" if "it had not" in reason else ""
                    self._progress.observer.on_log(node, (f"round {number} was cancelled: {reason}{advice}",))
                    self._mail.room.stop(node)
                    attempt.late.add(node)
                    attempt.disturbed = True
                    self._halting.add(node)
                case Abort(reason, least):
                    record("abort", round=number, epoch=self._epoch, reason=reason)
                    attempt.aborted = reason
                    self._wanted = max(self._wanted, self._config.nodes_for(least) or 0)
                case Diverged(groups, healed):
                    record("diverged", round=number, groups=groups, healed=healed)
                    self._progress.num_healed += healed
                    if not healed:
                        raise DivergedError(_divergence(number, groups, self._config.on_divergence))
                case ProgramsDiverge(seq, first, second, message):
                    text = (
                        f"round {number}, exchange {seq}: nodes {first} and {second} await different things: {message}"
                    )
                    raise ProgramsDivergeError(text)
                case _:
                    pass

    # --- between rounds ----------------------------------------------------------------------------------------------

    def _lacking(self) -> set[NodeId]:
        """Nodes that have not got what was committed last."""
        progress, members = self._progress, self._members
        if progress.committed < 0:
            return set()  # all are in the initial state, which is the same everywhere
        lacking = members.new | (self._late if self._config.algorithm.replicated else set())
        return lacking.difference(members.loaded).intersection(progress.nodes)

    def _assemble(self, number: int) -> None:
        """Wait until there are enough nodes, and nobody moves any more.

        Those that were cancelled stand still, those that were told to leave have handed over what they hold, and those
        that lack the committed state have got it.

        Raises:
            RunError: there are too few for too long, or nobody has the committed state.
        """
        cluster = self._config.cluster
        deadline = self._runtime.now + cluster.min_nodes_timeout_s
        until = self._runtime.now  # what has happened already is taken first
        while True:
            happening = self._runtime.next(until)
            if happening is not None:
                self._between(number, happening)
                until = self._runtime.now
                continue
            self._members.act()
            if not self._halting and self._is_assembled(number):
                return
            if self._runtime.now >= deadline:
                raise RunError(self._still_waiting(number))
            # Bounded also for those that halt, retire or load: a runtime ends who takes too long.
            until = min(deadline, self._members.next_due() or deadline)

    def _is_assembled(self, number: int) -> bool:
        """Have done what is still to be done before a round; say whether that is nothing."""
        progress, members = self._progress, self._members
        leaving = [node for node in members.leaving if node not in progress.down]
        if leaving:
            self._settle()
            members.retire(leaving)
        if not members.is_retiring and not members.transfers.pending:
            self._check_hope(number)
        if members.is_retiring or len(progress.nodes) < max(self._config.cluster.nodes.min, self._wanted):
            return False
        members.transfers.donors = self.result
        members.transfers.retry()
        lacking = sorted(self._lacking().difference(members.transfers.pending))
        if lacking:
            self._settle()
            for node in lacking:
                members.give_state(number, node)
        return not members.transfers.pending

    def _check_hope(self, number: int) -> None:
        """End a run that waits in vain: too few nodes can come, or whoever comes finds nobody who has the last commit.

        Nodes that the configuration lets join later do not count: they join in rounds that never begin.

        Raises:
            RunError: it is so.
        """
        progress, members = self._progress, self._members
        most = members.most_possible()
        if most is not None and most < max(self._config.cluster.nodes.min, self._wanted):
            raise RunError(f"round {number}: {self._too_few()}; {NOBODY_COMES}")
        if progress.committed < 0 or self._lacking() != set(progress.nodes):
            return
        if not members.keeps(None if not self._config.algorithm.replicated else progress.committed):
            raise RunError(f"round {number}: no node is left that has the model of round {progress.committed}")

    def _settle(self) -> None:
        """Let the last commit be applied by all that have it."""
        sound = [node for node in self._progress.members if self._is_sound(node)]
        self._runtime.states.settle(dict.fromkeys(sound, self._progress.committed))

    def _still_waiting(self, number: int) -> str:
        cluster, there = self._config.cluster, len(self._progress.nodes)
        if there < max(cluster.nodes.min, self._wanted):
            what = self._too_few()
        else:
            slow = self._halting | set(self._members.transfers.pending) | self._members.leaving.keys()
            what = f"nodes {listed(sorted(slow))} do not become ready"
        return f"round {number}: {what}; waited for {cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"

    def _too_few(self) -> str:
        least, there = self._config.cluster.nodes.min, len(self._progress.nodes)
        if there < least:
            return f"{there} nodes are there, and cluster.nodes.min is {least}"
        return f"{there} nodes are there, and the round's aggregator needs {self._wanted}"


def _divergence(number: int, groups: Sequence[Sequence[NodeId]], mode: str) -> str:
    shown = " against ".join(f"nodes {listed(group)}" for group in groups[:_MOST_GROUPS])
    if len(groups) > _MOST_GROUPS:
        shown += f" and {len(groups) - _MOST_GROUPS} more groups"
    advice = (
        "on_divergence: heal would go on with what most have"
        if mode == "stop"
        else "no majority of them agrees, so none can be healed"
    )
    return f"round {number}: the shared state of replicas differs: {shown}; {advice}"
