"""Where trials run: the Ray of a sweep, and how many fit on it at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from starling.orchestrator.errors import ClusterError
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.trials import Trial

if TYPE_CHECKING:
    from starling.orchestrator.config.schema import Config


_MOST = 1000
"""Trials at a time."""


class _Ray:
    """The Ray on which trials run, and how many of them at a time."""

    def __init__(self, config: Config, options: Options, *, simulated: bool) -> None:
        self._config, self._options, self._simulated = config, options, simulated
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
        try:
            self._machine = machine_of_driver()
            wanted = bundles(config, simulated=self._simulated, machine=self._machine)
            asked = self._options.max_concurrent
            fits = count_fitting(wanted, asked or _MOST)
            self._refuse(asked, fits, each, sum(one.get("GPU", 0.0) for one in wanted))
            self.room = asked or fits
        except BaseException:
            self._session.close()
            raise
        return self

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
        """What Tune is to call the config of a trial."""
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
        self._session.close()
