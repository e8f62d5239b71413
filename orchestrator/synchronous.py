"""The loop over rounds that all members do together. One round reads top to bottom: view, begin, events, commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from algorithms.api import View
from orchestrator.errors import DivergedError, NodeGoneError, ProgramsDivergeError, RunError
from orchestrator.events import (
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
    Post,
    Posts,
    ProgramsDiverge,
    Return,
    Returns,
    Secure,
    Secured,
    Waits,
)
from orchestrator.faults import Faults
from orchestrator.mail import Mail
from orchestrator.mailroom import Mailroom
from orchestrator.membership import Replacements
from orchestrator.rendezvous import Rendezvous
from orchestrator.runtime import AllFinished, Died, Finished, Halted, Up

if TYPE_CHECKING:
    from actors.tickets import Returned
    from algorithms.api import NodeId
    from orchestrator.config import FaultPhase
    from orchestrator.events import Decision, Event
    from orchestrator.progress import Progress
    from orchestrator.runtime import Happening


_MAX_ATTEMPTS = 10
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
        self._mail = Mail(progress, Mailroom(progress.facts, lockstep=True))
        self._view = View(0, ())
        """Of the last committed round."""
        self._epoch = -1
        self._late: set[NodeId] = set()
        """Cancelled in the last committed round, which they have missed."""
        self._new: set[NodeId] = set()
        """Started since, with nothing but the initial state."""
        self._halting: set[NodeId] = set()
        """Cancelled, and not standing still yet."""
        self._replacements = Replacements()
        self._faults = Faults(self._config.faults)

    def run(self) -> None:
        """Do all rounds; one that cannot be finished begins again with whoever is there."""
        for number in range(self._config.rounds):
            tries = 1
            while (attempt := self._attempt(number)).aborted is not None:
                if tries == _MAX_ATTEMPTS:
                    raise RunError(f"round {number} cannot be finished, tried {tries} times: {attempt.aborted}")
                if not attempt.disturbed:
                    # With the same nodes and the same samples it would end in the same way.
                    raise RunError(f"round {number} cannot be finished: {attempt.aborted}")
                tries += 1
        self._runtime.settle(dict.fromkeys(self._progress.members, self._progress.committed))

    @property
    def result(self) -> tuple[NodeId, ...]:
        """Whose mean model is the run's; all are alike if the algorithm is replicated."""
        return tuple(node for node in self._progress.members if self._is_sound(node))

    def _is_sound(self, node: NodeId) -> bool:
        """Whether a node holds what was committed last."""
        return node not in self._progress.down and node not in self._new and node not in self._late

    # --- one round ---------------------------------------------------------------------------------------------------

    def _attempt(self, number: int) -> Attempt:
        progress = self._progress
        self._epoch += 1
        self._wait_for_nodes(number)
        joiners = self._transfer_state(number)
        view = self._next_view()
        need = self._config.need_of(len(view.members))
        now = self._runtime.now
        rendezvous = Rendezvous(view.members, need, replicated=self._config.algorithm.replicated, began=now)
        attempt = Attempt(number, rendezvous, now, now + self._config.cluster.round_deadline_s)
        transport, booked = self._runtime.transport_nbytes, progress.ledger.payload
        progress.record("begin", round=number, epoch=self._epoch, view=view.members, need=need)
        for node in view.members:
            self._mail.room.begin(node, number)
        repair = view.changed and progress.committed >= 0
        self._runtime.begin(self._epoch, number, view, progress.committed, view.members, repair=repair, joiners=joiners)
        self._strike("train", attempt)
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
        self._view, self._late, self._new = view, attempt.late, self._new.difference(progress.members)
        self._replacements.committed(progress.members)
        contributors = attempt.closed[max(attempt.closed)] if attempt.closed else ()
        progress.record("commit", round=number, closed=attempt.closed, committed=progress.members)
        progress.seal(number, view, attempt.reports[progress.members[0]].record, self.result)
        moved = self._runtime.transport_nbytes
        progress.round_done(
            [attempt.reports[node] for node in progress.members],
            dict.fromkeys(self.result, number),
            alike=self._config.algorithm.replicated,
            contributing=len(contributors),
            payload_bytes=progress.ledger.payload - booked,
            transport_bytes=None if moved is None else moved - (transport or 0),
            seconds=self._runtime.now - attempt.began,
        )
        self._strike("commit", attempt)
        for event in self._faults.missed(number):
            line = f"faults.events: round {number} has no moment {event.phase!r}; nothing happened to this node"
            progress.observer.on_log(event.node, (line,))
        return attempt

    def _next_view(self) -> View:
        """All nodes that are alive; a change counts against the last committed round."""
        progress = self._progress
        members, last = progress.nodes, self._view
        joined = tuple(sorted(set(members).difference(progress.members) | (self._new & set(members))))
        left = tuple(sorted(set(last.members).difference(members)))
        return View(last.number + bool(last.members and (joined or left)), members, joined, left)

    def _abandon(self, attempt: Attempt) -> None:
        """Cancel who is left of an attempt: all go back to the last commit."""
        survivors = [node for node in attempt.rendezvous.view if node not in self._progress.down]
        self._mail.room.forget(attempt.number)
        self._halting.update(survivors)
        self._runtime.halt(survivors)

    def _strike(self, phase: FaultPhase, attempt: Attempt, node: NodeId | None = None) -> None:
        """Let the scheduled faults of this moment happen."""
        for event in self._faults.due(attempt.number, phase, node):
            self._progress.record("fault", round=attempt.number, kind=event.kind, node=event.node, phase=phase)
            if event.node not in self._progress.down:
                (self._runtime.kill if event.kind == "kill" else self._runtime.hang)(event.node)

    def _next(self, attempt: Attempt) -> Event | None:
        """Wait for what happens next; return what is for the rendezvous."""
        active = attempt.rendezvous.active
        if self._mail.room.stuck(active):
            names = ", ".join(map(str, sorted(active)))
            message = f"round {attempt.number}: nodes {names} all wait for messages, and none is on its way"
            raise RunError(message)
        until = attempt.deadline
        timeout = self._mail.next_timeout()
        if timeout is not None:
            until = min(until, timeout)
        elapsed = min(attempt.again) if attempt.again else None
        if elapsed is not None:
            until = min(until, elapsed[0])
        due = self._replacements.next_due()
        if due is not None:
            until = min(until, due)
        happening = self._runtime.next(until)
        if happening is not None:
            return self._note(attempt, happening)
        if self._launch():
            return None
        if timeout is not None and timeout <= self._runtime.now:
            self._mail.expire()
            return None
        if elapsed is not None and elapsed[0] <= self._runtime.now:
            attempt.again.remove(elapsed)
            return Elapsed(elapsed[1])
        attempt.deadline = self._runtime.now + self._config.cluster.round_deadline_s
        return Deadline()

    def _note(self, attempt: Attempt, happening: Happening) -> Event | None:
        """Keep what is for the controller; return what is for the rendezvous."""
        match happening:
            case AllFinished(reports):
                attempt.reports.update(reports)
                node, report = next(iter(reports.items()))
                return Returns(Return(node, report.num_collectives, report.digest), tuple(reports))
            case Posts():
                if self._faults.is_pending:
                    for node in happening.wants:
                        self._strike("post", attempt, node)
                return happening
            case Finished(node, report):
                attempt.reports[node] = report
                return Return(node, report.num_collectives, report.digest)
            case Died(node, reason):
                self._lost(attempt.number, node, reason)
                attempt.disturbed = True
                return Lost(node)
            case Post(node):
                self._strike("post", attempt, node)
                return happening
            case Waits() | Secured() | Delivered():
                return happening
            case _:
                self._between(attempt.number, happening)
        return None

    def _between(self, number: int, happening: Happening) -> None:
        """Take what may happen at any time."""
        match happening:
            case Halted(node):
                self._halting.discard(node)
            case Up(facts):
                self._progress.back(facts)
                self._mail.room.join(facts.node)
                self._new.add(facts.node)
            case Died(node, reason):
                self._lost(number, node, reason)
            case _:
                _ = self._progress.note(happening) or self._mail.take(happening)

    def _lost(self, number: int, node: NodeId, reason: str) -> None:
        """A node is gone: it is started again."""
        message = self._progress.lose(node, reason, number)
        self._halting.discard(node)
        self._new.discard(node)
        self._mail.left(node)
        again = self._replacements.lost(node, self._runtime.now)
        advice = "it is started again" if again else "it has died too often to be started again"
        self._progress.observer.on_log(node, (f"{message}; {advice}",))
        self._launch()

    def _launch(self) -> bool:
        """Start the nodes that are to be started again now; say whether there were any."""
        due = self._replacements.due(self._runtime.now)
        if due:
            self._runtime.launch(due)
        return bool(due)

    def _act(self, attempt: Attempt, decisions: list[Decision]) -> None:
        self._runtime.perform(decisions)
        number, record = attempt.number, self._progress.record
        for decision in decisions:
            match decision:
                case Close(seq, closed, inline):
                    attempt.closed[seq] = closed
                    if inline:  # both of its steps at once
                        self._strike("secure", attempt)
                        self._strike("deliver", attempt)
                    attempt.deadline = self._runtime.now + self._config.cluster.round_deadline_s
                case AskAgain(seq, after_s):
                    attempt.again = [one for one in attempt.again if one[1] != seq]
                    attempt.again.append((self._runtime.now + after_s, seq))
                case Commit(members):
                    self._progress.committed, self._progress.members = number, members
                case Secure():
                    self._strike("secure", attempt)
                case Deliver():
                    self._strike("deliver", attempt)
                case Cancel(node, reason):
                    record("late", round=number, node=node, reason=reason)
                    advice = "raise cluster.round_deadline_s if it is only slow"
                    self._progress.observer.on_log(node, (f"round {number} was cancelled: {reason}; {advice}",))
                    self._mail.room.stop(node)
                    attempt.late.add(node)
                    attempt.disturbed = True
                    self._halting.add(node)
                case Abort(reason):
                    record("abort", round=number, epoch=self._epoch, reason=reason)
                    attempt.aborted = reason
                case Diverged(groups):
                    record("diverged", round=number, groups=groups)
                    shown = " against ".join(f"nodes {', '.join(map(str, group))}" for group in groups)
                    message = f"round {number}: the shared state of replicas differs: {shown}"
                    raise DivergedError(message)
                case ProgramsDiverge(seq, first, second, message):
                    text = (
                        f"round {number}, exchange {seq}: nodes {first} and {second} await different things: {message}"
                    )
                    raise ProgramsDivergeError(text)
                case _:
                    pass

    # --- between rounds ----------------------------------------------------------------------------------------------

    def _wait_for_nodes(self, number: int) -> None:
        """Wait until those that were cancelled stand still, and until there are enough.

        Raises:
            RunError: there are too few for too long.
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
            self._launch()
            there = len(self._progress.nodes)
            if not self._halting and there >= cluster.nodes.min:
                return
            if self._runtime.now >= deadline:
                message = (
                    f"round {number}: {there} nodes are there, and cluster.nodes.min is {cluster.nodes.min}; "
                    f"waited for {cluster.min_nodes_timeout_s:g} s (cluster.min_nodes_timeout_s)"
                )
                raise RunError(message)
            # Bounded also for those that are halting: a runtime ends who does not stand still within its grace period.
            until = min(deadline, self._replacements.next_due() or deadline)

    def _transfer_state(self, number: int) -> tuple[NodeId, ...]:
        """Give what was committed last to those that have not got it; return who was given it.

        Only a node of the last committed round can be a donor: one that is new can never overwrite the model.
        """
        progress = self._progress
        if progress.committed < 0:
            return ()  # all are in the initial state, which is the same everywhere
        needy = self._new | (self._late if self._config.algorithm.replicated else set())
        needy &= set(progress.nodes)
        if needy:
            self._runtime.settle(dict.fromkeys(self.result, progress.committed))
        for place, node in enumerate(sorted(needy)):
            self._receive_state(number, node, place)
        return tuple(sorted(needy & set(progress.nodes)))

    def _receive_state(self, number: int, node: NodeId, place: int) -> None:
        progress = self._progress
        while node not in progress.down:
            donors = self.result
            if not donors:
                message = f"round {number}: no node is left that has the model of round {progress.committed}"
                raise RunError(message)
            donor = donors[place % len(donors)]
            began = self._runtime.now
            try:
                nbytes = self._runtime.transfer(node, donor)
            except NodeGoneError:
                while (happening := self._runtime.next(self._runtime.now)) is not None:
                    self._between(number, happening)
                continue
            progress.ledger.book("recovery", nbytes)
            seconds = round(self._runtime.now - began, 6)
            progress.record("transfer", round=number, node=node, donor=donor, nbytes=nbytes, seconds=seconds)
            return
