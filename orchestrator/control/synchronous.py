"""The loop over rounds that all members do together. One round reads top to bottom: view, begin, events, commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starling.actors.host.round_order import RoundOrder
from starling.actors.wire.tickets import Measured, Posted, Returned, Secured, Waiting
from starling.algorithms.api import View
from starling.algorithms.words import listed
from starling.orchestrator.control.loop import Loop
from starling.orchestrator.control.min_nodes import NOBODY_COMES, MinNodes
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
    Measure,
    Posts,
    ProgramsDiverge,
    Reached,
    Returns,
    Secure,
    Withdrawn,
)
from starling.orchestrator.protocol.mailboxes import Mailroom
from starling.orchestrator.protocol.rendezvous import Rendezvous
from starling.orchestrator.runtimes.decisions import carry_out
from starling.orchestrator.runtimes.events import Died, Retired

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from starling.algorithms.api import NodeId
    from starling.orchestrator.control.round_records import Cost
    from starling.orchestrator.control.run_state import RunState
    from starling.orchestrator.protocol.events import Decision, Event
    from starling.orchestrator.runtimes.events import Happening


_MAX_ATTEMPTS = 10
"""At one round."""
_MOST_GROUPS = 4
"""Of replicas that differ, shown in a message."""


@dataclass
class Attempt:
    """One attempt at one round."""

    number: int
    view: View
    rendezvous: Rendezvous
    cost: Cost
    """What the run had cost when it began."""
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


class Synchronous(Loop):
    """Rounds with a barrier at their end."""

    def __init__(self, state: RunState) -> None:
        room = Mailroom(state.roster.facts, lockstep=True)
        super().__init__(state, room, replicated=state.run.config.algorithm.replicated)
        self._min_nodes = MinNodes(state, self._members)
        self._view = View(0, ())
        """Of the last committed round."""
        self._epoch = -1
        self._late: set[NodeId] = set()
        """Cancelled in the last committed round, which they have missed, and not given its state since."""

    def run(self) -> None:
        """Do all rounds; one that cannot be finished begins again with whoever is there."""
        if not self._same_processes:
            self._members.act()
        if self._is_restored:
            self._end_round(self._state.committed)  # which a checkpoint is made before
        for number in range(self._state.committed + 1, self._config.rounds):
            tries, was_silent, self._min_nodes.wanted = 1, False, 0
            while (attempt := self._attempt(number)).aborted is not None:
                if tries == _MAX_ATTEMPTS:
                    raise RunError(f"round {number} cannot be finished, tried {tries} times: {attempt.aborted}")
                # Who hangs has been replaced after the first time; who is only slow is so again.
                if not attempt.disturbed or (was_silent and attempt.is_silent):
                    # With the same nodes and the same samples it would end in the same way.
                    raise RunError(f"round {number} cannot be finished: {attempt.aborted}")
                tries, was_silent = tries + 1, attempt.is_silent
        self._runtime.states.settle(dict.fromkeys(self._state.members, self._state.committed))

    @property
    def result(self) -> tuple[NodeId, ...]:
        """The nodes whose mean model is the run's; all are alike if the algorithm is replicated."""
        return tuple(node for node in self._state.members if self._is_sound(node))

    def save(self) -> None:
        """Save the last commit; no program of a round is open, or what it does is void."""
        self._settle()
        view = self._view
        # Resumed without them, a node that was late after it had caught up would catch up from the first round again.
        begun = self._members.holdings.begun & set(self._roster.nodes)
        state = {
            "view": [view.number, view.members, view.joined, view.left],
            "epoch": self._epoch,
            "late": sorted(self._late),
            "halting": sorted(self._halting),
            "faults": self._faults.to_json(),
            "entered": sorted(begun),
        }
        shared = min(self.result) if self._config.algorithm.replicated else None
        nodes = self._members.holdings.to_save(self._roster.nodes, begun)
        self._state.saving.save(state, nodes, shared, self._mail, self._members, begun)

    def _restore(self, state: Mapping[str, Any], rounds: Mapping[NodeId, int] | None) -> None:
        self._view = View(state["view"][0], *map(tuple, state["view"][1:]))
        self._epoch = state["epoch"]
        if rounds is None:
            self._late, self._halting = set(state["late"]), set(state["halting"])
            return
        if not self._config.algorithm.replicated:
            self._late = set(state.get("late", ())) & self._roster.facts.keys()
        self._members.restore_states(rounds, self._late)

    def _cancel(self) -> None:
        self._settle()  # else what is cancelled goes back to the commit before
        self._mail.room.forget(self._state.committed + 1)
        self._halt([node for node in self._roster.nodes if node in self._state.members])

    def _round_of(self, node: NodeId) -> int:
        del node
        return self._state.committed + 1

    def _is_sound(self, node: NodeId) -> bool:
        """Whether ``node`` holds what was committed last, having been there."""
        return node not in self._roster.down and node not in self._members.holdings.new and node not in self._late

    # --- one round ---------------------------------------------------------------------------------------------------

    def _attempt(self, number: int) -> Attempt:
        attempt = self._begin(number)
        rendezvous = attempt.rendezvous
        try:
            while not rendezvous.over:
                event = self._next(attempt)
                if event is not None:
                    self._act(attempt, rendezvous.handle(event, self._runtime.now))
        finally:
            self._state.ledger.book("peer", rendezvous.payload_nbytes)
        if attempt.aborted is None:
            self._close(attempt)
        else:  # all that are left go back to the last commit
            self._mail.room.forget(number)
            self._halt([node for node in rendezvous.view if node not in self._roster.down])
        return attempt

    def _begin(self, number: int) -> Attempt:
        """Wait for enough nodes, and let them begin the round."""
        state = self._state
        self._epoch += 1
        self._assemble(number)
        view = self._next_view()
        joiners = tuple(node for node in view.members if node in self._members.holdings.loaded)
        need = self._config.need_of(len(view.members))
        now = self._runtime.now
        rendezvous = Rendezvous(
            view.members,
            need,
            replicated=self._config.algorithm.replicated,
            heal=self._config.on_divergence == "heal",
            began=now,
        )
        cost, deadline = state.recorder.cost(), now + self._config.cluster.round_deadline_s
        attempt = Attempt(number, view, rendezvous, cost, deadline, heard_at=now)
        repair = view.changed and state.committed >= 0
        self._run.record(
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
        places = state.samples.begin(number, view.members, view.members)
        order = RoundOrder(self._epoch, number, view, state.committed, repair, joiners, places)
        self._runtime.programs.begin(order, view.members)
        self._strike("train", number)
        return attempt

    def _close(self, attempt: Attempt) -> None:
        """Record the round, which is committed, and save it if that is due."""
        state, number = self._state, attempt.number
        self._view, self._late = attempt.view, attempt.late - self._roster.down
        contributors = attempt.closed[max(attempt.closed)] if attempt.closed else ()
        self._run.record("commit", round=number, closed=attempt.closed, committed=state.members)
        reports = {node: attempt.reports[node] for node in state.members}
        self._members.committed(number, reports)
        state.sealed.seal(number, attempt.view, reports[state.members[0]].record, self.result)
        state.recorder.done(
            list(reports.items()),
            dict.fromkeys(self.result, number),
            state.recorder.cost().since(attempt.cost),
            alike=self._config.algorithm.replicated,
            contributing=len(contributors),
            in_view=len(attempt.view.members),
            late=len(attempt.late),
        )
        if state.saving.is_due():
            self.save()
        self._end_round(number)

    def _end_round(self, number: int) -> None:
        """Let happen what is to happen when round ``number`` is committed, and say what could not happen in it."""
        self._strike("commit", number)
        for event in self._faults.missed(number):
            line = f"faults.events: round {number} has no moment {event.phase!r}; nothing happened to this node"
            self._run.say(event.who, line)

    def _next_view(self) -> View:
        """Return the view of all nodes that have the last commit; changes count against the last committed round's."""
        state, last = self._state, self._view
        lacking = self._lacking()
        members = tuple(node for node in self._roster.nodes if node not in lacking)
        joined = set(members).difference(state.members) | (self._members.holdings.new & set(members))
        left = tuple(sorted(set(last.members).difference(members)))
        return View(last.number + bool(last.members and (joined or left)), members, tuple(sorted(joined)), left)

    def _next(self, attempt: Attempt) -> Event | None:
        """Wait for what happens next; return what is for the rendezvous."""
        active = attempt.rendezvous.active
        if self._mail.room.stuck(active):
            names = listed(sorted(active))
            message = f"round {attempt.number}: nodes {names} all wait for messages, and none is on its way"
            raise RunError(message)
        elapsed = min(attempt.again, default=None)
        happening = self._wait(attempt.deadline, None if elapsed is None else elapsed[0])
        if happening is not None:
            return self._note(attempt, happening)
        if self._members.act():
            return None
        for node in self._members.departures.withdraw():
            return Withdrawn(node)
        if self._mail.expire():
            return None
        if elapsed is not None and elapsed[0] <= self._runtime.now:
            attempt.again.remove(elapsed)
            return Elapsed(elapsed[1])
        return self._past_deadline(attempt) if attempt.deadline <= self._runtime.now else None

    def _past_deadline(self, attempt: Attempt) -> Event | None:
        """Ask whether nodes live; give the attempt up if too few have been heard of for too long."""
        now, cluster = self._runtime.now, self._config.cluster
        attempt.deadline = now + cluster.round_deadline_s
        # Whoever hangs is found also where nobody waits for it yet, or where too few would be left without it.
        self._runtime.processes.probe(sorted(attempt.rendezvous.active))
        patience = cluster.round_deadline_s + cluster.min_nodes_timeout_s
        if not attempt.rendezvous.is_waited_for:
            attempt.heard_at = now  # all of them compute, which may take as long as it takes
        if now - attempt.heard_at < patience:
            return Deadline()
        attempt.is_silent = attempt.disturbed = True
        attempt.rendezvous.over = True
        reason = (
            f"too few nodes have been heard of for {patience:g} s "
            "(cluster.round_deadline_s + min_nodes_timeout_s); raise round_deadline_s if they are only slow"
        )
        self._act(attempt, [Abort(reason)])
        return None

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
                self._take(happening)
                attempt.disturbed = True
                return Lost(node)
            case Reached(node, Posted()):
                self._strike("post", attempt.number, node)
                return happening
            case Reached(_, Waiting()) | Measured() | Secured() | Delivered():
                return happening
            case _:
                self._take(happening)
        return None

    def _gone(self, node: NodeId) -> None:
        self._mail.left(node)

    def _changed(self, happening: Happening) -> None:
        del happening
        for node in self._roster.nodes:
            self._mail.room.join(node)

    def _stands_still(self, node: NodeId) -> None:
        self._members.departures.stands_still(node)

    def _act(self, attempt: Attempt, decisions: list[Decision]) -> None:
        carry_out(self._runtime, decisions)
        number, record = attempt.number, self._run.record
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
                    self._run.may_commit()
                    self._state.committed, self._state.members = number, members
                case Measure():
                    self._strike("measure", number)
                case Secure():
                    self._strike("secure", number)
                case Deliver():
                    self._strike("deliver", number)
                case Cancel(node, reason):
                    record("late", round=number, node=node, reason=reason)
                    advice = "; raise cluster.round_deadline_s if it is only slow" if "it had not" in reason else ""
                    self._run.say(node, f"round {number} was cancelled: {reason}{advice}")
                    self._mail.room.stop(node)
                    attempt.late.add(node)
                    attempt.disturbed = True
                    self._halting.add(node)
                case Abort(reason, least):
                    record("abort", round=number, epoch=self._epoch, reason=reason)
                    attempt.aborted = reason
                    self._min_nodes.wanted = max(self._min_nodes.wanted, self._config.nodes_for(least) or 0)
                case Diverged(groups, healed):
                    record("diverged", round=number, groups=groups, healed=healed)
                    self._state.num_healed += healed
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
        """Return the nodes that have not got what was committed last."""
        if self._state.committed < 0:
            return set()  # all are in the initial state, which is the same everywhere
        holdings = self._members.holdings
        lacking = holdings.new | (self._late if self._config.algorithm.replicated else set())
        return lacking.difference(holdings.loaded).intersection(self._roster.nodes)

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
                self._take(happening)
                until = self._runtime.now
                continue
            self._members.act()
            if not self._halting and self._is_assembled(number):
                return
            if self._runtime.now >= deadline:
                if not self._min_nodes.give_up_joiners(self._halting):
                    self._min_nodes.give_up(number, self._halting)
                deadline = self._runtime.now + cluster.min_nodes_timeout_s
            # Bounded also for those that halt, retire or load: a runtime ends who takes too long.
            until = min(deadline, self._members.next_due() or deadline)

    def _is_assembled(self, number: int) -> bool:
        """Do what is still to be done before a round; return whether that was nothing."""
        transfers, departures = self._members.transfers, self._members.departures
        leaving = [node for node in departures.leaving if node not in self._roster.down]
        if leaving:
            self._settle()
            departures.retire(leaving)
        if not departures.is_retiring and not transfers.pending:
            self._check_hope(number)
        if departures.is_retiring or self._min_nodes.are_missing:
            return False
        transfers.retry()
        lacking = sorted(self._lacking().difference(transfers.pending))
        if lacking:
            self._settle()
            for node in lacking:
                self._members.give_state(number, node)
        return not transfers.pending

    def _check_hope(self, number: int) -> None:
        """End a run that waits in vain: too few nodes can come, or whoever comes finds nobody who has the last commit.

        Nodes that the configuration lets join later do not count: they join in rounds that never begin.

        Raises:
            RunError: it is so.
        """
        if self._min_nodes.are_out_of_reach:
            raise RunError(f"round {number}: {self._min_nodes}; {NOBODY_COMES}")
        committed = self._state.committed
        if committed < 0 or self._lacking() != set(self._roster.nodes):
            return
        if not self._members.holdings.keeps(committed if self._config.algorithm.replicated else None):
            raise RunError(f"round {number}: no node is left that has the model of round {committed}")

    def _settle(self) -> None:
        """Let all nodes that have the last commit apply it."""
        sound = [node for node in self._state.members if self._is_sound(node)]
        self._runtime.states.settle(dict.fromkeys(sound, self._state.committed))


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
