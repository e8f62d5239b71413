"""The examples are in order, and learn what their comments say; ``cluster/test_examples.py`` runs them on Ray."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from starling import simulate
from starling.algorithms.seeds import generator
from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.config.schema import load
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What examples' scripts write, smaller or elsewhere: by name, the keys that say where it lies."""
    folder = tmp_path_factory.mktemp("written")
    runpy.run_path(str(EXAMPLES / "parquet_data.py"))["main"](folder / "digits.parquet")
    runpy.run_path(str(EXAMPLES / "finetune_model.py"))["main"](folder / "tiny", steps=1, num_files=3)
    return {
        "parquet": [f"task.path={folder}/digits.parquet"],
        "finetune_hf": [f"task.model={folder}/tiny", f"task.corpus={EXAMPLES.parent}/docs"],
    }


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_is_in_order(path: Path, written: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    plan = make_plan(load(path, written.get(path.stem, [])))
    assert plan.runtimes == ["cluster", "simulator"]
    assert plan.name == path.stem


@pytest.mark.parametrize("name", ["fedavg", "dsgd", pytest.param("noniid", marks=pytest.mark.slow), "parquet"])
def test_it_learns_digits(tmp_path: Path, name: str, written: dict[str, list[str]]):
    overrides = ["tracking=none", *written.get(name, [])]
    summary = simulate(EXAMPLES / f"{name}.yaml", overrides, run_dir=tmp_path / "run")
    assert summary.metrics["accuracy"] > (0.9 if name == "noniid" else 0.97)


def test_old_samples_are_rehearsed_ever_more_rarely(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from power_law import PowerLawRehearsal

    sampler = PowerLawRehearsal(new=10, exponent=1.0)
    counts = torch.zeros(40)
    for seed in range(200):
        counts += sampler.order(40, 2, generator(seed)).bincount(minlength=40)
    # In epoch 2 thirty were met; that of age a has the weight 1/(1 + a).
    weights = 1 / (30 - torch.arange(30, dtype=torch.float64))
    expected = 8000 * weights / weights.sum()
    assert int(counts[30:].sum()) == 0
    assert ((counts[:30] - expected).abs() < 5 * expected.sqrt()).all()
