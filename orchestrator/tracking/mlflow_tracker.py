"""Tracking: parameters, metrics and files of a run in MLflow, through a spool in the run's directory.

Nothing here is waited for but the end, and that in bounded time. A failure is reported once, in one line, and the run
goes on. The run directory has everything, and ``starling track RUN_DIR`` sends the records that a tracker has missed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import shlex
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starling.algorithms.api import SERVER
from starling.orchestrator.config.schema import TRACKING_URI, MLflowTracking
from starling.orchestrator.config.sections import without_password
from starling.orchestrator.config.yaml_loader import dump
from starling.orchestrator.errors import ConfigError, RunError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.observers import Observer
from starling.orchestrator.safe_files import Folder
from starling.orchestrator.tracking.sender import Sender
from starling.orchestrator.tracking.spool import SPOOL, TRIALS_OF, Spool, SpoolReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import RoundRecord, Started, Summary
    from starling.orchestrator.runtimes.events import FinalModel

_LOG = logging.getLogger("starling")

CLOSE_TIMEOUT_S = 60.0
"""Seconds that the end of a run waits for this machine's pending writes.

Large models are given more. A server is waited for no longer than ``sender.ANSWERS_S``."""
_CLOSE_BYTES_PER_S = 20e6
_IDLE_CLOSE_S = 1.0
"""Seconds that the end of a run waits for the sender if tracking had not started."""
_PROBE_TIMEOUT_S = 3.0

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


def store_of(tracking: MLflowTracking, run_dir: Path) -> str:
    """Return the address of the store: ``mlflow.db`` beside the run directories, unless another one is configured."""
    return tracking.uri or f"sqlite:///{run_dir.parent / 'mlflow.db'}"


def artifacts_of(tracking: MLflowTracking, run_dir: Path) -> str | None:
    """Return the folder of a new experiment's files, ``mlartifacts`` beside the database; None: its server decides."""
    store = store_of(tracking, run_dir)
    if store.startswith(("http", "databricks")):
        return None
    folder = run_dir.parent
    if store.startswith("sqlite:///") and len(store) > len("sqlite:///"):
        folder = Path(store.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
    return (folder / "mlartifacts" / _file_name(tracking.experiment)).as_uri()


def ui_command(store: str) -> str | None:
    """Return the command that shows a store of one's own; None where a server has its own page."""
    if store.startswith(("http", "databricks")):
        return None
    return shlex.join([str(Path(sys.executable).parent / "mlflow"), "ui", "--backend-store-uri", store])


class MLflowTracker(Observer):
    """Writes a run's spool, and has it sent; ``on_end`` waits for that.

    Args:
        tracking: where to.
        run_dir: of the run, where the spool is.
        sweep_dir: of the sweep that the run belongs to; then the spool is there, and its sender takes care of it.
        tags: of the run, besides ours.
    """

    def __init__(
        self,
        tracking: MLflowTracking,
        run_dir: Path,
        *,
        sweep_dir: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._parent = sweep_dir
        self._tags = dict(tags or {})
        self._started = False
        self._model_nbytes = 0
        self._sent = 0
        self._virtual_s = 0.0
        self._measured: Counter[int] = Counter()
        self._broken = False
        if sweep_dir is None:
            say_unused(tracking, run_dir)
        self._sender = (
            Sender(tracking, store_of(tracking, run_dir), artifacts_of(tracking, run_dir), lambda: [run_dir])
            if sweep_dir is None
            else None
        )
        self._spool = Spool(
            run_dir if sweep_dir is None else spool_of(sweep_dir, run_dir.name),
            self._sender.wake if self._sender else lambda: None,
        )

    def on_start(self, started: Started) -> None:
        self._started = True
        begin(
            self._spool,
            started.run_id,
            tags_of(started.config)
            | {"runtime": "simulator" if started.virtual else "cluster", "run_dir": started.run_dir}
            | self._tags,
            parent=self._parent,
        )
        if started.resumed_after is not None:
            return  # it has all that does not change, and parameters cannot be
        values = started.config.flat() | {
            f"baseline.{name}": f"{value:.6g}" for name, value in started.baselines.items()
        }
        values["parameters"] = str(started.layout.num_values)
        self._put("params", values=values)
        if self._parent is None:
            text = dump(started.config.public())
            self._put("text", name="config.yaml", text=text)

    def on_round(self, record: RoundRecord) -> None:
        self._sent += record.payload_bytes
        self._virtual_s += record.seconds
        values = metrics_of(record) | {"bytes/payload_total": float(self._sent)}
        if record.transport_bytes is None:
            values["seconds/virtual_total"] = self._virtual_s
        self._put("metrics", values=written(values), step=record.round, at=_now())

    def on_usage(self, node: int, values: Mapping[str, float]) -> None:
        if self._started:
            who = "server" if node == SERVER else f"node-{node:03}"
            step = self._measured[node]
            self._measured[node] += 1
            named = {f"system/{who}/{name}": value for name, value in values.items()}
            self._put("metrics", values=written(named), step=step, at=_now())

    def on_model(self, model: FinalModel) -> None:
        self._model_nbytes = len(model.safetensors)

    def on_end(self, summary: Summary) -> None:
        if self._started:
            self._put("tags", values=fault_tags(summary))
            if self._parent is None:
                for name in ("curves.png", "model.safetensors"):
                    self._put("file", path=str(self._run_dir / name))
                if summary.digest is not None:
                    self._put("model", run_dir=str(self._run_dir))
            self._put("end", status=_STATUS[summary.status], at=_now())
        if self._sender is None:
            return
        limit = CLOSE_TIMEOUT_S + self._model_nbytes / _CLOSE_BYTES_PER_S
        close(self._sender, limit if self._started else _IDLE_CLOSE_S, self._run_dir)

    def _put(self, operation: str, **facts: Any) -> None:  # noqa: ANN401 - plain data of any kind
        if self._broken or (self._sender is not None and self._sender.failed):
            return
        try:
            self._spool.append(operation, **facts)
        except OSError as error:
            self._broken = True
            _LOG.warning("tracking: %s cannot be written (%s); the run goes on without it", SPOOL, error.strerror)


def say_unused(tracking: MLflowTracking, run_dir: Path) -> None:
    """Say that the environment names a tracker, if that is not the one that is written to."""
    named = os.environ.get(TRACKING_URI)
    if named and tracking.uri is None:
        _LOG.warning(
            "tracking: %s is %s, which is not used: this is recorded in %s; tracking.uri names another place",
            TRACKING_URI,
            without_password(named),
            store_of(tracking, run_dir),
        )


def written(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as a spool has them: JSON knows no NaN and no infinity, and trackers do."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def link_of(tracking: MLflowTracking, run_dir: Path) -> str | None:
    """Return the page of the experiment in MLflow's user interface; None if nothing is there.

    Without the type of workflow that page shows something else than runs.
    """
    experiment = SpoolReader(run_dir).state.experiment_id
    store = store_of(tracking, run_dir)
    if experiment is None or store.startswith("databricks"):
        return None
    base = without_password(store).rstrip("/") if store.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def is_recorded(run_dir: Path) -> bool | None:
    """Tell whether a tracker has all of a run that is over; None: it has nothing."""
    reader = SpoolReader(run_dir)
    if reader.state.run_id is None:
        return None
    return reader.state.ended and reader.is_empty


def close(sender: Sender, limit_s: float, folder: Path) -> None:
    """Let a sender come to its end; say what it could not do in that time."""
    if not sender.close(limit_s) and not sender.failed:
        sender.failed = True
        _LOG.warning(
            "tracking: %s did not take everything in the time for which an end waits; what is missing there waits: "
            "starling track %s",
            without_password(sender.uri),
            folder,
        )


def begin(spool: Spool, name: str, tags: Mapping[str, str], *, parent: Path | None = None) -> None:
    """Begin a run's spool, or go on with it."""
    now = _now()
    with contextlib.suppress(OSError):
        spool.append(
            "run",
            name=name,
            key=f"{platform.node()}:{name}:{now}",
            at=now,
            parent=None if parent is None else str(parent),
            tags={**tags, "mlflow.source.name": "starling", "mlflow.source.type": "LOCAL"},
        )


def tags_of(config: Config) -> dict[str, str]:
    """Return the tags by which runs are compared."""
    planned = Counter(event.kind for event in config.faults.events)
    return {
        "algorithm": config.algorithm.name,
        "task": config.task.name,
        "nodes": str(config.num_nodes),
        "faults": ", ".join(f"{count} {kind}" for kind, count in sorted(planned.items())) or "none",
    }


def fault_tags(summary: Summary) -> dict[str, str]:
    """Return the tags that count joins, losses and drains."""
    return {f"nodes.{what}": str(summary.nodes[what]) for what in ("lost", "drained", "joined")}


def send_left(run_dir: Path, config: Config, timeout_s: float) -> tuple[int, bool]:
    """Send what a tracker has missed of a run or a sweep: how many runs had something left, and whether all is sent.

    Raises:
        ConfigError: the run is not tracked, or what is to be sent is damaged.
        RunError: the tracker refuses it.
    """
    if not isinstance(config.tracking, MLflowTracking):
        raise ConfigError(f"{run_dir}: its configuration has tracking: none; there is nothing to send")
    folders = folders_of(run_dir)
    readers = [SpoolReader(folder) for folder in folders]
    for problem in (reader.problem for reader in readers):
        if problem is not None:
            raise ConfigError(problem)
    left = [reader for reader in readers if not reader.is_empty]
    tracking = config.tracking
    sender = Sender(
        tracking, store_of(tracking, run_dir), artifacts_of(tracking, run_dir), lambda: folders, after_run=True
    )
    done = sender.close(timeout_s)
    if sender.problem is not None:
        raise RunError(f"{run_dir}: {without_password(sender.uri)} did not take it: {sender.problem}")
    return len(left), done


def folders_of(folder: Path) -> list[Path]:
    """Return the folders of the spools of a run or a sweep: its directory, and one for each trial, but no links.

    Raises:
        ConfigError: the folder of the trials' spools cannot be read, or is a link.
    """
    try:
        there = Folder(folder, TRIALS_OF).folders() if (folder / TRIALS_OF).is_dir() else {}
    except OSError as error:
        raise ConfigError(f"{folder / TRIALS_OF}: {run_files.reason(error)}") from None
    return [folder, *(folder / TRIALS_OF / name for name in sorted(there) if SPOOL in there[name])]


def spool_of(sweep_dir: Path, trial: str) -> Path:
    """Return the folder of a trial's spool: not its run directory, which may have to be made anew."""
    folder = sweep_dir / TRIALS_OF / trial
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def probe(tracking: MLflowTracking) -> None:
    """Check that somebody listens where a tracker is said to be.

    Raises:
        ConfigError: nobody does.
    """
    uri = tracking.uri
    if uri is None or not uri.startswith("http"):
        return
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"tracking.uri {without_password(uri)}: nothing answers there ({error}); check the address, start it "
            "(mlflow server), or use tracking: none"
        ) from None


def _now() -> int:
    return int(time.time() * 1000)


def metrics_of(record: RoundRecord) -> dict[str, float]:
    """Return a round's metrics under their names in a tracker."""
    values: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/samples": record.num_samples,
        "bytes/payload": record.payload_bytes,
        "bytes/transport": record.transport_bytes,
        "nodes/alive": record.alive,
        "nodes/in_view": record.in_view,
        "nodes/contributing": record.contributing,
        "nodes/committed": record.nodes,
        "nodes/late": record.late,
        "lost/residuals": record.residuals_lost,
        "lost/residual_norm": record.residual_norm_lost,
        "seconds/train": record.train_seconds,
        "seconds/exchange": record.exchange_seconds,
        "seconds/evaluate": record.evaluate_seconds if record.metrics is not None else None,
        "seconds/total": record.seconds,
    }
    values |= {f"samples/{name}": count for name, count in record.samples.items()}
    values |= {f"eval/{name}": value for name, value in (record.metrics or {}).items()}
    for name, (least, most) in record.spread.items():
        values |= {f"eval/nodes/{name}_min": least, f"eval/nodes/{name}_max": most}
    for name, of_nodes in record.reported.items():
        values |= {f"algorithm/{name}{'' if kind == 'mean' else f'_{kind}'}": value for kind, value in of_nodes.items()}
    for node, reported in (record.node_reported or {}).items():
        values |= {f"algorithm/nodes/{node}/{name}": value for name, value in reported.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
