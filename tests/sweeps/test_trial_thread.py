"""A run in a thread, as a sweep drives it: report by report, stopped while it waits and while it computes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from starling import simulate
from starling.orchestrator.errors import DataError
from starling.orchestrator.sweeps.trial_thread import TrialRun, reports_of
from tests.observed import configuration


def begin(folder: Path, *, stepwise: bool, rounds: int = 6, **changes) -> TrialRun:
    config = configuration(rounds=rounds, tracking="none", evaluation={"every_rounds": 2}, **changes)
    return TrialRun(
        lambda observer: simulate(config, run_dir=folder / "run", observers=[observer]),
        rounds,
        stepwise=stepwise,
        stop_file=folder / ".stop",
    )


def test_reports_come_one_by_one_and_the_run_waits_between(tmp_path: Path):
    run = begin(tmp_path, stepwise=True)
    reports = [run.next(), run.next()]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    reports.append(run.next())
    assert [report["rounds"] for report in reports] == [2, 4, 6]
    assert [report.get("done") for report in reports] == [None, None, True]
    last = reports[-1]
    assert last["end"] == "finished"
    assert last["error"] is None
    assert last["loss"] == last["summary"]["metrics"]["loss"]
    assert last["bytes"] == last["summary"]["bytes"]["payload"]
    assert set(last["reported"]) == {"rounds", "loss", "accuracy", "train_loss", "bytes", "seconds"}
    run.stop()


def test_what_nobody_asked_for_in_time_is_there_afterwards(tmp_path: Path):
    run = begin(tmp_path, stepwise=False)
    last = run.next()
    while not last.get("done"):
        last = run.next()
    reports = reports_of(tmp_path / "run")
    assert [report["rounds"] for report in reports] == [2, 4, 6]
    assert all(reports[-1][name] == last[name] for name in last["reported"])
    run.stop()


def test_without_a_scheduler_only_the_end_is_waited_for(tmp_path: Path):
    assert begin(tmp_path, stepwise=False).next()["rounds"] in (2, 4, 6)


def test_a_run_that_waits_is_stopped_and_closed(tmp_path: Path):
    run = begin(tmp_path, stepwise=True)
    run.next()
    run.stop()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    last = run.next()
    assert last["end"] == "interrupted"
    assert last["rounds"] == 2
    assert not [one for one in threading.enumerate() if one.name == "starling-trial"]


def test_a_run_that_computes_is_stopped_by_the_file(tmp_path: Path):
    run = begin(tmp_path, stepwise=False, rounds=100_000)
    report = run.next()
    (tmp_path / ".stop").touch()
    while not report.get("done"):
        report = run.next()
    assert report["end"] == "interrupted"
    assert 0 < report["rounds"] < 100_000
    assert not [one for one in threading.enumerate() if one.name == "starling-trial"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("the data are not there\nand more"), "the data are not there"),
        (ZeroDivisionError("oh"), "ZeroDivisionError: oh"),
    ],
)
def test_a_run_that_fails_says_why_in_a_line(tmp_path: Path, error, line):
    def train(_):
        raise error

    report = TrialRun(train, 3, stepwise=True, stop_file=tmp_path / ".stop").next()
    assert report == {"done": True, "end": "failed", "error": line, "summary": None}
