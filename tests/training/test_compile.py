"""torch.compile: refused where there is nothing to compile with; else a run learns the same to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from starling import simulate
from starling.actors.training import module_init
from starling.orchestrator.errors import SettingsError

BASE: dict[str, Any] = {
    "rounds": 3,
    "algorithm": {"name": "fedavg", "epochs": 1},
    "task": {"name": "digits", "model": {"name": "mlp", "width": 16}},
    "data": {"batch_size": 479},
    "optimizer": {"lr": 0.3, "compile": True},
    "evaluation": {"every_rounds": 0},
    "cluster": {"nodes": {"target": 3}},
    "tracking": "none",
}


def test_without_a_compiler_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module_init.shutil, "which", lambda _: None)
    message = (
        r"optimizer.compile: on a CPU it takes a C\+\+ compiler .*, and there is none; set optimizer.compile: false"
    )
    with pytest.raises(SettingsError, match=message):
        simulate(BASE, run_dir=tmp_path / "run")


def test_without_triton_on_a_gpu_one_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module_init.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="optimizer.compile: on a GPU it takes Triton, and there is none here; set"):
        module_init.compile_in_place(torch.nn.Linear(1, 1), torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor imports what torch itself deprecates
@pytest.mark.timeout(300)
def test_a_compiled_run_learns_the_same(tmp_path: Path):
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = simulate(BASE, run_dir=tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    plain = simulate(BASE, ["optimizer.compile=false"], run_dir=tmp_path / "plain")
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)
    assert compiled.bytes == plain.bytes
