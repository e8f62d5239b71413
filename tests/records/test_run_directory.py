"""The run directory: what is in it, when it is refused, and that a run that never began leaves none."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from starling import simulate
from starling.orchestrator.config.schema import load
from starling.orchestrator.errors import RunDirectoryError, RunError
from starling.orchestrator.records.appender import Appender
from starling.orchestrator.records.observers import Observer, Observers, Summary
from starling.orchestrator.records.run_directory import RunDirectory
from starling.orchestrator.safe_files import Folder
from tests.observed import MODEL, configuration, record, started, summary, tell


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.pictures
def test_a_whole_run(tmp_path: Path):
    config = configuration()
    directory = RunDirectory(config, tmp_path / "run")
    assert directory.run_id == "run"
    tell(directory, started(config), summary())
    names = ["config.yaml", "curves.png", "events.jsonl", "logs", "metrics.jsonl", "model.safetensors"]
    names += ["run.json", "summary.json"]
    assert sorted(path.name for path in directory.path.iterdir()) == names
    assert load(directory.path / "config.yaml") == config
    assert (directory.path / "model.safetensors").read_bytes() == MODEL.safetensors
    assert (directory.path / "logs" / "node-001.log").read_text() == "one\ntwo\n"
    assert json.loads((directory.path / "summary.json").read_text()) == summary().to_json()
    assert lines(directory.path / "events.jsonl")[1] == {"event": "commit", "round": 1, "committed": [0, 1]}
    rounds = lines(directory.path / "metrics.jsonl")
    assert [one["round"] for one in rounds] == [0, 1, 2, 3]
    assert rounds[1]["metrics"] == {"loss": 0.875, "accuracy": 0.5}
    assert (directory.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_line_is_there_at_once(tmp_path: Path):
    directory = RunDirectory(configuration(), tmp_path / "run")
    directory.on_start(started())
    directory.on_round(record(0))
    assert len(lines(directory.path / "metrics.jsonl")) == 1
    directory.on_log(0, ["one"])
    directory.on_log(0, ["two"])
    assert (directory.path / "logs" / "node-000.log").read_text() == "one\ntwo\n"
    directory.on_end(summary("failed"))


def test_numbers_that_json_does_not_know(tmp_path: Path):
    directory = RunDirectory(configuration(), tmp_path / "run")
    directory.on_start(started())
    directory.on_round(record(0, loss=None, metrics={"loss": float("nan"), "accuracy": float("inf")}))
    directory.on_end(summary(metrics={"loss": float("nan")}))
    assert "NaN" not in (directory.path / "metrics.jsonl").read_text()
    assert json.loads((directory.path / "summary.json").read_text())["metrics"] == {"loss": None}


def test_the_default_is_named_for_the_run_and_the_time(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (RunDirectory(configuration()) for _ in range(2))
    assert re.fullmatch(r"test-\d{8}-\d{6}-[0-9a-f]{4}", first.run_id)
    assert first.path == tmp_path / "runs" / first.run_id
    assert first.path != second.path


def test_a_used_directory_is_refused(tmp_path: Path):
    directory = RunDirectory(configuration(), tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"run directory .*run is in use: it is not empty; name another one"):
        RunDirectory(configuration(), directory.path)
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        RunDirectory(configuration(), tmp_path / "file")
    with pytest.raises(RunDirectoryError, match="file/run: Not a directory"):
        RunDirectory(configuration(), tmp_path / "file" / "run")


def test_an_empty_directory_is_welcome(tmp_path: Path):
    assert RunDirectory(configuration(), tmp_path).path == tmp_path


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path):
    for path in (tmp_path / "run", tmp_path):  # the second was there before
        RunDirectory(configuration(), path).on_end(summary("failed", rounds=0))
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_later_keeps_what_it_has(tmp_path: Path):
    directory = RunDirectory(configuration(), tmp_path / "run")
    directory.on_start(started())
    directory.on_end(summary("interrupted", rounds=0))
    assert sorted(path.name for path in directory.path.iterdir()) == ["config.yaml", "run.json", "summary.json"]


class Disk:
    """In the place of the system's ``write``: takes so many bytes, and then no more until it is given room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, bytes(data[: self.room]))
        self.room -= written
        return written


