"""Tracking: what MLflow really holds after a run, and that a tracker which fails costs a run nothing but a line."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from pathlib import Path

import pytest

from starling import simulate
from starling.orchestrator.config.schema import MLflowTracking, parse
from starling.orchestrator.tracking import mlflow_tracker
from starling.orchestrator.tracking.mlflow_tracker import (
    MLflowTracker,
    artifacts_of,
    is_recorded,
    link_of,
    metrics_of,
    say_unused,
    send_left,
    store_of,
    ui_command,
)
from starling.orchestrator.tracking.sender import Sender, reason_of
from tests.observed import configuration, record, started, summary, tell


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs; module-wide, because MLflow takes seconds to make a database."""
    return tmp_path_factory.mktemp("tracking") / "runs"


@pytest.mark.pictures
def test_a_run_is_there_whole(runs: Path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(runs.parent)
    config = configuration(tracking={"name": "mlflow", "experiment": "here"}, rounds=3)
    end = simulate(config, run_dir=runs / "first")
    store = f"sqlite:///{runs}/mlflow.db"
    assert store_of(config.tracking, runs / "first") == store
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("here")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == end.run_id == "first"
    assert run.info.status == "FINISHED"
    assert run.data.tags.items() >= {"algorithm": "fedavg", "task": "digits", "runtime": "simulator"}.items()
    assert run.data.params.items() >= config.flat().items()
    assert run.data.params["parameters"] == "9610"
    history = client.get_metric_history(run.info.run_id, "bytes/payload_total")
    per_round = int(end.bytes["per_round"] or 0)
    assert [(one.step, one.value) for one in history] == [(k, per_round * (k + 1)) for k in range(3)]
    assert run.data.metrics["eval/loss"] == pytest.approx(end.metrics["loss"])
    assert run.data.metrics["seconds/virtual_total"] == end.virtual_seconds
    assert "bytes/transport" not in run.data.metrics
    assert run.data.metrics.keys() >= {"train/loss", "eval/accuracy", "bytes/payload", "nodes/committed"}
    names = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert names == ["config.yaml", "curves.png", "model", "model.safetensors"]
    copy = Path(client.download_artifacts(run.info.run_id, "model.safetensors", str(runs.parent)))
    assert copy.read_bytes() == (runs / "first" / "model.safetensors").read_bytes()
    # All beside the run directories, nothing in the current folder.
    assert experiment.artifact_location == (runs / "mlartifacts" / "here").as_uri()
    assert sorted(path.name for path in runs.iterdir()) == ["first", "mlartifacts", "mlflow.db"]
    assert not (runs.parent / "mlruns").exists()


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_a_run_that_ended_otherwise(runs: Path, status, expected):
    from mlflow import MlflowClient

    run_dir = runs / status
    tracker = MLflowTracker(MLflowTracking(experiment="bad ends"), run_dir)
    tell(tracker, started(run_dir=str(run_dir)), summary(status), rounds=2)
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("bad ends")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{status}'")
    assert run.info.status == expected
    assert run.data.metrics["bytes/transport"] == 9000
    assert run.data.params["baseline.chance"] == "2.303"


def test_more_than_mlflow_takes_at_once(runs: Path):
    from mlflow import MlflowClient

    variables = {f"A{number}": "x" for number in range(250)}
    modules = ["x" * 7000]
    config = configuration(cluster={"runtime_env": {"env_vars": variables, "pip": modules}})
    tracker = MLflowTracker(MLflowTracking(experiment="much"), runs / "much")
    tell(tracker, started(config, run_dir=str(runs / "much")), summary(), rounds=200)
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("much").experiment_id])
    assert run.info.status == "FINISHED"
    assert len(run.data.params) > 300
    assert run.data.params["cluster.runtime_env.env_vars.A249"] == "***"
    assert len(run.data.params["cluster.runtime_env.pip"]) == 6000
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 200


