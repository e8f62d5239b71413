"""What people see: a line per round without a terminal, a view in place on one, a summary at the end."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from starling.orchestrator.cli.run_display import Display, LiveDisplay, PlainDisplay, display, print_summary
from starling.orchestrator.runtimes.events import NodeFacts
from starling.orchestrator.tracking.spool import SpoolReader
from tests.observed import configuration, record, started, summary, tell


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Two seconds for each look at the clock."""
    ticks = iter(range(0, 100_000, 2))
    monkeypatch.setattr("starling.orchestrator.cli.run_display.time.monotonic", lambda: float(next(ticks)))


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, force_terminal=terminal, color_system=None), file


def shown(view: Display, file: io.StringIO) -> list[str]:
    tell(view, started(), summary())
    return file.getvalue().splitlines()


def test_the_view_suits_the_output():
    assert isinstance(display(console()[0]), PlainDisplay)
    assert isinstance(display(console(terminal=True)[0]), LiveDisplay)


def test_plain_lines():
    output, file = console()
    assert shown(PlainDisplay(output), file) == [
        "fedavg on digits: 2 nodes on cpu, 1,000 parameters, 4 rounds",
        "/runs/test-1",
        "1 of 4 rounds done  loss 2  2 nodes  8.00 kB  1.5 s  ETA 6.0 s",
        "2 of 4 rounds done  loss 1  eval loss 0.875 (chance 2.303) accuracy 0.5  2 nodes  8.00 kB  1.5 s  ETA 4.0 s",
        "3 of 4 rounds done  loss 0.6667  2 nodes  8.00 kB  1.5 s  ETA 2.0 s",
        "4 of 4 rounds done  loss 0.5  eval loss 0.4375 (chance 2.303) accuracy 0.5  2 nodes  8.00 kB  1.5 s",
    ]


def test_virtual_seconds_are_called_so():
    output, file = console()
    view = PlainDisplay(output)
    view.on_start(started(virtual=True))
    view.on_round(record(0, loss=None))
    assert "2 nodes simulated" in file.getvalue()
    assert "1 of 4 rounds done  2 nodes  8.00 kB  1.5 s virtual  ETA" in file.getvalue()


def test_long_runs_skip_lines_but_not_the_last():
    output, file = console()
    view = PlainDisplay(output)
    view.on_start(started(configuration(rounds=1001)))
    for number in range(1001):
        view.on_round(record(number))
    lines = file.getvalue().splitlines()[2:]
    assert len(lines) == 167
    assert lines[0].startswith("6 of 1,001 rounds done ")
    assert lines[-1].startswith("1,001 of 1,001 rounds done ")


def test_nodes_warnings_are_shown():
    output, file = console()
    node = NodeFacts(1, "pid 1", "cpu", 10, warnings=("no [GPU] visible",))
    PlainDisplay(output).on_start(started(nodes=[node]))
    assert "warning: node 1: no [GPU] visible" in file.getvalue()


def test_a_live_view_shows_the_latest_values():
    output, file = console(terminal=True)
    view = LiveDisplay(output)
    view.open(configuration(), "here")
    view.on_start(started())
    for number in range(3):
        view.on_round(record(number))
    view.note("something [odd]")
    view._live.refresh()
    text = file.getvalue()
    assert "starting 2 nodes here" in text
    assert "3 of 4 rounds done" in text
    assert "training loss    0.6667" in text
    assert "validation loss  0.875  (chance 2.303)  after round 1" in text
    assert "24.0 kB  8.00 kB in this round" in text
    assert "warning: something [odd]" in text
    view.on_end(summary())
    view.stop()
    assert view.summary == summary()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_never_began(terminal: bool):
    output, file = console(terminal=terminal)
    view = display(output)
    view.open(configuration(), "here")
    view.on_end(summary("failed", rounds=0))
    assert "starting 2 nodes here" in file.getvalue()


