"""Tracking: parameters, metrics and files of a run in MLflow, through one thread that writes behind the run's back.

MLflow takes seconds to import and a database takes its time, so nothing here is waited for but the end, and that in
bounded time. What goes wrong is said once, in one line, and the run goes on: the run directory has everything.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shlex
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import yaml

from orchestrator.config import MLflowTracking, without_password
from orchestrator.records import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    from orchestrator.records import RoundRecord, Started, Summary
    from orchestrator.runtime import FinalModel

_LOG = logging.getLogger("starling")

CLOSE_TIMEOUT_S = 30.0
"""How long the end of a run waits for what is not written yet; large models are given more."""
_CLOSE_BYTES_PER_S = 20e6
_FLUSH_S = 1.0
"""Longest that a metric stays in memory."""

# MLflow's own limits; what is over them fails the whole batch.
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000
_KEY_CHARACTERS, _VALUE_CHARACTERS = 250, 6000

_NAME = "mlflow.json"
"""In the run directory: which of the tracker's runs is this one."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

_Job: TypeAlias = "Callable[[_Writer], None]"


def store_of(tracking: MLflowTracking, run_dir: Path) -> str:
    """The address of the store: ``mlflow.db`` beside the run directories, unless another one is configured."""
    return tracking.uri or f"sqlite:///{run_dir.parent / 'mlflow.db'}"


def artifacts_of(tracking: MLflowTracking, run_dir: Path) -> str | None:
    """Where a new experiment keeps its files: ``mlartifacts`` beside the database; ``None``: its server decides."""
    store = store_of(tracking, run_dir)
    if store.startswith(("http", "databricks")):
        return None
    folder = run_dir.parent
    if store.startswith("sqlite:///") and len(store) > len("sqlite:///"):
        folder = Path(store.removeprefix("sqlite:///").partition("?")[0]).absolute().parent
    return (folder / "mlartifacts" / _file_name(tracking.experiment)).as_uri()


def ui_command(store: str) -> str | None:
    """What to type to look at a store of one's own; ``None`` where a server has its own page."""
    if store.startswith(("http", "databricks")):
        return None
    return shlex.join([str(Path(sys.executable).parent / "mlflow"), "ui", "--backend-store-uri", store])


