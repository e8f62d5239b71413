"""Where a run stands: what both loops over rounds, the synchronous and the asynchronous one, know and record."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starling.actors.replica.catch_up import Transcript
from starling.actors.wire.tickets import Failed, mean_loss
from starling.algorithms.api import SERVER
from starling.orchestrator.checkpoints.schedule import MAIL, complete
from starling.orchestrator.control.samples import Samples
from starling.orchestrator.errors import NodeFailedError, NodeGoneError
from starling.orchestrator.protocol.byte_ledger import Ledger
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.records import round_log
from starling.orchestrator.records.observers import RoundRecord, Summary
from starling.orchestrator.records.round_log import Members, Sealed
from starling.orchestrator.runtimes.events import Log, Seen, Used

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from starling.actors.host.host import Returned
    from starling.algorithms.api import NodeId, View
    from starling.orchestrator.checkpoints.schedule import Checkpointing
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.members import Members as MembersOfRun
    from starling.orchestrator.control.messaging import Mail
    from starling.orchestrator.records.observers import Observer, Status
    from starling.orchestrator.runtimes.events import FinalModel, Happening, NodeFacts
    from starling.orchestrator.runtimes.interface import Runtime

_T = TypeVar("_T")


class Progress:
    """One run: its nodes, its record, its result."""

    def __init__(self, config: Config, runtime: Runtime, observer: Observer, *, run_id: str, run_dir: str) -> None:
        self.config = config
        self.runtime = runtime
        self.observer = observer
        self.ledger = Ledger()
        self.samples = Samples(config.data.sampler, self.record)
        self.facts: dict[NodeId, NodeFacts] = {}
        self.committed = -1
        """The last committed round."""
        self.members: tuple[NodeId, ...] = ()
        """Who committed it."""
        self.down: set[NodeId] = set()
        """Lost, and not there again."""
        self._records: list[bytes] = []
        """Of the sealed rounds since the last snapshot, or all."""
        self._base: Path | None = None
        """The file of the model then, as safetensors."""
        self.num_started = 0
        self.num_lost = 0
        self.num_joined = 0
        self.num_drained = 0
        """Left as they were told to."""
        self.num_healed = 0
        """Commits at which replicas differed, and some were given what most had."""
        self.has_residuals = False
        """Nodes have left out some of what they sent, and send it later."""
        self.lost_residuals: list[float] = []
        """The norm of what each node that was lost had still to send."""
        self._told_residuals = 0
        """Of those, how many are in a round's record."""
        self.may_commit: Callable[[], None] = lambda: None
        """Raises if this controller is no longer the one that decides."""
        self.zero = 0.0
        """The runtime's clock when all nodes were up; times in the record count from it."""
        self._nodes: tuple[NodeId, ...] = ()
        self._counted = (0, 0, 0)
        """Of what ``_nodes`` was made."""
        self._run_id = run_id
        self._run_dir = run_dir
        self._metrics: dict[str, float] = {}
        self.digest: str | None = None
        self.checkpoints: Checkpointing | None = None
        self._began = time.monotonic()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Those that train and are alive, sorted."""
        counts = len(self.facts), len(self.down), self.num_lost + self.num_joined + self.num_drained
        if counts != self._counted:
            self._counted = counts
            self._nodes = tuple(sorted(node for node in self.facts if node != SERVER and node not in self.down))
        return self._nodes

    def name(self, node: NodeId) -> str:
        """A node, for people."""
        return f"{'the server' if node == SERVER else f'node {node}'} ({self.facts[node].place})"

    def lose(self, node: NodeId, reason: str, number: int) -> str:
        """``node`` is gone, in round ``number``; return what to say of it."""
        self.down.add(node)
        self.num_lost += 1
        self.record("lost", round=number, node=node, reason=reason)
        return f"{self.name(node)} was lost in round {number}: {reason}"

    def lose_residual(self, number: int, node: NodeId, norm: float) -> None:
        """What ``node`` had still to send is gone with it, in round ``number``."""
        self.lost_residuals.append(norm)
        self.record("residual_lost", round=number, node=node, norm=norm)

    def leave(self, node: NodeId, number: int, nbytes: int) -> None:
        """``node`` has left as it was told to, in round ``number``; ``nbytes`` of its state are kept."""
        self.down.add(node)
        self.num_drained += 1
        self.record("left", round=number, node=node, kept_nbytes=nbytes)

    def back(self, facts: NodeFacts) -> None:
        """A node is there again, or for the first time."""
        self.facts[facts.node] = facts
        self.down.discard(facts.node)
        self.num_joined += 1
        self.record("up", node=facts.node, place=facts.place)

    def note(self, happening: Happening) -> bool:
        """Take what concerns the record alone; say whether it was that.

        Raises:
            NodeFailedError: a program or a task raised.
        """
        match happening:
            case Log(node, lines):
                self.observer.on_log(node, lines)
            case Used(node, values):
                self.observer.on_usage(node, values)
            case Seen(node, values):
                self.record("seen", node=node, values=values)
            case Reached(_, Failed(message, traceback)):
                raise NodeFailedError(message, traceback)
            case _:
                return False
        return True

    def record(self, what: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        """Add to the run's log of events."""
        self.observer.on_event({"event": what, "at_s": round(self.runtime.now - self.zero, 6), **facts})

    def round_done(
        self,
        reports: Sequence[Returned],
        committed: Mapping[NodeId, int],
        *,
        alike: bool,
        contributing: int,
        in_view: int,
        late: int,
        payload_bytes: int,
        transport_bytes: int | None,
        seconds: float,
    ) -> None:
        """Record the round; if it is time, evaluate the mean model of the nodes in ``committed``, each at its round.

        If they are ``alike``, that of one.
        """
        config, number = self.config.evaluation, self.committed
        metrics: dict[str, float] | None = None
        node_metrics: dict[NodeId, dict[str, float]] | None = None
        evaluate_seconds = 0.0
        last = number == self.config.rounds - 1
        if last or (config.every_rounds and (number + 1) % config.every_rounds == 0):
            began = time.monotonic()
            self.runtime.states.settle(committed)
            metrics = self._metrics = self._ask(
                tuple(committed), lambda nodes: self.runtime.models.evaluate(nodes, config.max_batches), alike=alike
            )
            if config.per_node and not alike:
                node_metrics = self._of_each(tuple(committed))
            evaluate_seconds = time.monotonic() - began
        residuals = self.lost_residuals[self._told_residuals :]
        self._told_residuals += len(residuals)
        losses = [(report.loss, report.num_samples) for report in reports if report.loss is not None]
        train_seconds = max((report.train_seconds for report in reports), default=0.0)
        self.observer.on_round(
            RoundRecord(
                round=number,
                loss=mean_loss([(loss, count) for loss, count in losses if not math.isnan(loss)]),
                num_samples=sum(report.num_samples for report in reports),
                nodes=len(self.members),
                contributing=contributing,
                alive=len(self.nodes),
                in_view=in_view,
                late=late,
                payload_bytes=payload_bytes,
                transport_bytes=transport_bytes,
                seconds=seconds,
                train_seconds=train_seconds,
                exchange_seconds=max(0.0, seconds - train_seconds),
                evaluate_seconds=evaluate_seconds,
                metrics=metrics,
                node_metrics=node_metrics,
                samples=self._samples(),
                residuals_lost=len(residuals) if self.has_residuals else None,
                residual_norm_lost=math.hypot(*residuals) if self.has_residuals else None,
            )
        )

    def _samples(self) -> dict[str, int]:
        away = [facts for node, facts in self.facts.items() if node in self.down and node != SERVER]
        return self.samples.counts(self.nodes, away)

    def _of_each(self, nodes: Sequence[NodeId]) -> dict[NodeId, dict[str, float]]:
        """The metrics of each node's own model; who dies meanwhile is left out."""
        found: dict[NodeId, dict[str, float]] = {}
        for node in nodes:
            with contextlib.suppress(NodeGoneError):
                found[node] = self.runtime.models.evaluate((node,), self.config.evaluation.max_batches)
        return found

    def seal(self, number: int, view: View, record: bytes | None, nodes: Sequence[NodeId]) -> None:
        """Keep the record of round ``number``, which is committed; if it is time, also the model, that of ``nodes``."""
        if record is None:
            return
        self.observer.on_sealed(Members(view.number, view.members))
        self.observer.on_sealed(Sealed(number, record))
        self._records.append(record)
        every = self.config.replay.snapshot_every
        if every and (number + 1) % every == 0:
            self.runtime.states.settle(dict.fromkeys(nodes, number))
            file = self.observer.on_snapshot(number, self.fetch(nodes, alike=True))
            if file is not None:
                self._base, self._records = file, []

    def transcript(self) -> tuple[Transcript, bytes | None] | None:
        """How a node catches up by itself, where the algorithm offers it: rounds, and the model before them."""
        if self._base is None and not self._records:
            return None
        try:
            base = None if self._base is None else self._base.read_bytes()
        except OSError:
            return None  # gone: a donor has the model too
        return Transcript(self.committed + 1 - len(self._records), tuple(self._records)), base

    def fetch(self, nodes: Sequence[NodeId], *, alike: bool) -> FinalModel:
        """The model that the run ends with: the mean of ``nodes``' or, if they are ``alike``, that of one."""
        return self._ask(nodes, self.runtime.models.fetch, alike=alike)

    def _ask(self, nodes: Sequence[NodeId], what: Callable[[Sequence[NodeId]], _T], *, alike: bool) -> _T:
        """Ask a model of ``nodes``; who dies meanwhile is left out."""
        there = list(nodes)
        while True:
            asked = there[:1] if alike else there
            try:
                answer = what(asked)
            except NodeGoneError as error:
                there.remove(error.node)
                if not there:
                    raise
            else:
                layout = self.runtime.layout
                self.ledger.book("evaluation", (len(asked) - 1) * (layout.nbytes + layout.buffer_nbytes))
                return answer

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(
        self,
        loop: Mapping[str, Any],
        nodes: Sequence[NodeId],
        shared: NodeId | None,
        mail: Mail,
        members: MembersOfRun,
        begun: Collection[NodeId] = (),
    ) -> None:
        """Have the run saved as it is between two rounds: ``nodes``, what the ``loop`` knows, and what is in boxes.

        New nodes that have ``begun`` have more than the initial state.
        """
        assert self.checkpoints is not None
        began = time.monotonic()
        envelopes = mail.room.waiting()
        letters = self.runtime.messages.export(envelopes) if envelopes else iter(())
        needed = {SERVER}.intersection(nodes) if shared is None else {shared}
        states = complete(self.runtime.states.snapshot(nodes, shared, members.kept_alone(begun)), needed)
        saved = itertools.chain(states, ((MAIL, export) for export in letters))
        self.record("saving", round=self.committed, nodes=sorted(nodes))
        mine: dict[str, Any] = {"progress": self._to_json(), "loop": loop, "mail": mail.room.to_json()}
        if self.runtime.standing is not None:
            mine |= {"processes": self.runtime.standing.to_json(), "members": members.to_json()}
        self.checkpoints.save(self.committed, {**self.observer.on_saving(), **mine}, saved)
        self.checkpoints.waited(time.monotonic() - began)
        self.note_checkpoints()

    def note_checkpoints(self) -> None:
        """Put what has become of checkpoints into the record."""
        if self.checkpoints is not None:
            outcomes, self.checkpoints.outcomes = self.checkpoints.outcomes, []
            for outcome in outcomes:
                self.record("checkpoint", **outcome)

    def _to_json(self) -> dict[str, Any]:
        return {
            "committed": self.committed,
            "members": self.members,
            "elapsed_s": self.runtime.now - self.zero,
            "transport_nbytes": self.runtime.transport_nbytes,
            "seconds": time.monotonic() - self._began,
            "booked": self.ledger.to_json(),
            "started": self.num_started,
            "lost": self.num_lost,
            "joined": self.num_joined,
            "drained": self.num_drained,
            "healed": self.num_healed,
            "residuals": list(self.lost_residuals) if self.has_residuals else None,
            "metrics": self._metrics,
            "samples": self.samples.to_json(),
            "data": self.runtime.fingerprint,
        }

    def stand(self, facts: Mapping[NodeId, NodeFacts], down: Iterable[NodeId]) -> None:
        """These nodes are known, and some of them are not there."""
        self.facts, self.down = dict(facts), set(down)
        self._counted = (0, 0, 0)

    def revive(self, state: Mapping[str, Any], *, same_processes: bool = False) -> None:
        """Go on from a checkpoint, with other processes, or with the same at the same moment."""
        self.committed, self.members = state["committed"], tuple(state["members"])
        self.ledger.revive(state["booked"])
        self.num_started, self.num_lost = state["started"], state["lost"]
        self.num_joined, self.num_drained, self.num_healed = state["joined"], state["drained"], state["healed"]
        self.has_residuals = state["residuals"] is not None
        self.lost_residuals = state["residuals"] or []
        self._told_residuals = len(self.lost_residuals)
        self._metrics = state["metrics"]
        self.samples.revive(state["samples"], same_processes=same_processes)
        self._began = time.monotonic() - state["seconds"]
        self._base, self._records = round_log.latest(Path(self._run_dir), self._run_id)

    def set_forward(self, state: Mapping[str, Any]) -> None:
        """Let the clock show the time that the run had taken when it was saved."""
        elapsed = state["elapsed_s"]
        self.runtime.set_forward(elapsed, state["transport_nbytes"])
        self.zero = self.runtime.now - elapsed

    def _replicas(self) -> str | None:
        if not self.config.algorithm.replicated or self.committed < 0:
            return None
        return f"healed {self.num_healed} times, identical" if self.num_healed else "identical"

    def summary(self, status: Status) -> Summary:
        """Where the run stands."""
        rounds = self.committed + 1
        return Summary(
            status=status,
            run_id=self._run_id,
            run_dir=self._run_dir,
            algorithm=self.config.algorithm.name,
            rounds=rounds,
            metrics=self._metrics,
            bytes={
                "payload": self.ledger.payload,
                "recovery": self.ledger["recovery"],
                "per_round": self.ledger.payload / rounds if rounds else 0,
                "transport": self.runtime.transport_nbytes,
            },
            nodes={
                "started": self.num_started,
                "joined": self.num_joined,
                "lost": self.num_lost,
                "drained": self.num_drained,
            },
            samples=self._samples(),
            lost={"residuals": len(self.lost_residuals), "residual_norm": math.hypot(*self.lost_residuals)},
            replicas=self._replicas(),
            digest=self.digest,
            seconds=time.monotonic() - self._began,
            virtual_seconds=self.runtime.now if self.runtime.virtual else None,
            baselines=dict(self.runtime.baselines) if self.facts else {},
            checkpoints=None if self.checkpoints is None else self.checkpoints.counts,
        )
