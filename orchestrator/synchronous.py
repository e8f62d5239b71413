"""The loop over rounds that all members do together. One round reads top to bottom: view, begin, events, commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from algorithms.api import View
from orchestrator.errors import DivergedError, NodeLostError, ProgramsDivergeError, RunError
from orchestrator.events import (
    Abort,
    AskAgain,
    Cancel,
    Close,
    Commit,
    Deadline,
    Delivered,
    Diverged,
    Elapsed,
    Post,
    ProgramsDiverge,
    Return,
    Secured,
    Waits,
)
from orchestrator.mail import Mail
from orchestrator.mailroom import Mailroom
from orchestrator.rendezvous import Rendezvous
from orchestrator.runtime import Died, Finished, Halted

if TYPE_CHECKING:
    from actors.tickets import Returned
    from algorithms.api import NodeId
    from orchestrator.events import Decision, Event
    from orchestrator.progress import Progress
    from orchestrator.runtime import Happening


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


class Synchronous:
    """Rounds with a barrier at their end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._runtime = progress.runtime
        self._config = progress.config
        self._mail = Mail(progress, Mailroom(progress.facts, lockstep=True))
        self._view = View(0, ())
        self._late: set[NodeId] = set()
        """Cancelled in the last round; to be given the state of others before they take part again."""
        self._running: set[NodeId] = set()
        """Of those: still at it."""

    def run(self) -> None:
        """Do all rounds."""
        for number in range(self._config.rounds):
            self._round(number)
        self._runtime.settle(dict.fromkeys(self._progress.members, self._progress.committed))

    @property
    def result(self) -> tuple[NodeId, ...]:
        """Whose mean model is the run's."""
        members = self._progress.members
        return members[:1] if self._config.algorithm.replicated else members

    # --- one round ---------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        progress = self._progress
        self._take_back_late(number)
        view = self._next_view()
        need = self._config.need
        rendezvous = Rendezvous(view.members, need, replicated=self._config.algorithm.replicated)
        now = self._runtime.now
        attempt = Attempt(number, rendezvous, now, now + self._config.cluster.round_deadline_s)
        transport = self._runtime.transport_nbytes
        booked = progress.ledger.payload
        progress.record("begin", round=number, epoch=number, view=view.members, need=need)
        for node in view.members:
            self._mail.room.begin(node, number)
        repair = view.changed and number > 0
        self._runtime.begin(number, number, view, progress.committed, view.members, repair=repair)
        try:
            while not rendezvous.over:
                event = self._next(attempt)
                if event is not None:
                    self._act(attempt, rendezvous.handle(event, self._runtime.now))
        finally:
            progress.ledger.book("peer", rendezvous.payload_nbytes)
        contributors = attempt.closed[max(attempt.closed)] if attempt.closed else ()
        progress.record("commit", round=number, closed=attempt.closed, committed=progress.members)
        moved = self._runtime.transport_nbytes
        progress.round_done(
            [attempt.reports[node] for node in progress.members],
            dict.fromkeys(self.result, number),
            contributing=len(contributors),
            payload_bytes=progress.ledger.payload - booked,
            transport_bytes=None if moved is None else moved - (transport or 0),
            seconds=self._runtime.now - attempt.began,
        )

    def _next_view(self) -> View:
        """All nodes that are alive; a change counts against the last committed round."""
        progress = self._progress
        members, last = progress.nodes, self._view
        joined = tuple(sorted(set(members).difference(progress.members)))
        left = tuple(sorted(set(last.members).difference(members)))
        self._view = View(last.number + bool(last.members and (joined or left)), members, joined, left)
        return self._view

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
        happening = self._runtime.next(until)
        if happening is not None:
            return self._note(attempt, happening)
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
            case Finished(node, report):
                attempt.reports[node] = report
                return Return(node, report.num_collectives, report.digest)
            case Halted(node):
                self._running.discard(node)
            case Died(node, reason):
                self._died(attempt.number, node, reason)
            case Post() | Waits() | Secured() | Delivered():
                return happening
            case _:
                _ = self._progress.note(happening) or self._mail.take(happening)
        return None

    def _died(self, number: int, node: NodeId, reason: str) -> None:
        self._progress.lost.append(node)
        self._progress.record("lost", round=number, node=node, reason=reason)
        message = f"{self._progress.name(node)} was lost in round {number}: {reason}"
        raise NodeLostError(message)

    def _act(self, attempt: Attempt, decisions: list[Decision]) -> None:
        self._runtime.perform(decisions)
        number, record = attempt.number, self._progress.record
        for decision in decisions:
            match decision:
                case Close(seq, closed):
                    attempt.closed[seq] = closed
                    attempt.deadline = self._runtime.now + self._config.cluster.round_deadline_s
                case AskAgain(seq, after_s):
                    attempt.again = [one for one in attempt.again if one[1] != seq]
                    attempt.again.append((self._runtime.now + after_s, seq))
                case Commit(members):
                    self._progress.committed, self._progress.members = number, members
                case Cancel(node, reason):
                    record("late", round=number, node=node, reason=reason)
                    advice = "raise cluster.round_deadline_s if it is only slow"
                    self._progress.observer.on_log(node, (f"round {number} was cancelled: {reason}; {advice}",))
                    self._mail.room.stop(node)
                    self._late.add(node)
                    self._running.add(node)
                case Abort(reason):
                    record("abort", round=number, reason=reason)
                    message = f"round {number} cannot be finished: {reason}"
                    raise RunError(message)
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

    def _take_back_late(self, number: int) -> None:
        """Wait until those that were cancelled stand still, and give them what the others have committed."""
        progress = self._progress
        while self._running:
            # Bounded: a runtime ends a node that does not stand still within the grace period.
            happening = self._runtime.next(self._runtime.now + self._config.cluster.round_deadline_s)
            match happening:
                case Halted(node):
                    self._running.discard(node)
                case Died(node, reason):
                    self._died(number, node, reason)
                case None:
                    pass
                case _:
                    _ = progress.note(happening) or self._mail.take(happening)
        if self._late and self._config.algorithm.replicated:
            self._runtime.settle(dict.fromkeys(progress.members, progress.committed))
            for place, node in enumerate(sorted(self._late)):
                donor = progress.members[place % len(progress.members)]
                nbytes = self._runtime.transfer(node, donor)
                progress.ledger.book("recovery", nbytes)
                progress.record("transfer", round=number, node=node, donor=donor, nbytes=nbytes)
        self._late.clear()