class MLflowTracker(Observer):
    """Hands everything to the writer; ``on_end`` waits for it."""

    def __init__(self, tracking: MLflowTracking, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer = _Writer(tracking, run_dir)
        self._started = False
        self._model_nbytes = 0
        self._sent = 0
        self._virtual_s = 0.0
        # A daemon: a server that does not answer must not keep the process from its end.
        self._thread = threading.Thread(target=self._writer.work, args=(self._jobs,), name="tracking", daemon=True)
        self._thread.start()

    def on_start(self, started: Started) -> None:
        self._started = True
        self._put(lambda writer: writer.start(started))

    def on_round(self, record: RoundRecord) -> None:
        self._sent += record.payload_bytes
        self._virtual_s += record.seconds
        values = metrics_of(record) | {"bytes/payload_total": float(self._sent)}
        if record.transport_bytes is None:
            values["seconds/virtual_total"] = self._virtual_s
        now = int(time.time() * 1000)
        self._put(lambda writer: writer.add(values, record.round, now))

    def on_model(self, model: FinalModel) -> None:
        self._model_nbytes = len(model.safetensors)

    def on_end(self, summary: Summary) -> None:
        if self._started:
            self._put(lambda writer: writer.end(summary.status))
        self._jobs.put(None)
        limit = CLOSE_TIMEOUT_S + self._model_nbytes / _CLOSE_BYTES_PER_S
        self._thread.join(limit if self._started else 0)
        if self._started and self._thread.is_alive():
            self._writer.failed = True
            _LOG.warning(
                "tracking: %s did not take everything within %.0f s; what is missing there is in %s",
                without_password(self._writer.uri),
                limit,
                self._run_dir,
            )

    def _put(self, job: _Job) -> None:
        if not self._writer.failed:
            self._jobs.put(job)


def metrics_of(record: RoundRecord) -> dict[str, float]:
    """A round's metrics under the names that they have in a tracker."""
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
    return {name: float(value) for name, value in values.items() if value is not None}


class _Writer:
    """Everything that happens in the thread."""

    def __init__(self, tracking: MLflowTracking, run_dir: Path) -> None:
        self.uri = store_of(tracking, run_dir)
        self.failed = False
        self._tracking = tracking
        self._run_dir = run_dir
        self._metrics: list[Metric] = []
        self._flushed = time.monotonic()
        self._client: MlflowClient
        self._run_id = ""

    def work(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """Do jobs until ``None`` comes or something fails."""
        try:
            self._import()
            while (job := self._next(jobs)) is not None:
                job(self)
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            if not self.failed:
                self.failed = True
                _LOG.warning(
                    "tracking: %s failed, the run goes on without it (%s keeps everything): %s: %s",
                    without_password(self.uri),
                    self._run_dir,
                    type(error).__name__,
                    _first_line(error),
                )

    def _next(self, jobs: queue.SimpleQueue[_Job | None]) -> _Job | None:
        """The next job; metrics that wait for company are written when none comes."""
        while True:
            wait = max(0.0, self._flushed + _FLUSH_S - time.monotonic()) if self._metrics else None
            try:
                return jobs.get(timeout=wait)
            except queue.Empty:
                self._flush()

    def _import(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow.tracking  # noqa: F401 - while the nodes start

    def start(self, started: Started) -> None:
        """Make the run, with its parameters."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        with _quiet():
            self._client = MlflowClient(tracking_uri=self.uri)
            if started.resumed_after is not None and self._go_on():
                return
            tags = {
                "algorithm": started.config.algorithm.name,
                "task": started.config.task.name,
                "runtime": "simulator" if started.virtual else "cluster",
                "run_dir": started.run_dir,
                "mlflow.source.name": "starling",
                "mlflow.source.type": "LOCAL",
            }
            run = self._client.create_run(self._experiment(), run_name=started.run_id, tags=tags)
        self._run_id = run.info.run_id
        with suppress(OSError):
            (self._run_dir / _NAME).write_text(json.dumps({"uri": without_password(self.uri), "run_id": self._run_id}))
        values = started.config.flat() | {
            f"baseline.{name}": f"{value:.6g}" for name, value in started.baselines.items()
        }
        values["parameters"] = str(started.layout.num_values)
        params: list[Param] = [Param(_key(key), _cut(value)) for key, value in values.items()]
        for first in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[first : first + _PARAMS_PER_BATCH])
        self._client.log_text(
            self._run_id, yaml.safe_dump(started.config.public(), sort_keys=False, allow_unicode=True), "config.yaml"
        )

    def _go_on(self) -> bool:
        """Take up the run that this one goes on with; say whether there is one."""
        try:
            self._run_id = json.loads((self._run_dir / _NAME).read_text(encoding="utf-8"))["run_id"]
        except (OSError, ValueError, KeyError):
            return False
        self._client.update_run(self._run_id, status="RUNNING")
        return True

    def add(self, values: dict[str, float], step: int, timestamp: int) -> None:
        """Take a round's metrics; write when there are many, or the oldest has waited."""
        from mlflow.entities import Metric

        self._metrics += [Metric(_key(name), value, timestamp, step) for name, value in values.items()]
        if len(self._metrics) >= _METRICS_PER_BATCH or time.monotonic() > self._flushed + _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        for first in range(0, len(self._metrics), _METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=self._metrics[first : first + _METRICS_PER_BATCH])
        self._metrics = []
        self._flushed = time.monotonic()

    def end(self, status: str) -> None:
        """Write what is left; the status comes last, so that a run that is over is there whole."""
        self._flush()
        for name in ("curves.png", "model.safetensors"):
            if (self._run_dir / name).exists():
                self._client.log_artifact(self._run_id, str(self._run_dir / name))
        self._client.set_terminated(self._run_id, _STATUS[status])

    def _experiment(self) -> str:
        """The experiment's id; made if it is not there."""
        from mlflow.exceptions import MlflowException

        name = self._tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(
                    name, artifact_location=artifacts_of(self._tracking, self._run_dir)
                )
            except MlflowException:
                # Another run made it in between; if that is not why, the next line says what is.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return experiment.experiment_id


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells at length how it makes the tables of a new database."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_KEY_CHARACTERS]


def _cut(value: str) -> str:
    return value if len(value) <= _VALUE_CHARACTERS else f"{value[: _VALUE_CHARACTERS - 1]}…"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
