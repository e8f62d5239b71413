"""The sender: takes what spools hold to MLflow, in one thread, for one run or for all runs of a sweep.

MLflow takes seconds to import and a database takes its time, so nothing here is waited for but the end, and that in
bounded time. A tracker that does not answer is asked again and again; one that refuses is given up, with a line.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.orchestrator.config.schema import MLflowTracking
from starling.orchestrator.config.sections import without_password
from starling.orchestrator.errors import ConfigError, StarlingError
from starling.orchestrator.safe_files import Folder
from starling.orchestrator.tracking.spool import SPOOL, TRIALS_OF, SpoolReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlflow import MlflowClient

_LOG = logging.getLogger("starling")

_IDLE_S = 0.5
"""Seconds between two polls of the spool for appended records."""
_RETRY_S, _LONGEST_RETRY_S = 0.5, 10.0
AWAY_S = 5.0
"""Seconds that the end of a run waits for an unresponsive tracker, or for one answer."""
ANSWERS_S = 10.0
"""Seconds that the end of a run waits for all of a server's answers together."""
_UPLOAD_BYTES_PER_S = 20e6
"""Files are given more time."""
_BATCH_WAIT_S = 0.5
"""Seconds that a metric waits for others to share its batch."""

# MLflow's own limits; what is over them fails the whole batch.
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000
_KEY_CHARACTERS, _VALUE_CHARACTERS = 250, 6000

_REASON_CHARACTERS = 300

_KEY_TAG = "starling.key"
"""Names a run before MLflow has a name for it: if nobody knows whether it was made, it is looked for."""

_TRANSIENT = re.compile(
    r"API request to .* failed|Connection|timed out|timeout|TEMPORARILY_UNAVAILABLE|error code 5\d\d|"
    r"INTERNAL_ERROR|database is locked|Max retries|too many 5\d\d",
    re.IGNORECASE | re.DOTALL,
)