def test_residuals_that_were_lost_are_in_the_summary():
    output, file = console()
    print_summary(output, summary(lost={"residuals": 2, "residual_norm": 0.25}), configuration())
    assert "lost             2 residuals of norm 0.25" in file.getvalue()


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        ("fedavg", 1, "for nodes that had missed something"),
        ("fedavg", 0, "for nodes that had missed something"),  # those that were late
        ("fedbuff", 0, "of kept copies of the server"),
        ("fedbuff", 1, "of kept copies of the server and for nodes that had missed something"),
    ],
)
def test_what_recovery_was_for(name: str, lost: int, words: str):
    output, file = console()
    ended = summary()
    ended = dataclasses.replace(ended, bytes=ended.bytes | {"recovery": 5000}, nodes=ended.nodes | {"lost": lost})
    print_summary(output, ended, configuration(algorithm=name))
    (line,) = [line for line in file.getvalue().splitlines() if line.startswith("recovery")]
    assert line.split(maxsplit=1)[1] == f"5.00 kB {words}"


def test_the_summary_names_where_to_look(tmp_path: Path):
    output, file = console()
    path = tmp_path / ("a-long-name-" * 8)
    path.mkdir()
    (path / "curves.png").touch()
    end = summary(run_dir=str(path), nodes={"started": 4, "joined": 0, "lost": 1, "drained": 0})
    SpoolReader(path).note(run_id="r", experiment_id="7", ended=True)
    print_summary(output, end, configuration(tracking="mlflow"))
    rows = {line[:17].strip(): line[17:] for line in file.getvalue().splitlines()}
    assert rows["status"] == "finished after 4 rounds"
    assert rows["validation loss"] == "0.4375  (chance 2.303)"
    assert rows["accuracy"] == "0.5"
    assert rows["bytes"] == "32.0 kB payload, 8.00 kB per round"
    assert rows["transport"] == "36.0 kB between processes"
    assert "recovery" not in rows
    assert rows["nodes"] == "4 started, lost 1"
    assert rows["samples"] == "5,600 drawn and committed"
    assert "lost" not in rows
    assert rows["replicas"] == "identical at every commit"
    assert rows["time"] == "7.0 s"
    assert rows["digest"] == "d" * 64
    assert rows["run directory"] == str(path)
    assert rows["curves"] == str(path / "curves.png")
    assert rows["look at it with"].endswith(f"/mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db")
    assert rows["and at"] == "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning"


def test_the_summary_of_an_untracked_or_remote_run(tmp_path: Path):
    output, file = console()
    print_summary(output, summary("interrupted", run_dir=str(tmp_path), digest=None, metrics={}), configuration())
    assert "mlflow" not in file.getvalue()
    assert "interrupted after 4 rounds" in file.getvalue()
    tracking = {"name": "mlflow", "uri": "https://me:secret@example.com"}
    print_summary(output, summary(run_dir=str(tmp_path)), configuration(tracking=tracking))
    assert "tracked in " not in file.getvalue()
    assert f"https://me:***@example.com has nothing of it: starling track {tmp_path}\n" in file.getvalue()
    SpoolReader(tmp_path).note(run_id="r", experiment_id="7")
    print_summary(output, summary(run_dir=str(tmp_path)), configuration(tracking=tracking))
    assert "tracked in       https://me:***@example.com" in file.getvalue()
    assert f"but not all      starling track {tmp_path}\n" in file.getvalue()
    page = "https://me:***@example.com/#/experiments/7/runs?workflowType=machine_learning"
    assert f"look at it at    {page}\n" in file.getvalue()
    assert "mlflow ui" not in file.getvalue()


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((50, 50, 0, 0), "50 drawn and committed"),
        ((50, 44, 6, 0), "50 drawn, 44 committed, 6 redrawn"),
        ((5000, 5000, 0, 7), "5,000 drawn, 5,000 committed, 7 lost"),
        ((2, 0, 2, 0), "2 drawn, 0 committed, 2 redrawn"),
    ],
)
def test_what_is_said_of_samples(counts: tuple[int, ...], said: str):
    output, file = console()
    samples = dict(zip(("drawn", "committed", "redrawn", "lost"), counts, strict=True))
    print_summary(output, summary(samples=samples), configuration())
    assert f"samples          {said}\n" in file.getvalue()