def test_a_broken_tracker_costs_a_line(tmp_path: Path, caplog):
    (tmp_path / "mlflow.db").write_text("not a database, and longer than the header of one would be" * 10)
    end = simulate(configuration(tracking="mlflow"), run_dir=tmp_path / "run")
    assert end.status == "finished"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    (message,) = caplog.messages
    assert message.startswith(
        f"tracking: sqlite:///{tmp_path}/mlflow.db failed, the run goes on, and {tmp_path}/run keeps everything"
    )
    assert "\n" not in message


def test_a_tracker_that_hangs_is_left(tmp_path: Path, monkeypatch, caplog):
    gate = threading.Event()
    monkeypatch.setattr(mlflow_tracker, "CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(Sender, "_make", lambda *_: gate.wait())
    tracker = MLflowTracker(MLflowTracking(uri="https://me:secret@example.com"), tmp_path / "run")
    tell(tracker, started(), summary())
    (message,) = caplog.messages
    assert message.startswith(
        "tracking: https://me:***@example.com did not take everything in the time for which an end waits; what is "
    )
    assert message.endswith(f"starling track {tmp_path / 'run'}")
    gate.set()
    tracker._sender.failed = True
    assert len(caplog.messages) == 1


def test_a_run_that_never_began_is_not_tracked(tmp_path: Path):
    tracker = MLflowTracker(MLflowTracking(), tmp_path / "run")
    tracker.on_end(summary("failed", rounds=0))
    assert not tracker._sender._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_mlflow_is_left_behind(runs: Path):
    before = set(threading.enumerate())
    level = logging.getLogger("alembic").level
    tell(MLflowTracker(MLflowTracking(), runs / "clean"), started(run_dir=str(runs / "clean")), summary())
    assert set(threading.enumerate()) == before
    assert logging.getLogger("alembic").level == level


def test_metrics_have_names_that_stay():
    assert metrics_of(record(1)) == {
        "train/loss": 1.0,
        "train/samples": 1400,
        "bytes/payload": 8000,
        "bytes/transport": 9000,
        "nodes/alive": 2,
        "nodes/in_view": 2,
        "nodes/contributing": 2,
        "nodes/committed": 2,
        "nodes/late": 0,
        "seconds/train": 1.25,
        "seconds/exchange": 0.25,
        "seconds/evaluate": 0.125,
        "seconds/total": 1.5,
        "eval/loss": 0.875,
        "eval/accuracy": 0.5,
    }
    assert "train/loss" not in metrics_of(record(0, loss=None))
    assert "seconds/evaluate" not in metrics_of(record(0))
    fed = metrics_of(record(0, residuals_lost=1, residual_norm_lost=0.5))
    assert (fed["lost/residuals"], fed["lost/residual_norm"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("uri", "artifacts"),
    [
        (None, "file:///data/runs/mlartifacts/my_runs"),
        ("sqlite:////elsewhere/my.db", "file:///elsewhere/mlartifacts/my_runs"),
        ("postgresql://host/db", "file:///data/runs/mlartifacts/my_runs"),
        ("http://localhost:5000", None),
        ("databricks", None),
    ],
)
def test_artifacts_lie_beside_the_database(uri, artifacts):
    assert artifacts_of(MLflowTracking(uri=uri, experiment="my runs"), Path("/data/runs/one")) == artifacts


@pytest.mark.parametrize(
    ("named", "used"), [("sqlite:////theirs/my.db", True), ("http://u:pw@x:5000", True), ("./mlruns", False)]
)
def test_the_environment_names_a_tracker(tmp_path: Path, monkeypatch, caplog, named, used):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    config = configuration(tracking="mlflow")
    assert config.tracking == MLflowTracking(uri=named if used else None, experiment="theirs")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    # A run stays where it is, whatever the environment of those who go on with it.
    assert parse(config.dump()).tracking == config.tracking
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    here = configuration(tracking={"name": "mlflow", "uri": None, "experiment": "mine"})
    assert here.tracking == MLflowTracking(uri=None, experiment="mine")
    say_unused(here.tracking, tmp_path / "run")
    (message,) = caplog.messages
    assert "MLFLOW_TRACKING_URI is" in message
    assert f"recorded in sqlite:///{tmp_path}/mlflow.db" in message
    assert "pw" not in message
    say_unused(config.tracking, tmp_path / "run")
    assert len(caplog.messages) == (1 if used else 2)


REFUSED = (
    "API request to http://127.0.0.1:9/api/2.0/mlflow/x failed with exception "
    "HTTPConnectionPool(host='127.0.0.1', port=9): "
    "Max retries exceeded with url: /api/2.0/mlflow/x (Caused by NewConnectionError('<urllib3.HTTPConnection object "
    "at 0x7f>: Failed to establish a new connection: [Errno 111] Connection refused'))"
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (REFUSED, "Connection refused"),
        ("HTTPConnectionPool(host='x', port=9): Read timed out. (read timeout=20)", "no answer in time"),
        ("x (Caused by ResponseError('too many 503 error responses'))", "it answers with error 503"),
        ("short\nand more", "short and more"),
        ("", "ConnectionError"),
    ],
)
def test_why_a_tracker_did_not_take_something(said, reason):
    assert reason_of(ConnectionError(said)) == reason
    assert len(reason_of(ConnectionError("word " * 1000))) <= 302


def test_nan_and_infinity_are_recorded(runs: Path):
    from mlflow import MlflowClient

    tracker = MLflowTracker(MLflowTracking(uri=None, experiment="odd"), runs / "odd")
    tracker.on_start(started(run_dir=str(runs / "odd")))
    tracker.on_round(record(0, loss=math.nan, metrics={"loss": math.inf, "a": -math.inf, "b": 0.5}))
    tracker.on_end(summary(rounds=1))
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("odd").experiment_id])
    found = run.data.metrics
    assert math.isnan(found["train/loss"])
    assert found["eval/loss"] > 1e308
    assert found["eval/a"] < -1e308
    assert found["eval/b"] == 0.5


