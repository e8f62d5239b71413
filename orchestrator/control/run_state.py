"""State and records of a run, shared by the synchronous and the asynchronous loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.orchestrator.control.evaluation import Evaluation
from starling.orchestrator.control.roster import Residuals, Roster
from starling.orchestrator.control.round_records import RoundRecorder
from starling.orchestrator.control.samples import SampleProgress
from starling.orchestrator.control.saving import Saving
from starling.orchestrator.control.sealed_rounds import SealedRounds
from starling.orchestrator.protocol.byte_ledger import Ledger
from starling.orchestrator.records.observers import Started, Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.actors.data import Place
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.schedule import Checkpointing
    from starling.orchestrator.control.context import RunContext
    from starling.orchestrator.records.observers import Status
    from starling.orchestrator.runtimes.events import NodeFacts


class RunState:
    """Composes the parts of a run, and knows its last commit.

    Args:
        run: what stays as it is.
        checkpoints: None: the run is not saved.
        script: says what a node is to draw from a round on, in a replay.
    """

    def __init__(
        self,
        run: RunContext,
        checkpoints: Checkpointing | None = None,
        script: Callable[[NodeId, int], Place | None] | None = None,
    ) -> None:
        self.run = run
        self.committed = -1
        """The last committed round."""
        self.members: tuple[NodeId, ...] = ()
        """Nodes that committed the last round."""
        self.digest: str | None = None
        """The final model's."""
        self.average_digest: str | None = None
        """Digest of the running average, where there is one."""
        self.num_healed = 0
        """Commits at which replicas differed, and some were given what most had."""
        self.ledger = Ledger()
        self.roster = Roster(run)
        self.residuals = Residuals(run)
        self.samples = SampleProgress(run.config.data.sampler, run.record, script)
        self.evaluation = Evaluation(run, self.ledger)
        self.sealed = SealedRounds(run, self.evaluation)
        self.recorder = RoundRecorder(self)
        self.saving = Saving(self, checkpoints)

    def start(self) -> Sequence[NodeFacts]:
        """Start the nodes, and return what they say of themselves."""
        runtime = self.run.runtime
        facts = runtime.start()
        self.roster.start(facts)
        self.samples.start(runtime.num_parts, runtime.part_sizes)
        self.run.clock.start()
        return facts

    def started(self, nodes: Sequence[NodeFacts], *, is_resumed: bool) -> Started:
        """Describe the run to observers once ``nodes`` are up."""
        run, runtime = self.run, self.run.runtime
        return Started(
            config=run.config,
            run_id=run.run_id,
            run_dir=run.run_dir,
            nodes=nodes,
            layout=runtime.layout,
            baselines=runtime.baselines,
            virtual=runtime.virtual,
            resumed_after=self.committed if is_resumed else None,
        )

    @property
    def sample_counts(self) -> dict[str, int]:
        """Samples that were drawn, committed, drawn again and lost so far."""
        return self.samples.counts(self.roster.nodes, self.roster.away)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, for a checkpoint."""
        runtime, roster = self.run.runtime, self.roster
        return {
            "committed": self.committed,
            "members": self.members,
            **self.run.clock.to_json(),
            "transport_nbytes": runtime.transport_nbytes,
            "booked": self.ledger.to_json(),
            **roster.counts,
            "healed": self.num_healed,
            "residuals": self.residuals.to_json(),
            "metrics": self.evaluation.metrics,
            "samples": self.samples.to_json(),
            "data": runtime.fingerprint,
        }

    def restore(self, state: Mapping[str, Any], *, same_processes: bool = False) -> None:
        """Go on from a checkpoint, with other processes, or with the same at the same moment."""
        self.committed, self.members = state["committed"], tuple(state["members"])
        self.num_healed = state["healed"]
        self.ledger.restore(state["booked"])
        self.roster.restore(state)
        self.residuals.restore(state["residuals"])
        self.evaluation.metrics = state["metrics"]
        self.samples.restore(state["samples"], same_processes=same_processes)
        self.sealed.restore()

    def summary(self, status: Status) -> Summary:
        """Sum up the run as far as it has come."""
        run, runtime, rounds = self.run, self.run.runtime, self.committed + 1
        return Summary(
            status=status,
            run_id=run.run_id,
            run_dir=run.run_dir,
            algorithm=run.config.algorithm.name,
            rounds=rounds,
            metrics=self.evaluation.metrics,
            bytes={
                "payload": self.ledger.payload,
                "recovery": self.ledger["recovery"],
                "per_round": self.ledger.payload / rounds if rounds else 0,
                "transport": runtime.transport_nbytes,
            },
            nodes=self.roster.counts,
            samples=self.sample_counts,
            lost=self.residuals.totals,
            replicas=self._replicas(),
            digest=self.digest,
            average_digest=self.average_digest,
            seconds=run.clock.wall_s,
            virtual_seconds=runtime.now if runtime.virtual else None,
            baselines=dict(runtime.baselines) if self.roster.facts else {},
            checkpoints=self.saving.counts,
        )

    def _replicas(self) -> str | None:
        if not self.run.config.algorithm.replicated or self.committed < 0:
            return None
        return f"healed {self.num_healed} times, identical" if self.num_healed else "identical"
