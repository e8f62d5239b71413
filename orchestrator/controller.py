"""The controller: starts the nodes, has all rounds done, fetches the model.

It alone decides what is committed. It holds no tensor: the rendezvous and the mailroom say what is to be done, the
runtime does it.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from orchestrator.asynchronous import Asynchronous
from orchestrator.progress import Progress
from orchestrator.records import Started
from orchestrator.synchronous import Synchronous

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.config import Config
    from orchestrator.records import Observer, Status, Summary
    from orchestrator.runtime import Runtime


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
    ) -> None:
        """``may_commit`` raises if another controller decides by now; it is asked before each commit."""
        self._progress = Progress(config, runtime, observer, run_id=run_id, run_dir=run_dir)
        self._progress.may_commit = may_commit
        self._run_id = run_id
        self._run_dir = run_dir

    def run(self) -> Summary:
        """Start the nodes, do all rounds, fetch the model.

        Raises:
            StarlingError: the run failed; ``summary`` says how far it came.
        """
        progress = self._progress
        config, runtime = progress.config, progress.runtime
        facts = runtime.start()
        progress.facts = {one.node: one for one in facts}
        progress.samples.start(runtime.num_parts, runtime.part_sizes)
        progress.num_started = len(facts)
        progress.zero = runtime.now
        started = Started(
            config=config,
            run_id=self._run_id,
            run_dir=self._run_dir,
            nodes=facts,
            layout=runtime.layout,
            baselines=runtime.baselines,
            virtual=runtime.virtual,
        )
        progress.observer.on_start(started)
        progress.record("start", nodes=sorted(progress.facts), parts=runtime.num_parts)
        loop = self._loop()
        # Hundreds of thousands of objects are there to stay; each full collection would walk them all again.
        # What a round makes is freed by its reference counts; a thousand nodes of one process make enough of it to
        # start a collection many times a round.
        threshold = gc.get_threshold()
        gc.freeze()
        gc.set_threshold(100_000, *threshold[1:])
        try:
            loop.run()
        finally:
            gc.set_threshold(*threshold)
            gc.unfreeze()
        model = progress.fetch(loop.result, alike=config.algorithm.replicated)
        progress.digest = model.digest
        progress.observer.on_model(model)
        return self.summary("finished")

    def _loop(self) -> Synchronous | Asynchronous:
        progress = self._progress
        return Synchronous(progress) if progress.config.algorithm.synchronous else Asynchronous(progress)

    def summary(self, status: Status) -> Summary:
        """Where the run stands."""
        return self._progress.summary(status)
