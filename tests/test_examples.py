"""The examples are in order, and learn what their comments say; ``cluster/test_examples.py`` runs them on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import simulate
from orchestrator.config import load
from orchestrator.plan import make_plan

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_is_in_order(path: Path):
    plan = make_plan(load(path))
    assert plan.runtimes == ["cluster", "simulator"]
    assert plan.name == path.stem


@pytest.mark.parametrize("name", ["fedavg", "dsgd"])
def test_it_learns_digits(tmp_path: Path, name: str):
    summary = simulate(EXAMPLES / f"{name}.yaml", ["tracking=none"], run_dir=tmp_path / "run")
    assert summary.metrics["accuracy"] > 0.97
