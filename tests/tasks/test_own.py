"""A user's own task, metric and model, as docs/data.md shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from starling.orchestrator.cli.main import app
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


def shown(head: str) -> str:
    """The block of the page that begins with a line."""
    return next(block for block in re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL) if block.startswith(head))


def simulated(folder: Path, raw: dict[str, object]) -> dict[str, object]:
    (folder / "run.yaml").write_text(yaml.safe_dump(raw | {"tracking": "none", "cluster": {"nodes": {"target": 3}}}))
    result = CliRunner().invoke(app, ["simulate", str(folder / "run.yaml"), "--run-dir", str(folder / "run"), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_task_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = shown("# iris.py")
    (tmp_path / "iris.py").write_text(text)
    assert len([line for line in text[text.index("class Iris") :].splitlines() if line]) == 10
    raw = yaml.safe_load(shown('algorithm: fedavg\ntask: {name: "iris'))
    raw |= {"rounds": 30, "optimizer": {"name": "adamw", "lr": 0.03}}
    assert simulated(tmp_path, raw)["metrics"]["loss"] < 0.4  # type: ignore[index] - a mapping


def test_the_metric_of_the_page_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_metrics.py").write_text(shown("# my_metrics.py"))
    raw = yaml.safe_load(shown("task: {name: digits, extra_metrics")) | {"algorithm": "dsgd", "rounds": 2}
    assert list(simulated(tmp_path, raw)["metrics"]) == ["loss", "accuracy", "top_3", "overconfident"]  # type: ignore[call-overload]
