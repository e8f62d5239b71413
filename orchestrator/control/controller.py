"""The controller: starts the nodes, has all rounds done, fetches the model.

It alone decides what is committed. It holds no tensor: the rendezvous and the mailroom say what is to be done, the
runtime does it. A checkpoint's tensors pass through the controller, on the way from the storage to the nodes.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from starling.orchestrator.control.asynchronous import Asynchronous
from starling.orchestrator.control.context import RunContext
from starling.orchestrator.control.run_state import RunState
from starling.orchestrator.control.synchronous import Synchronous

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.actors.data import Place
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.schedule import Checkpointing
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.control.loop import Loop
    from starling.orchestrator.control.restore import Restoration
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
        restoration: Restoration | None = None,
        script: Callable[[NodeId, int], Place | None] | None = None,
    ) -> None:
        """``may_commit`` raises if another controller decides by now; it is asked before each commit.

        The run goes on from a ``restoration``, if there is one. ``script`` says what nodes draw in a replay.
        """
        self._run = RunContext(config, runtime, observer, run_id, run_dir, may_commit)
        self._state = RunState(self._run, checkpoints, script)
        self._restoration = restoration
        self._running: Loop | None = None

    def run(self) -> Summary:
        """Start the nodes, do all rounds, fetch the model.

        Raises:
            StarlingError: the run failed; ``summary`` says how far it came.
        """
        state, runtime = self._state, self._run.runtime
        if self._restoration is not None:
            self._restoration.prepare(runtime)
        nodes = state.start()
        loop = self._loop()
        if self._restoration is None:
            self._run.record("start", nodes=sorted(state.roster.facts), parts=runtime.num_parts)
        else:
            self._restoration.restore(state, loop)
        self._run.observer.on_start(state.started(nodes, is_resumed=self._restoration is not None))
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
        if state.saving.lacks_last():
            loop.save()  # so that the run can be made longer
        model = state.evaluation.fetch(loop.result, alike=self._run.config.algorithm.replicated)
        state.digest = model.digest
        self._run.observer.on_model(model)
        if self._run.config.evaluation.average is not None:
            averaged = state.evaluation.fetch(loop.result, alike=self._run.config.algorithm.replicated, averaged=True)
            state.average_digest = averaged.digest
            self._run.observer.on_average(averaged)
        state.saving.finish()
        return self.summary("finished")

    def save(self) -> bool:
        """After an interruption, save the last commit in bounded time. Return whether it is saved. Never raises."""
        loop, state = self._running, self._state
        if loop is None or state.committed < 0 or state.saving.counts is None:
            return False
        try:
            state.saving.hasten()
            if not state.saving.is_last_saved():
                loop.stand_still()
                loop.save()
                state.saving.finish()
        except Exception as error:  # noqa: BLE001 - what is saved already is worth more than why this failed
            _LOG.warning("round %d could not be saved: %s", state.committed, error)
        return state.saving.is_last_saved()

    def _loop(self) -> Loop:
        return (Synchronous if self._run.config.algorithm.synchronous else Asynchronous)(self._state)

    def summary(self, status: Status) -> Summary:
        """Sum up the run as far as it has come."""
        return self._state.summary(status)
