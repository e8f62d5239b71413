"""The controller: starts the nodes, has all rounds done, fetches the model.

It alone decides what is committed. It holds no tensor: the rendezvous and the mailroom say what is to be done, the
runtime does it. What a checkpoint has of tensors passes through it, on the way from the storage to the nodes.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from starling.orchestrator.control.asynchronous import Asynchronous
from starling.orchestrator.control.run_state import Progress
from starling.orchestrator.control.synchronous import Synchronous
from starling.orchestrator.records.observers import Started

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.orchestrator.checkpoints.schedule import Checkpointing
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.restore import Revival
    from starling.orchestrator.records.observers import Observer, Status, Summary
    from starling.orchestrator.runtimes.interface import Runtime

_LOG = logging.getLogger("starling")


class Controller:
    """Drives one run on one runtime to its end."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        observer: Observer,
        *,
        run_id: str,
        run_dir: str,
        may_commit: Callable[[], None] = lambda: None,
        checkpoints: Checkpointing | None = None,
        revival: Revival | None = None,
    ) -> None:
        """``may_commit`` raises if another controller decides by now; it is asked before each commit.

        The run goes on from a ``revival``, if there is one.
        """
        self._progress = Progress(config, runtime, observer, run_id=run_id, run_dir=run_dir)
        self._progress.may_commit = may_commit
        self._progress.checkpoints = checkpoints
        self._revival = revival
        self._running: Synchronous | Asynchronous | None = None
        self._run_id = run_id
        self._run_dir = run_dir

    def run(self) -> Summary:
        """Start the nodes, do all rounds, fetch the model.

        Raises:
            StarlingError: the run failed; ``summary`` says how far it came.
        """
        progress = self._progress
        config, runtime = progress.config, progress.runtime
        if self._revival is not None:
            self._revival.prepare(runtime)
        facts = runtime.start()
        progress.facts = {one.node: one for one in facts}
        progress.samples.start(runtime.num_parts, runtime.part_sizes)
        progress.num_started = len(facts)
        progress.zero = runtime.now
        loop = self._loop()
        if self._revival is None:
            progress.record("start", nodes=sorted(progress.facts), parts=runtime.num_parts)
        else:
            self._revival.revive(progress, loop)
        started = Started(
            config=config,
            run_id=self._run_id,
            run_dir=self._run_dir,
            nodes=facts,
            layout=runtime.layout,
            baselines=runtime.baselines,
            virtual=runtime.virtual,
            resumed_after=None if self._revival is None else progress.committed,
        )
        progress.observer.on_start(started)
        self._running = loop
        # Hundreds of thousands of objects are there to stay; each full collection would walk them all again.
        # What a round makes is freed by its reference counts; a thousand nodes of one process make enough of it to
        # start a collection many times a round.
        threshold = gc.get_threshold()
        gc.freeze()
        gc.set_threshold(100_000, *threshold[1:])
        try:
            loop.run()
        except Exception:
            runtime.check()
            raise
        finally:
            gc.set_threshold(*threshold)
            gc.unfreeze()
        self._running = None
        self._save_end(loop)
        model = progress.fetch(loop.result, alike=config.algorithm.replicated)
        progress.digest = model.digest
        progress.observer.on_model(model)
        if progress.checkpoints is not None:
            progress.checkpoints.join()
            progress.note_checkpoints()
        return self.summary("finished")

    def _save_end(self, loop: Synchronous | Asynchronous) -> None:
        """Save what the run ends with, so that it can be made longer."""
        checkpoints, last = self._progress.checkpoints, self._progress.committed
        if checkpoints is not None and checkpoints.join() and not checkpoints.is_saved(last):
            loop.save()

    def save(self) -> bool:
        """After an interruption: have the last commit saved, in bounded time; say whether it is. Never raises."""
        checkpoints, loop, progress = self._progress.checkpoints, self._running, self._progress
        if checkpoints is None or loop is None or progress.committed < 0:
            return False
        try:
            checkpoints.hasten()
            checkpoints.join()
            if not checkpoints.is_saved(progress.committed):
                loop.stand_still()
                loop.save()
                checkpoints.join()
                progress.note_checkpoints()
        except Exception as error:  # noqa: BLE001 - what is saved already is worth more than why this failed
            _LOG.warning("round %d could not be saved: %s", progress.committed, error)
        return checkpoints.is_saved(progress.committed)

    def _loop(self) -> Synchronous | Asynchronous:
        progress = self._progress
        return Synchronous(progress) if progress.config.algorithm.synchronous else Asynchronous(progress)

    def summary(self, status: Status) -> Summary:
        """Where the run stands."""
        return self._progress.summary(status)