class Sender:
    """Sends what the spools of some folders hold, as long as it is not closed.

    Args:
        tracking: where to.
        store: its address.
        artifacts: where a new experiment keeps its files; ``None``: the tracker decides.
        folders: those there are now; asked again and again.
        after_run: the runs are over.
    """

    def __init__(
        self,
        tracking: MLflowTracking,
        store: str,
        artifacts: str | None,
        folders: Callable[[], Sequence[Path]],
        *,
        after_run: bool = False,
    ) -> None:
        self.uri = store
        self._goes_on = "" if after_run else "the run goes on, and "
        self.failed = False
        self.problem: str | None = None
        """Reason for giving up."""
        self._tracking = tracking
        self._artifacts = artifacts
        self._folders = folders
        self._readers: dict[Path, SpoolReader] = {}
        self._away = False
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._is_server = store.startswith(("http", "databricks"))
        self._asked_at: float | None = None
        """Start of the wait for a pending answer, or None."""
        self._answers_s = 0.0
        """Seconds that answers took since the wait for the end began."""
        self._granted_s = 0.0
        """Additional seconds granted for the upload of files."""
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._left_to_others = threading.Event()
        """Set when nobody waits any more, and another process may be sending the rest."""
        # A daemon: a tracker that does not answer must not keep the process from its end.
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Wake the sending thread: the spool has new records."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Send what is left; say whether all was, within that time.

        A server is waited for no longer than a few seconds, unless its answers come: what is left can be sent later.
        Work of this machine (a database in a file, the model's other form) has no limit.
        """
        self._closing.set()
        self._wake.set()
        began = time.monotonic()
        while self._thread.is_alive() and (left_s := began + timeout_s - time.monotonic()) > 0:
            self._thread.join(min(left_s, 0.2))
            if (self._away and time.monotonic() - began > AWAY_S) or self._is_slow(began):
                break
        self._left_to_others.set()
        return not self._left()

    def _is_slow(self, began: float) -> bool:
        asked_at, now = self._asked_at, time.monotonic()
        this_s = 0.0 if asked_at is None else now - max(asked_at, began)
        return self._is_server and (
            this_s > AWAY_S + self._granted_s or self._answers_s + this_s > ANSWERS_S + self._granted_s
        )

    @contextmanager
    def _asking(self, nbytes: int = 0) -> Iterator[None]:
        """Measure the time of a request to the tracker, and grant it more for files of ``nbytes``."""
        self._granted_s += nbytes / _UPLOAD_BYTES_PER_S
        self._asked_at = began = time.monotonic()
        try:
            yield
        finally:
            self._asked_at = None
            if self._closing.is_set():
                self._answers_s += time.monotonic() - began

    def _left(self) -> list[Path]:
        return [
            folder for folder in self._folders() if self._reader(folder).problem or not self._reader(folder).is_empty
        ]

    def _reader(self, folder: Path) -> SpoolReader:
        if folder not in self._readers:
            self._readers[folder] = SpoolReader(folder)
        return self._readers[folder]

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        retry_s = _RETRY_S
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._send_all()
            except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
                if self._left_to_others.is_set():
                    return
                if not _is_transient(error):
                    self.failed = True
                    self._say_failed(error)
                    return
                if not self._away:
                    self._away = True
                    _LOG.warning(
                        "tracking: %s does not answer (%s); %swhat is to be recorded waits",
                        without_password(self.uri),
                        reason_of(error),
                        self._goes_on,
                    )
                self._closing.wait(retry_s) if not closing else time.sleep(min(retry_s, 1.0))
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
                continue
            if self._left_to_others.is_set():
                return
            if self._away:
                self._away = False
                _LOG.warning("tracking: %s answers again; nothing was lost", without_password(self.uri))
            retry_s = _RETRY_S
            if closing and not self._left():
                for folder in self._folders():
                    self._reader(folder).forget()
                return
            self._wake.wait(_IDLE_S)
            if not self._closing.is_set():
                self._closing.wait(_BATCH_WAIT_S)

    def _say_failed(self, error: Exception) -> None:
        self.problem = reason_of(error)
        folders = self._folders()
        where = folders[0] if folders else "its directory"
        _LOG.warning(
            "tracking: %s failed, %s%s keeps everything, and starling track sends it: %s: %s",
            without_password(self.uri),
            self._goes_on,
            where,
            type(error).__name__,
            self.problem,
        )

    def _send_all(self) -> None:
        for folder in self._folders():
            reader = self._reader(folder)
            if reader.problem is not None:
                raise ConfigError(reader.problem)
            while not reader.is_empty and not self._left_to_others.is_set():
                operations, offsets = reader.read()
                if not operations:
                    break
                self._send(reader, operations, offsets)

    def _send(self, reader: SpoolReader, operations: list[dict[str, Any]], offsets: list[int]) -> None:
        """Send operations in order; metrics that follow one another in one batch."""
        place = 0
        while place < len(operations) and not self._left_to_others.is_set():
            operation = operations[place]
            if operation["op"] == "metrics":
                values: list[tuple[str, float, int, int]] = []
                while place < len(operations) and operations[place]["op"] == "metrics":
                    one = operations[place]
                    more = [
                        (name, float(value), one["at"], one["step"])  # a text: nan, inf
                        for name, value in one["values"].items()
                        if value is not None
                    ]
                    if values and len(values) + len(more) > _METRICS_PER_BATCH:
                        break
                    values += more
                    place += 1
                self._log_metrics(reader, values)
            else:
                self._carry_out(reader, operation)
                place += 1
            reader.note(offset=offsets[place - 1])

    @property
    def _mlflow(self) -> MlflowClient:
        if self._client is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # We ask again ourselves, and need not wait for minutes inside of one call.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            from mlflow import MlflowClient

            with _quiet():
                self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _run_id(self, reader: SpoolReader) -> str:
        if reader.state.run_id is None:
            raise ConfigError(f"{reader.folder / SPOOL}: does not begin with the run that it is of")
        return reader.state.run_id

    def _log_metrics(self, reader: SpoolReader, values: list[tuple[str, float, int, int]]) -> None:
        client = self._mlflow
        from mlflow.entities import Metric

        metrics = [Metric(_key(name), value, at, step) for name, value, at, step in values]
        for first in range(0, len(metrics), _METRICS_PER_BATCH):
            with self._asking():
                client.log_batch(self._run_id(reader), metrics=metrics[first : first + _METRICS_PER_BATCH])

    def _carry_out(self, reader: SpoolReader, operation: dict[str, Any]) -> None:
        client = self._mlflow
        if operation["op"] == "model":
            path = _own_file(reader.folder, "model.safetensors")
            if path is not None:
                self._log_model(reader, path.parent)
        elif operation["op"] == "file":
            path = _own_file(reader.folder, Path(operation["path"]).name)
            if path is not None:
                with self._asking(path.stat().st_size):
                    client.log_artifact(self._run_id(reader), str(path))
        else:
            with self._asking():
                self._ask(client, reader, operation)

    def _ask(self, client: MlflowClient, reader: SpoolReader, operation: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        match operation["op"]:
            case "run":
                self._make(reader, operation)
            case "params":
                params = [Param(_key(key), _cut(value)) for key, value in operation["values"].items()]
                for first in range(0, len(params), _PARAMS_PER_BATCH):
                    client.log_batch(self._run_id(reader), params=params[first : first + _PARAMS_PER_BATCH])
            case "tags":
                tags = [RunTag(_key(key), _cut(str(value))) for key, value in operation["values"].items()]
                client.log_batch(self._run_id(reader), tags=tags)
            case "text":
                client.log_text(self._run_id(reader), operation["text"], operation["name"])
            case "end":
                client.set_terminated(self._run_id(reader), operation["status"], operation["at"])
                reader.note(ended=True)
            case _:
                pass  # of a later version

    def _make(self, reader: SpoolReader, operation: dict[str, Any]) -> None:
        """Make the run, or find the one that was made when nobody heard the answer, or go on with an earlier one."""
        client = self._mlflow
        if reader.state.run_id is not None:
            with _quiet():
                client.update_run(reader.state.run_id, status="RUNNING")
            reader.note(ended=False)
            return
        tags = dict(operation["tags"]) | {_KEY_TAG: operation["key"]}
        if operation["parent"] and reader.folder.parent.name == TRIALS_OF:
            parent = self._reader(reader.folder.parents[1]).state.run_id
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
        with _quiet():
            experiment = self._experiment(client)
            found = None
            if reader.state.tried:
                runs = client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{operation['key']}'", max_results=1)
                found = runs[0] if runs else None
            reader.note(tried=True)
            run = found or client.create_run(
                experiment, start_time=operation["at"], run_name=operation["name"], tags=tags
            )
        reader.note(run_id=run.info.run_id, experiment_id=experiment)

    def _experiment(self, client: MlflowClient) -> str:
        """Return the experiment's id; create the experiment if there is none."""
        from mlflow.exceptions import MlflowException

        if self._experiment_id is not None:
            return self._experiment_id
        name = self._tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                self._experiment_id = client.create_experiment(name, artifact_location=self._artifacts)
                return self._experiment_id
            except MlflowException:
                # Another run made it in between; if that is not why, the next line says what is.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"its experiment {name} was deleted; bring it back (mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}), or name another one: tracking.experiment"
            )
        self._experiment_id = experiment.experiment_id
        return self._experiment_id

    def _log_model(self, reader: SpoolReader, run_dir: Path) -> None:
        import tempfile

        from starling.orchestrator.tracking.mlflow_model import save_for_mlflow

        with tempfile.TemporaryDirectory(prefix="starling-model-") as folder:
            path = Path(folder) / "model"
            try:
                with _quiet():
                    save_for_mlflow(run_dir, path)
            except Exception as error:  # noqa: BLE001 - torch.export raises whatever it likes; model.safetensors is there
                _LOG.warning(
                    "tracking: the model of %s is recorded as model.safetensors alone; it cannot be exported: %s: %s",
                    run_dir.name,
                    type(error).__name__,
                    reason_of(error),
                )
                return
            with self._asking(sum(one.stat().st_size for one in path.rglob("*") if one.is_file())):
                self._mlflow.log_artifacts(self._run_id(reader), str(path), "model")


