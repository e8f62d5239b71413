"""``starling sweep`` before anything runs: one line for each bad input, exit code 2, and nothing left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from starling.orchestrator.cli.main import app

RUN = """
name: small
rounds: 4
algorithm: fedavg
task: digits
cluster: {nodes: {target: 2}}
tracking: none
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def starling(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="starling")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--space", "fedavg", "--samples", "0"], "--samples 0: must be at least 1"),
        (
            ["--space", "fedavgg", "--samples", "2"],
            "--space fedavgg: no space is called 'fedavgg' (did you mean fedavg",
        ),
        (["--space", "diloco", "--samples", "2"], "--space diloco: algorithm.outer"),
        (["--space", "fedprox", "--samples", "2"], "--space fedprox: algorithm.mu is not a field of fedavg"),
        (
            ["--space", "fedavg", "--samples", "2", "--metric", "loss:up"],
            "--metric loss:up: write it as NAME, NAME:min",
        ),
        (["--space", "fedavg", "--samples", "2", "--confirm", "1"], "--confirm goes with --simulate"),
        (["--space", "fedavg", "--samples", "2", "--max-concurrent", "0"], "--max-concurrent 0: must be at least 1"),
        (
            ["--space", "fedavg", "--samples", "2", "--scheduler", "asha", "--set", "evaluation.every_rounds=0"],
            "--scheduler asha: trials are compared when they are evaluated, and with evaluation.every_rounds: 0",
        ),
        (
            ["--space", "fedavg", "--samples", "2", "--set", "tracking={name: mlflow, uri: 'http://127.0.0.1:1'}"],
            "tracking.uri http://127.0.0.1:1: nothing answers there",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(arguments, line, folder: Path):
    if "diloco" in arguments:
        arguments = [*arguments, "--set", "algorithm=local_sgd"]
    result = starling("sweep", "run.yaml", *arguments)
    assert result.exit_code == 2, result.output
    lines = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert lines[0].startswith(f"error: {line}")
    assert "Traceback" not in result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run.yaml"],
        ["run.yaml", "--space", "fedavg"],
        ["run.yaml", "--space", "fedavg", "--samples", "2", "--scheduler", "luck"],
        ["run.yaml", "--resume", "x"],
        ["--resume", "x", "--samples", "3"],
    ],
)
def test_wrong_usage(arguments):
    assert starling("sweep", *arguments).exit_code == 2


def test_what_is_no_sweep_cannot_be_gone_on_with(folder: Path):
    result = starling("sweep", "--resume", str(folder), "--json")
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["status"] == "failed"
    assert answer["error"].startswith(f"--resume {folder}: is not the directory of a sweep")


def test_a_directory_that_is_in_use(folder: Path):
    (folder / "there").mkdir()
    (folder / "there" / "mine").touch()
    result = starling("sweep", "run.yaml", "--space", "fedavg", "--samples", "2", "--sweep-dir", "there")
    assert result.exit_code == 2
    assert "is in use: it is not empty; name another one, or go on with it" in result.stderr


def test_nothing_is_left_to_send(folder: Path):
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(RUN)
    result = starling("track", "run")
    assert result.exit_code == 2
    assert "has tracking: none; there is nothing to send" in result.stderr
