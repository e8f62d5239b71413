"""The spool: what is appended is sent in order, once, whoever dies in between; nobody is waited for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from starling.orchestrator.config.schema import MLflowTracking
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.tracking.mlflow_tracker import MLflowTracker, probe, send_left
from starling.orchestrator.tracking.sender import Sender
from starling.orchestrator.tracking.spool import Spool, SpoolReader
from tests.observed import configuration, started, summary, tell


def test_operations_are_read_in_order_and_noted(tmp_path: Path):
    spool = Spool(tmp_path)
    for number in range(3):
        spool.append("metrics", step=number, values={"x": float("nan")}, at=0)
    reader = SpoolReader(tmp_path)
    operations, offsets = reader.read()
    assert [one["step"] for one in operations] == [0, 1, 2]
    assert operations[0]["values"] == {"x": None}
    reader.note(offset=offsets[1], run_id="r")
    again = SpoolReader(tmp_path)
    assert [one["step"] for one in again.read()[0]] == [2]
    assert again.state.run_id == "r"
    assert not again.is_empty
    again.note(offset=offsets[2], ended=True)
    assert again.is_empty
    again.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.json"]
    assert SpoolReader(tmp_path).state.run_id == "r"


def test_a_line_that_is_still_written_waits_and_one_that_was_cut_off_is_left_out(tmp_path: Path):
    Spool(tmp_path).append("tags", values={})
    with (tmp_path / "tracking.jsonl").open("a") as file:
        file.write('{"op": "ta')
    reader = SpoolReader(tmp_path)
    operations, offsets = reader.read()
    assert len(operations) == 1
    reader.note(offset=offsets[0])
    assert reader.read() == ([], [])
    with (tmp_path / "tracking.jsonl").open("a") as file:
        file.write("\n")
    Spool(tmp_path).append("end", status="FINISHED", at=0)
    assert [one["op"] for one in reader.read()[0]] == ["end"]


class Flaky:
    """In the place of MLflow's client: away until it is told to be there, and it forgets nothing."""

    def __init__(self) -> None:
        self.away = True
        self.calls: list[tuple] = []

    def _take(self, *call):
        if self.away:
            raise ConnectionError("nobody answers")
        self.calls.append(call)

    def get_experiment_by_name(self, name):
        self._take("experiment", name)

    def create_experiment(self, name, artifact_location=None):
        return "7"

    def search_runs(self, *_, **__):
        return []

    def create_run(self, experiment, **facts):
        self._take("run", facts["run_name"], facts["tags"]["algorithm"])

        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self._take("batch", run_id, [(one.key, one.step) for one in metrics], len(params), len(tags))

    def log_text(self, run_id, text, name):
        self._take("text", name)

    def log_artifact(self, run_id, path):
        self._take("file", Path(path).name)

    def set_terminated(self, run_id, status, at):
        self._take("end", status)


@pytest.fixture
def flaky(monkeypatch) -> Flaky:
    client = Flaky()
    monkeypatch.setattr(Sender, "_mlflow", property(lambda _: client))
    monkeypatch.setattr("starling.orchestrator.tracking.sender._RETRY_S", 0.01)
    monkeypatch.setattr("starling.orchestrator.tracking.sender._IDLE_S", 0.01)
    monkeypatch.setattr("starling.orchestrator.tracking.sender._BATCH_WAIT_S", 0.0)
    return client


def steps(client: Flaky) -> list[int]:
    return [step for call in client.calls if call[0] == "batch" for key, step in call[2] if key == "train/loss"]


def test_a_tracker_that_comes_back_has_missed_nothing(tmp_path: Path, flaky: Flaky, caplog):
    (tmp_path / "run").mkdir()
    tracker = MLflowTracker(MLflowTracking(uri="http://localhost:1"), tmp_path / "run")
    tracker.on_start(started(run_dir=str(tmp_path / "run")))
    from tests.observed import record

    began = time.monotonic()
    for number in range(50):
        tracker.on_round(record(number))
    assert time.monotonic() - began < 10  # nobody was waited for
    while "does not answer" not in caplog.text:
        time.sleep(0.01)
    flaky.away = False
    tracker.on_end(summary())
    assert steps(flaky) == list(range(50))
    assert flaky.calls[-1] == ("end", "FINISHED")
    assert [call[0] for call in flaky.calls].count("run") == 1
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        "tracking: http://localhost:1 does not answer",
        "tracking: http://localhost:1 answers again; nothing was lost",
    ]


def test_what_could_not_be_sent_is_sent_another_time(tmp_path: Path, flaky: Flaky, monkeypatch, caplog):
    monkeypatch.setattr("starling.orchestrator.tracking.sender.AWAY_S", 0.2)
    folder = tmp_path / "run"
    folder.mkdir()
    config = configuration(tracking={"name": "mlflow", "uri": "http://localhost:1"})
    tell(MLflowTracker(config.tracking, folder), started(config, run_dir=str(folder)), summary(), rounds=5)
    assert caplog.messages[-1].endswith(f"what is missing there waits: starling track {folder}")
    assert flaky.calls == []
    flaky.away = False
    # On a busy machine an answer of this process to itself may take longer than those 0.2 s.
    monkeypatch.setattr("starling.orchestrator.tracking.sender.AWAY_S", 60.0)
    assert send_left(folder, config, 20) == (1, True)
    assert steps(flaky) == list(range(5))
    assert flaky.calls[-1] == ("end", "FINISHED")
    done = len(flaky.calls)
    assert send_left(folder, config, 20) == (0, True)
    assert len(flaky.calls) == done


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path, flaky: Flaky):
    flaky.away = False
    flaky.update_run = lambda run_id, status: flaky.calls.append(("again", run_id, status))
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(2):
        tell(MLflowTracker(MLflowTracking(uri="http://localhost:1"), folder), started(run_dir=str(folder)), summary())
    assert [call for call in flaky.calls if call[0] in ("run", "again")] == [
        ("run", "run", "fedavg"),
        ("again", "r1", "RUNNING"),
    ]


def test_nobody_listens():
    with pytest.raises(ConfigError, match=r"tracking.uri http://127.0.0.1:1: nothing answers there"):
        probe(MLflowTracking(uri="http://127.0.0.1:1"))
    probe(MLflowTracking())


def test_the_spool_is_plain_json(tmp_path: Path):
    Spool(tmp_path).append("text", name="ä", text="line\nline")
    assert json.loads((tmp_path / "tracking.jsonl").read_text()) == {"op": "text", "name": "ä", "text": "line\nline"}
