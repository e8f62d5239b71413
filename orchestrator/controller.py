"""The controller: the loop over rounds. One round reads top to bottom: view, begin, events, commit, evaluate, record.

It alone decides what is committed. It holds no tensor: the rendezvous says what is to be done, the runtime does it.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from algorithms.api import View
from orchestrator.errors import (
    DivergedError,
    NodeFailedError,
    NodeLateError,
    NodeLostError,
    ProgramsDivergeError,
    RunError,
)
from orchestrator.events import Abort, Advance, Cancel, Commit, Deadline, Diverged, ProgramsDiverge
from orchestrator.ledger import Ledger
from orchestrator.records import RoundRecord, Started, Summary
from orchestrator.rendezvous import Rendezvous
from orchestrator.runtime import Died, Finished, Log, Raised

if TYPE_CHECKING:
    from actors.host import Returned
    from algorithms.api import NodeId
    from orchestrator.config import Config
    from orchestrator.events import Decision, Event
    from orchestrator.records import Observer, Status
    from orchestrator.runtime import Happening, NodeFacts, Runtime


@dataclass
class _Attempt:
    """One attempt at one round."""

    number: int
    rendezvous: Rendezvous
    began: float
    deadline: float
    closed: dict[int, tuple[NodeId, ...]] = field(default_factory=dict)
    reports: dict[NodeId, Returned] = field(default_factory=dict)


class Controller:
    """Drives one run on one runtime to its end."""

    def __init__(self, config: Config, runtime: Runtime, observer: Observer, *, run_id: str, run_dir: str) -> None:
        self._config = config
        self._runtime = runtime
        self._observer = observer
        self._run_id = run_id
        self._run_dir = run_dir
        self._ledger = Ledger()
        self._facts: dict[NodeId, NodeFacts] = {}
        self._committed = -1
        self._members: tuple[NodeId, ...] = ()
        self._metrics: dict[str, float] = {}
        self._digest: str | None = None
        self._lost = 0
        self._zero = 0.0
        """The runtime's clock when all nodes were up; times in the record count from it."""
        self._began = time.monotonic()

    def run(self) -> Summary:
        """Start the nodes, do all rounds, fetch the model.

        Raises:
            StarlingError: the run failed; ``summary`` says how far it came.
        """
        facts = self._runtime.start()
        self._facts = {one.node: one for one in facts}
        self._zero = self._runtime.now
        started = Started(
            config=self._config,
            run_id=self._run_id,
            run_dir=self._run_dir,
            nodes=facts,
            layout=self._runtime.layout,
            baselines=self._runtime.baselines,
            virtual=self._runtime.virtual,
        )
        self._observer.on_start(started)
        # Hundreds of thousands of objects are there to stay; each full collection would walk them all again.
        gc.freeze()
        try:
            for number in range(self._config.rounds):
                self._round(number)
        finally:
            gc.unfreeze()
        model = self._runtime.finish(self._committed, self._members[0])
        self._digest = model.digest
        self._observer.on_model(model)
        return self.summary("finished")

    # --- one round ---------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        view = self._view()
        need = self._config.need
        rendezvous = Rendezvous(view.members, need, replicated=self._config.algorithm.replicated)
        now = self._runtime.now
        attempt = _Attempt(number, rendezvous, now, now + self._config.cluster.round_deadline_s)
        transport = self._runtime.transport_nbytes
        self._record("begin", round=number, epoch=number, view=view.members, need=need)
        self._runtime.begin(epoch=number, number=number, view=view, committed=self._committed)
        try:
            while not rendezvous.over:
                happening = self._runtime.next(attempt.deadline)
                if happening is None:
                    attempt.deadline = self._runtime.now + self._config.cluster.round_deadline_s
                    happening = Deadline()
                event = self._note(attempt, happening)
                if event is not None:
                    self._act(attempt, rendezvous.handle(event))
        finally:
            self._ledger.book("peer", rendezvous.payload_nbytes)
        self._finish(attempt, transport)

    def _view(self) -> View:
        """All nodes, for now: a node that is lost ends the run."""
        members = tuple(sorted(self._facts))
        return View(0, members, joined=members if self._committed < 0 else ())

    def _note(self, attempt: _Attempt, happening: Happening) -> Event | None:
        """Keep what is for the controller; return what is for the rendezvous."""
        match happening:
            case Finished(node, report):
                attempt.reports[node] = report
            case Log(node, lines):
                self._observer.on_log(node, lines)
            case Raised(_, message, traceback):
                raise NodeFailedError(message, traceback)
            case Died(node, reason):
                self._lost += 1
                self._record("lost", round=attempt.number, node=node, reason=reason)
                message = f"node {node} ({self._facts[node].place}) was lost in round {attempt.number}: {reason}"
                raise NodeLostError(message)
            case _:
                return happening
        return None

    def _act(self, attempt: _Attempt, decisions: list[Decision]) -> None:
        self._runtime.perform(decisions)
        number = attempt.number
        for decision in decisions:
            match decision:
                case Advance(seq, _, closed):
                    attempt.closed[seq] = closed
                    attempt.deadline = self._runtime.now + self._config.cluster.round_deadline_s
                case Commit(members):
                    self._committed, self._members = number, members
                case Cancel(node, reason):
                    limit = self._config.cluster.round_deadline_s
                    self._record("late", round=number, node=node, reason=reason)
                    message = (
                        f"node {node}, round {number}: {reason}, {limit:g} s after the last exchange; "
                        "raise cluster.round_deadline_s if it is only slow"
                    )
                    raise NodeLateError(message)
                case Abort(reason):
                    self._record("abort", round=number, reason=reason)
                    message = f"round {number} cannot be finished: {reason}"
                    raise RunError(message)
                case Diverged(groups):
                    self._record("diverged", round=number, groups=groups)
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

    def _finish(self, attempt: _Attempt, transport_before: int | None) -> None:
        """Evaluate if it is time, and record the round."""
        seconds = self._runtime.now - attempt.began
        config = self._config.evaluation
        number = attempt.number
        last = number == self._config.rounds - 1
        metrics: dict[str, float] | None = None
        evaluate_seconds = 0.0
        if last or (config.every_rounds and (number + 1) % config.every_rounds == 0):
            began = time.monotonic()
            metrics = self._metrics = self._runtime.evaluate(self._members[0], self._committed, config.max_batches)
            evaluate_seconds = time.monotonic() - began
        reports = [attempt.reports[node] for node in self._members]
        losses = [report.loss for report in reports if report.loss is not None and report.loss == report.loss]
        train_seconds = max(report.train_seconds for report in reports)
        transport = self._runtime.transport_nbytes
        contributors = attempt.closed[max(attempt.closed)] if attempt.closed else ()
        self._record("commit", round=number, closed=attempt.closed, committed=self._members)
        self._observer.on_round(
            RoundRecord(
                round=number,
                loss=sum(losses) / len(losses) if losses else None,
                num_samples=sum(report.num_samples for report in reports),
                nodes=len(self._members),
                contributing=len(contributors),
                payload_bytes=attempt.rendezvous.payload_nbytes,
                transport_bytes=None if transport is None else transport - (transport_before or 0),
                seconds=seconds,
                train_seconds=train_seconds,
                exchange_seconds=max(0.0, seconds - train_seconds),
                evaluate_seconds=evaluate_seconds,
                metrics=metrics,
            )
        )

    # --- the record --------------------------------------------------------------------------------------------------

    def _record(self, what: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        self._observer.on_event({"event": what, "at_s": round(self._runtime.now - self._zero, 6), **facts})

    def summary(self, status: Status) -> Summary:
        """Where the run stands."""
        rounds = self._committed + 1
        return Summary(
            status=status,
            run_id=self._run_id,
            run_dir=self._run_dir,
            algorithm=self._config.algorithm.name,
            rounds=rounds,
            metrics=self._metrics,
            bytes={
                "payload": self._ledger.payload,
                "recovery": self._ledger["recovery"],
                "per_round": self._ledger.payload / rounds if rounds else 0,
                "transport": self._runtime.transport_nbytes,
            },
            nodes={"started": len(self._facts), "joined": 0, "lost": self._lost},
            digest=self._digest,
            seconds=time.monotonic() - self._began,
            virtual_seconds=self._runtime.now if self._runtime.virtual else None,
            baselines=dict(self._runtime.baselines) if self._facts else {},
        )
