"""Records of committed rounds from which a node that has missed them catches up by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starling.actors.replica.catch_up import Transcript
from starling.orchestrator.records import round_log
from starling.orchestrator.records.round_log import MembersEntry, Sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.algorithms.api import NodeId, View
    from starling.orchestrator.control.context import RunContext
    from starling.orchestrator.control.evaluation import Evaluation


class SealedRounds:
    """Keeps the sealed records of rounds since the last snapshot of the model."""

    def __init__(self, run: RunContext, evaluation: Evaluation) -> None:
        self._run = run
        self._evaluation = evaluation
        self._records: list[bytes] = []
        """The rounds since the last snapshot, or all."""
        self._base: Path | None = None
        """The file of that snapshot, as safetensors."""

    def seal(self, number: int, view: View, record: bytes | None, nodes: Sequence[NodeId]) -> None:
        """Keep the record of round ``number``, which is committed; if a snapshot is due, the model of ``nodes`` too."""
        if record is None:
            return
        observer = self._run.observer
        observer.on_sealed(MembersEntry(view.number, view.members))
        observer.on_sealed(Sealed(number, record))
        self._records.append(record)
        every = self._run.config.replay.snapshot_every
        if every and (number + 1) % every == 0:
            self._run.runtime.states.settle(dict.fromkeys(nodes, number))
            file = observer.on_snapshot(number, self._evaluation.fetch(nodes, alike=True))
            if file is not None:
                self._base, self._records = file, []

    def transcript(self, committed: int) -> tuple[Transcript, bytes | None] | None:
        """Return the rounds up to ``committed``, and the model before them; None where a donor's state is needed.

        That is so if the algorithm seals no rounds, or there is a running average, which no record has.
        """
        if (self._base is None and not self._records) or self._run.config.evaluation.average is not None:
            return None
        try:
            base = None if self._base is None else self._base.read_bytes()
        except OSError:
            return None  # gone: a donor has the model too
        return Transcript(committed + 1 - len(self._records), tuple(self._records)), base

    def restore(self) -> None:
        """Read the records of a resumed run from its directory."""
        self._base, self._records = round_log.latest(Path(self._run.run_dir), self._run.run_id)
