"""Where training begins, and a finished model as a module again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from starling import load_model, simulate
from starling.actors.training.weights import load_into, read_weights
from starling.algorithms.errors import DataError
from starling.orchestrator.errors import ConfigError

BASE: dict[str, Any] = {
    "rounds": 2,
    "algorithm": "fedavg",
    "task": {"name": "digits", "model": {"name": "cnn", "width": 4}},
    "optimizer": {"lr": 0.2},
    "evaluation": {"every_rounds": 0},
    "cluster": {"nodes": {"target": 2}},
    "tracking": "none",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "run"
    simulate(BASE, run_dir=path)
    return path


def test_a_model_is_loaded_back(finished: Path):
    model = load_model(finished)
    assert not model.training
    saved = load_file(finished / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert model(torch.zeros(2, 64)).shape == (2, 10)


@pytest.mark.parametrize("form", ["directory", "file", "uri", "directory uri"])
def test_a_run_begins_where_another_ended(finished: Path, tmp_path: Path, form: str):
    place = {
        "directory": str(finished),
        "file": str(finished / "model.safetensors"),
        "uri": f"file://{finished}/model.safetensors",
        "directory uri": f"file://{finished}",
    }[form]
    # With a learning rate of nothing, it ends where it began: the statistics of batches are the only thing that moves.
    raw = BASE | {"rounds": 1, "optimizer": {"lr": 1e-30}, "task": BASE["task"] | {"init_from": place}}
    simulate(raw, run_dir=tmp_path / "run")
    before, after = (load_file(path / "model.safetensors") for path in (finished, tmp_path / "run"))
    for name, tensor in before.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, after[name]), name
    # What it began from need not be there any more.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(place, "/gone"))
    assert torch.equal(load_model(tmp_path / "run").state_dict()["output.weight"], after["output.weight"])


def test_buffers_come_along(finished: Path):
    module = load_model(finished)
    other = simulate_module()
    load_into(other, read_weights("key", str(finished)), "key", "there")
    assert torch.equal(other.state_dict()["first.norm.running_mean"], module.state_dict()["first.norm.running_mean"])
    assert float(other.state_dict()["first.norm.running_mean"].abs().sum()) > 0


def simulate_module(width: int = 4) -> torch.nn.Module:
    from starling.actors.tasks.digits import DigitsCNN

    return DigitsCNN(width=width).build()


def test_what_is_wrong_is_said_in_a_line(finished: Path, tmp_path: Path):
    saved = load_file(finished / "model.safetensors")
    fewer = {name: one for name, one in saved.items() if not name.startswith("output")}
    save_file(fewer, tmp_path / "fewer.safetensors")
    save_file(saved | {"more": torch.zeros(1)}, tmp_path / "more.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "nowhere", "task.init_from: .*/nowhere does not exist here; name a safetensors file, or a run's"),
        (tmp_path / "empty", "task.init_from: .*/empty has no model.safetensors; name a finished run's directory"),
        (tmp_path / "text.safetensors", "task.init_from: .*/text.safetensors is not a safetensors file"),
        (tmp_path / "fewer.safetensors", "fewer.safetensors lacks output.bias and 1 more; it is of another model than"),
        (tmp_path / "more.safetensors", "more.safetensors has more, which the model has not; it is of another model"),
        (f"file://{tmp_path}/nowhere", "task.init_from: file://.*/nowhere cannot be read"),
        ("foo://bar", "task.init_from: foo://bar cannot be read: Unrecognized filesystem type"),
    ):
        raw = BASE | {"task": BASE["task"] | {"init_from": str(place)}}
        with pytest.raises(DataError, match=message) as caught:
            simulate(raw, run_dir=tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_a_model_of_another_size_is_refused(finished: Path, tmp_path: Path):
    raw = BASE | {"task": {"name": "digits", "model": {"name": "cnn", "width": 8}, "init_from": str(finished)}}
    message = (
        r"first.convolution.weight is \[4, 1, 3, 3\] in .* and \[8, 1, 3, 3\] in the model .another vocabulary, or"
    )
    with pytest.raises(DataError, match=message):
        simulate(raw, run_dir=tmp_path / "run")


def test_load_model_of_what_is_no_run(tmp_path: Path, finished: Path):
    with pytest.raises(ConfigError, match=r"this is no run directory \(it has no config.yaml\)"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(DataError, match="run directory: .* has no model.safetensors; name a finished run's directory"):
        load_model(tmp_path)