def test_what_a_full_disk_does_not_take_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    disk = Disk(500)  # not a whole round
    monkeypatch.setattr("starling.orchestrator.records.appender.write", disk)
    directory = RunDirectory(configuration(), tmp_path / "run")
    directory.on_start(started())
    for number in range(3):
        directory.on_event({"event": "commit", "round": number})
        directory.on_round(record(number))
        directory.on_log(0, ["a line"])
    assert disk.room == 0
    path = directory.path
    (message,) = caplog.messages
    assert message.startswith(f"{path}/metrics.jsonl cannot be written: No space left on device; the run goes on, ")
    events = directory.on_saving()["directory"]["events"]
    disk.room = 10**9
    directory.on_event({"event": "commit", "round": 3})
    directory.on_round(record(3))
    assert caplog.messages[1:] == [f"{path} can be written again"]
    assert [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    lines = (path / "events.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    assert sum(map(len, lines[:3])) == events  # where a run that is resumed goes on
    directory.on_end(summary())
    assert len(caplog.messages) == 2


def test_a_disk_that_stays_full_ends_no_run_and_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr("starling.orchestrator.records.appender.write", Disk(0))
    end = simulate(configuration(rounds=2), run_dir=tmp_path / "run")
    assert (end.status, end.rounds) == ("finished", 2)
    assert (tmp_path / "run" / "model.safetensors").exists()
    said = [message for message in caplog.messages if "No space left" in message]
    assert len(said) == 3
    assert "cannot be written" in said[0]
    lost = f"the end of {tmp_path}/run/{{}}.jsonl is lost: No space left on device"
    assert sorted(said[1:]) == [lost.format("events"), lost.format("metrics")]


def test_what_waits_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Disk(0)
    monkeypatch.setattr("starling.orchestrator.records.appender.write", disk)
    monkeypatch.setattr("starling.orchestrator.records.appender.MOST_PENDING", 10)
    file = Appender(Folder(tmp_path), "log")
    assert isinstance(file.append(b"12345\n"), OSError)
    file.append(b"67890\n")
    assert (file.num_lost, file.num_pending, file.size) == (1, 6, 6)
    disk.room = 100
    assert file.append(b"abc\n") is None
    assert file.close() is None
    assert (tmp_path / "log").read_bytes() == b"12345\nabc\n"


@pytest.mark.parametrize("rounds", [1, 200])
@pytest.mark.parametrize("changes", [{}, {"loss": None}, {"metrics": None}, {"loss": None, "metrics": None}])
def test_a_picture_of_whatever_there_is(tmp_path: Path, rounds: int, changes: dict):
    from starling.orchestrator.records.curves import draw

    draw(tmp_path / "curves.png", started(), [record(number, **changes) for number in range(rounds)])
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.pictures
def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(tmp_path: Path, monkeypatch, caplog):
    def broken(*arguments: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("starling.orchestrator.records.curves.draw", broken)
    directory = RunDirectory(configuration(), tmp_path / "run")
    tell(directory, started(), summary())
    assert caplog.messages == ["curves.png could not be drawn: RuntimeError: no fonts"]


def test_all_observers_hear_of_the_end():
    heard: list[str] = []

    class Broken(Observer):
        def on_end(self, summary: Summary) -> None:
            heard.append("broken")
            raise RunError("broken")

    class Last(Observer):
        def on_end(self, summary: Summary) -> None:
            heard.append("last")

    with pytest.raises(RunError, match="broken"):
        Observers([Broken(), Last()]).on_end(summary())
    assert heard == ["broken", "last"]