def _own_file(folder: Path, name: str) -> Path | None:
    """Return a file of the run in ``folder`` that its spool may send, whatever path the spool says."""
    # A trial's spool is not where its run is, which may have to be made anew.
    run_dir = folder.parents[1] / "trials" / folder.name if folder.parent.name == TRIALS_OF else folder
    try:
        Folder(run_dir).size(name)
    except OSError:
        return None
    return run_dir / name


def _is_transient(error: BaseException) -> bool:
    """Tell whether an error is worth another try: nobody answers, or somebody else writes."""
    if isinstance(error, StarlingError):
        return False
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ConnectionError | TimeoutError) or type(found).__module__.startswith(
            ("requests", "urllib3")
        ):
            return True
        code = getattr(found, "error_code", "")
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return False
        found = found.__cause__
    return bool(_TRANSIENT.search(str(error)))


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells at length how it makes the tables of a new database."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason_of(error: BaseException) -> str:
    """Why a tracker did not take something, in a line that is not cut where it says so."""
    text = " ".join(str(error).split())
    if found := re.search(r"\[Errno -?\d+\] ([^'\"()\\]+)", text):  # at the end of what urllib3 tells at length
        return found[1].strip()
    if re.search(r"timed out|timeout", text, re.IGNORECASE):
        return "no answer in time"
    if found := re.search(r"too many (\d\d\d) error responses|error code (\d\d\d)", text):
        return f"it answers with error {found[1] or found[2]}"
    if len(text) <= _REASON_CHARACTERS:
        return text or type(error).__name__
    return f"{text[:_REASON_CHARACTERS].rpartition(' ')[0]} …"


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_KEY_CHARACTERS]


def _cut(value: str) -> str:
    return value if len(value) <= _VALUE_CHARACTERS else f"{value[: _VALUE_CHARACTERS - 1]}…"
