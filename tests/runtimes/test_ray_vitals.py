"""Processes that a run cannot do without: ended, stopped, and going on again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from starling.orchestrator.runtimes.cluster.vitals import Vitals, state_of


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("starling.orchestrator.runtimes.cluster.vitals._PERIOD_S", 0.01)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    one = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield one
    one.kill()
    one.communicate()


def test_one_that_ends_is_told_of_once(process: subprocess.Popen[bytes]):
    told: list[str] = []
    ended = threading.Event()

    def on_end(name: str) -> None:
        told.append(name)
        ended.set()

    vitals = Vitals({"raylet": process.pid}, 60.0, on_end)
    assert not ended.wait(0.05)
    process.kill()
    assert ended.wait(30)
    vitals.stop()
    assert told == ["raylet"]


def test_one_that_is_stopped_is_said_and_one_that_stays_so_is_ended(
    process: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
):
    ended = threading.Event()
    vitals = Vitals({"gcs_server": process.pid}, 0.2, lambda _: ended.set())
    os.kill(process.pid, signal.SIGSTOP)
    assert ended.wait(30)
    vitals.stop()
    assert f"Ray's gcs_server (process {process.pid}) is stopped" in caplog.text


def test_one_that_goes_on_is_left_alone(process: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture):
    vitals = Vitals({"raylet": process.pid}, 60.0, lambda _: None)
    for number, said in ((signal.SIGSTOP, "is stopped"), (signal.SIGCONT, "goes on")):
        os.kill(process.pid, number)
        for _ in range(3000):
            if said in caplog.text:
                break
            threading.Event().wait(0.01)
        assert said in caplog.text
    assert state_of(process.pid) not in (None, "Z")
    vitals.stop()


def test_one_that_is_stopped_is_not_waited_for_when_all_is_to_end(process: subprocess.Popen[bytes]):
    vitals = Vitals({"raylet": process.pid}, 600.0, lambda _: None)
    os.kill(process.pid, signal.SIGSTOP)
    vitals.hasten()
    assert process.wait(30) == -signal.SIGKILL
    vitals.stop()
