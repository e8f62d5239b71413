"""Schedules checkpoints: decides when one is due, and hands its contents to the writer.

A checkpoint holds a run between two rounds: the controller's plain data, and all that each node has committed. It is
written behind the run's back, and storage that fails or is slow costs checkpoints, never rounds.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.checkpoints.writer import PAUSES_S, CheckpointWriter
from starling.orchestrator.errors import NodeGoneError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.config.sections import CheckpointConfig
    from starling.orchestrator.runtimes.interface import Runtime

_LOG = logging.getLogger("starling")

_COST_FRACTION = 0.01
"""Share of a run's time that ``every_rounds: auto`` lets its checkpoints take."""

_OF_ALL = 4.0
"""Ratio of a checkpoint's total CPU time to the writer's: nodes and Ray take three times as much to hand over state."""

_END_TIMEOUT_S = 60.0
"""Limit of the wait for the last checkpoint at a run's end."""

_VIRTUAL_PAUSES_S = (0.5,)
"""Pause before a simulation repeats a refused write: it stands still meanwhile."""

MAIL: NodeId = -2
"""Key of the messages that no node has received yet, among the nodes of a checkpoint."""


def checkpointing(
    config: Config, run_dir: Path, run_id: str, runtime: Runtime, store: CheckpointStore | None = None
) -> Checkpointing | None:
    """Make the checkpoints of a run, in the ``store`` of a resumed one; return None if it has none."""
    is_auto = config.checkpoint.every_rounds == "auto" and config.checkpoint.every_s is None
    # To be saved, nodes with rounds of their own have to stand still: by the machine's clock, which a simulation must
    # not depend on.
    if not config.checkpoint.is_on or (runtime.virtual and not config.algorithm.synchronous and is_auto):
        return None
    store = store or CheckpointStore(config.checkpoint.uri, run_dir, run_id, keep=config.checkpoint.keep)
    return Checkpointing(config.checkpoint, store, runtime)


class Cadence:
    """Says when a checkpoint is due.

    Args:
        config: by rounds, by seconds, or as often as they cost little.
        now: the runtime's clock.
    """

    def __init__(self, config: CheckpointConfig, now: float) -> None:
        self._config = config
        self._last = now
        self._free_at = 0.0

    def is_due(self, number: int, now: float) -> bool:
        """Whether round ``number``, just committed, is to be saved; ``now`` is the runtime's clock."""
        every_rounds, every_s = self._config.every_rounds, self._config.every_s
        if every_s is not None:
            return now - self._last >= every_s
        if every_rounds == "auto":
            return time.monotonic() >= self._free_at
        return every_rounds > 0 and (number + 1) % every_rounds == 0

    def began(self, now: float) -> None:
        """Note that a checkpoint is being written."""
        self._last = now

    def took(self, seconds: float) -> None:
        """Note what the last checkpoint cost."""
        self._free_at = time.monotonic() + seconds * (1 / _COST_FRACTION - 1)


class Checkpointing:
    """The checkpoints of one run.

    Args:
        config: when, and how many are kept.
        store: where.
        runtime: asked for the nodes' state.
    """

    def __init__(self, config: CheckpointConfig, store: CheckpointStore, runtime: Runtime) -> None:
        self._runtime = runtime
        self._cadence = Cadence(config, 0.0)
        pauses_s = _VIRTUAL_PAUSES_S if runtime.virtual else PAUSES_S
        self._writer = CheckpointWriter(store, _warn, pauses_s=pauses_s)
        self.outcomes: list[Mapping[str, Any]] = []
        """Outcomes of checkpoints that were written or given up, for the run's record."""
        self.last = -1
        """Round of the last written checkpoint."""
        self._submitted = -1
        self._waited = 0.0
        self._is_owed = False

    def is_due(self, number: int) -> bool:
        """Whether round ``number``, just committed, is to be saved now; not while another is being written."""
        self._take()
        self._is_owed |= self._cadence.is_due(number, self._runtime.now)
        if self._is_owed and self._writer.busy and self._runtime.virtual:
            self.join()  # a simulation does not depend on how fast this machine writes
        return self._is_owed and not self._writer.busy

    def save(self, number: int, controller: Mapping[str, Any], nodes: Iterator[tuple[NodeId, StateExport]]) -> None:
        """Write the state after round ``number``, in the background."""
        self._cadence.began(self._runtime.now)
        self._submitted, self._is_owed, self._waited = number, False, 0.0
        self._writer.submit(number, controller, nodes)

    def go_on(self) -> None:
        """Count from now, as if the checkpoint of a resumed run had just been made."""
        self._cadence.began(self._runtime.now)

    def waited(self, seconds: float) -> None:
        """Add seconds for which the run stood still to be saved."""
        self._waited += seconds

    def is_saved(self, number: int) -> bool:
        """Whether round ``number`` has been saved, or is being saved."""
        self._take()
        return number in (self.last, self._submitted if self._writer.busy else -1)

    def join(self) -> bool:
        """Wait, in bounded time, until all is written; return whether it is."""
        done = self._writer.join(_END_TIMEOUT_S)
        self._take()
        return done

    def hasten(self) -> None:
        """Repeat no refused write from now on: somebody waits for the end."""
        self._writer.hasten()

    def close(self) -> None:
        """Write what is still to be written, in bounded time. Idempotent; never raises."""
        self._writer.close(_END_TIMEOUT_S)
        self._take()

    @property
    def counts(self) -> dict[str, int]:
        """Counts for the summary: checkpoints written and given up, retries, and the last round."""
        writer = self._writer
        return {
            "written": writer.num_written,
            "failed": writer.num_failed,
            "retries": writer.num_retries,
            "last_round": self.last,
        }

    def _take(self) -> None:
        for outcome in self._writer.take():
            self.outcomes.append(outcome)
            self._is_owed |= outcome["is_gone"]
            if outcome["error"] is None:
                self.last = max(self.last, outcome["round"])
                # What is written beside training takes processor time from it, at most; waiting for storage does not.
                self._cadence.took(_OF_ALL * outcome["cpu_seconds"] + self._waited)


def complete(
    nodes: Iterator[tuple[NodeId, StateExport]], needed: Collection[NodeId]
) -> Iterator[tuple[NodeId, StateExport]]:
    """Yield the states of a snapshot, and check that none that is needed is missing.

    Raises:
        NodeGoneError: one of them died before it was asked.
    """
    there: set[NodeId] = set()
    for node, export in nodes:
        there.add(node)
        yield node, export
    lacking = min(set(needed) - there, default=None if there else 0)
    if lacking is not None:
        who = "the server" if lacking == SERVER else f"node {lacking}"
        raise NodeGoneError(lacking, f"{who} is gone, which alone was to give what a run cannot go on without")


def _warn(what: str, facts: Mapping[str, Any]) -> None:
    """Log what the storage refuses, the first time at once; called in the writer's thread."""
    if what == "checkpoint_retry" and facts["is_first"]:
        _LOG.warning("%s; tried again, and the run goes on", facts["error"])
    elif what == "checkpoint_written" and facts["untidy"]:
        _LOG.warning("%s", facts["untidy"])
