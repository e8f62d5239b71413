"""The Ray of a sweep: started or joined, watched, and measured for how many trials fit at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from starling.orchestrator.errors import ClusterError, RunError
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.runtimes.cluster.vitals import Vitals
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.trials import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.orchestrator.config.schema import Config


_MOST = 1000
"""Trials at a time."""

_STANDSTILL_S = 20.0
"""Besides ``cluster.cancel_grace_s``: how long a process of the sweep's own Ray may stand still before it is ended."""


class _Ray:
    """The Ray on which trials run, and how many of them at a time.

    Args:
        config: of the sweep.
        options: of the sweep.
        on_end: called in a thread, with the error to end with, when a vital process of a Ray of our own has ended.
            Tune would wait for ever for room on it.
        simulated: whether a trial is one process that simulates its nodes.
    """

    def __init__(
        self, config: Config, options: Options, on_end: Callable[[RunError], None], *, simulated: bool
    ) -> None:
        self._config, self._options, self._on_end, self._simulated = config, options, on_end, simulated
        self.room = 0
        self._machine: str | None = None

    def __enter__(self) -> Self:
        import ray

        from starling.orchestrator.sweeps.trial_actor import bundles, count_fitting, machine_of_driver

        config = self._config
        wanted = bundles(config, simulated=self._simulated, machine=None)
        each = sum(one.get("CPU", 0.0) for one in wanted)
        address = config.cluster.address
        if self._simulated:  # which needs nothing but this machine
            address = "auto" if ray.is_initialized() else "local"
        self._session = session.connect(
            address,
            num_cpus=max(os.cpu_count() or 1, each),
            object_store_bytes=config.cluster.object_store_bytes,
            runtime_env=config.cluster.runtime_env or None,
        )
        patience_s = _STANDSTILL_S + config.cluster.cancel_grace_s
        self._vitals = Vitals(self._session.vital, patience_s, self._say_ended)
        try:
            self._machine = machine_of_driver()
            wanted = bundles(config, simulated=self._simulated, machine=self._machine)
            asked = self._options.max_concurrent
            fits = count_fitting(wanted, asked or _MOST)
            self._refuse(asked, fits, each, sum(one.get("GPU", 0.0) for one in wanted))
            self.room = asked or fits
        except BaseException:
            self.__exit__()
            raise
        return self

    def _say_ended(self, name: str) -> None:
        self._on_end(self._session.ended(name, "sweep", "starling sweep --resume"))

    def _refuse(self, asked: int | None, fits: int, cpus: float, gpus: float) -> None:
        if fits >= (asked or 1):
            return
        what = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        of = "the simulator" if self._simulated else f"{self._config.num_nodes} nodes"
        least = "lower cluster.num_cpus, or add machines (ray status)"
        if asked:
            raise ClusterError(
                f"--max-concurrent {asked}: {fits} trials fit at a time, each of which asks for {what} ({of}); "
                f"take that many, {least}"
            )
        raise ClusterError(f"cluster: no trial fits: it asks for {what} ({of}); {least}")

    def spec(self, folder: Path, trial: Trial, *, stepwise: bool) -> dict[str, Any]:
        """Return what Tune calls the config of a trial."""
        return {
            "folder": str(folder),
            "number": trial.number,
            "seed": trial.seed,
            "values": trial.values,
            "simulated": self._simulated,
            "machine": self._machine,
            "stepwise": stepwise,
            "clones": self._options.scheduler == "pbt" and trial.stage == "search",
        }

    def __exit__(self, *_: object) -> None:
        self._vitals.hasten()  # a process that stands still would keep Ray from ending
        self._session.close()
        self._vitals.stop()