def test_an_experiment_that_was_deleted_is_not_tracked_in(runs: Path, caplog):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    run_dir = runs / "into-gone"
    config = configuration(tracking={"name": "mlflow", "uri": None, "experiment": "gone"})
    tell(MLflowTracker(config.tracking, run_dir), started(config, run_dir=str(run_dir)), summary())
    (message,) = caplog.messages
    assert message.endswith(
        f"its experiment gone was deleted; bring it back (mlflow experiments restore --experiment-id {number}), or "
        "name another one: tracking.experiment"
    )
    assert (is_recorded(run_dir), link_of(config.tracking, run_dir)) == (None, None)
    client.restore_experiment(number)
    assert send_left(run_dir, config, 60) == (1, True)
    assert is_recorded(run_dir) is True
    page = f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning"
    assert link_of(config.tracking, run_dir) == page


class Silent:
    """A server that takes connections and says nothing."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_a_server_that_says_nothing_is_left_before_the_limit(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr("starling.orchestrator.tracking.sender.AWAY_S", 0.1)
    with Silent() as uri:
        config = configuration(tracking={"name": "mlflow", "uri": uri})
        tracker = MLflowTracker(config.tracking, tmp_path / "run")
        tracker.on_start(started(config, run_dir=str(tmp_path / "run")))
        while tracker._sender._asked_at is None:
            time.sleep(0.01)
        tracker.on_end(summary())
        assert tracker._sender._thread.is_alive()  # it still waits, for up to twenty seconds; the end did not
    tracker._sender._thread.join(60)
    assert not tracker._sender._thread.is_alive()
    assert "did not take everything in the time for which an end waits" in caplog.text
    assert is_recorded(tmp_path / "run") is None


def test_the_command_to_look():
    command = ui_command("sqlite:////data/my runs/mlflow.db")
    assert command is not None
    assert command.endswith("/bin/mlflow ui --backend-store-uri 'sqlite:////data/my runs/mlflow.db'")
    assert ui_command("http://localhost:5000") is None
