"""A sweep in MLflow: a run in which the runs of its trials are nested, and one sender for all."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from starling.orchestrator.config.schema import MLflowTracking
from starling.orchestrator.tracking.mlflow_tracker import (
    artifacts_of,
    begin,
    close,
    folders_of,
    say_unused,
    spool_of,
    store_of,
    tags_of,
    written,
)
from starling.orchestrator.tracking.sender import Sender
from starling.orchestrator.tracking.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.sweeps.options import Options
    from starling.orchestrator.sweeps.result import SweepResult
    from starling.tune_spaces import Space

_CLOSE_TIMEOUT_S = 60.0
_CLOSE_PER_TRIAL_S = 1.0
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class SweepTracking:
    """Sends the records of a sweep and its trials until ``end``."""

    def __init__(self, tracking: MLflowTracking, folder: Path, config: Config, options: Options, space: Space) -> None:
        self._folder = folder
        say_unused(tracking, folder)
        self._spool = Spool(folder)
        begin(
            self._spool,
            folder.name,
            tags_of(config)
            | {"runtime": "simulator" if options.simulate else "cluster", "run_dir": str(folder), "sweep": folder.name},
        )
        values = {f"sweep.{name}": str(value) for name, value in vars(options).items()}
        values |= {f"space.{path}": _text(domain) for path, domain in space.items()}
        self._put("params", values=config.flat() | values)
        self._sender = Sender(
            tracking, store_of(tracking, folder), artifacts_of(tracking, folder), lambda: folders_of(folder)
        )

    def end(self, result: SweepResult) -> None:
        """Say what the sweep came to, and wait, in bounded time, until all is sent."""
        now = int(time.time() * 1000)
        best = result.best
        if best is not None:
            values = {f"best/{name}": value for name, value in best.means.items()}
            self._put("metrics", values=written(values), step=0, at=now)
            self._put("tags", values={"best_trial": best.first.number})
            with contextlib.suppress(OSError):
                trial = Spool(spool_of(self._folder, best.first.name))
                run_dir = self._folder / "trials" / best.first.name
                trial.append("tags", values={"best": "yes"})
                trial.append("file", path=str(run_dir / "model.safetensors"))
                if (best.first.summary or {}).get("digest"):
                    trial.append("model", run_dir=str(run_dir))
        for name in ("results.csv", "best.yaml", "sweep.png"):
            self._put("file", path=str(self._folder / name))
        self._put("end", status=_STATUS[result.status], at=now)
        limit = _CLOSE_TIMEOUT_S + _CLOSE_PER_TRIAL_S * len(result.trials)
        close(self._sender, limit if result.status == "finished" else _CLOSE_TIMEOUT_S / 2, self._folder)

    def _put(self, operation: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        with contextlib.suppress(OSError):
            self._spool.append(operation, **facts)
        if hasattr(self, "_sender"):
            self._sender.wake()


def _text(domain: Any) -> str:  # noqa: ANN401 - a domain of Ray Tune
    return f"{type(domain).__name__.lower()} {domain.domain_str}"
