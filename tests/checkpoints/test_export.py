"""A run's model for others: the same bits as the run's own, in each form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from starling import load_model, simulate
from starling.actors.replica.digest import digest_tensors
from starling.actors.tasks.digits import Digits
from starling.orchestrator.checkpoints.export import export
from starling.orchestrator.cli.main import app
from starling.orchestrator.errors import ConfigError
from tests.cases import CASES
from tests.conformance import Case

BASE: dict[str, Any] = {
    "rounds": 4,
    "algorithm": {"name": "dsgd", "steps": 2},
    "task": {"name": "digits", "model": {"name": "cnn", "width": 4}},
    "optimizer": {"lr": 0.2},
    "evaluation": {"every_rounds": 0},
    "checkpoint": {"every_rounds": 1, "keep": 2},
    "cluster": {"nodes": {"target": 3}},
    "tracking": "none",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    simulate(BASE, run_dir=path)
    return path


def digest_of(path: Path) -> str:
    return json.loads((path / "summary.json").read_text())["digest"]


QUICK = {"diloco", "streaming_diloco", "dsgd", "fedbuff", "async_diloco", "random_walk"}
"""One for each way in which a run comes to its model."""


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=one.name, marks=() if one.name in QUICK else pytest.mark.slow) for one in CASES]
)
def test_a_checkpoint_has_the_model_that_the_run_would_end_with(case: Case, tmp_path: Path):
    more = {"rounds": 3, "evaluation": {"every_rounds": 0}, "checkpoint": {"every_rounds": 1}, "tracking": "none"}
    summary = simulate(case.config | more, run_dir=tmp_path / "run")
    assert export(tmp_path / "run", 2).digest == summary.digest


def test_the_final_model(finished: Path, tmp_path: Path):
    exported = export(finished)
    assert (exported.run_id, exported.round, exported.nodes) == ("run", None, None)
    assert exported.path == str(finished / "exported/model.safetensors")
    assert exported.digest == digest_of(finished) == digest_tensors(load_file(exported.path))
    named = export(finished, to=tmp_path / "deep/er/mine.safetensors")
    assert named.path == str(tmp_path / "deep/er/mine.safetensors")
    assert export(finished, to=tmp_path).path == str(tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "model.safetensors"]


def test_the_mean_of_what_nodes_have(finished: Path):
    exported = export(finished, 3)
    assert exported.nodes == 3
    assert exported.digest == digest_of(finished)
    earlier = export(finished, 2)
    assert earlier.path == str(finished / "exported/model-round-000002.safetensors")
    assert earlier.digest != exported.digest
    tensors = load_file(earlier.path)
    assert digest_tensors(tensors) == earlier.digest
    assert tensors.keys() == load_file(finished / "model.safetensors").keys()


@pytest.mark.parametrize("number", [None, 3])
def test_a_state_dict(finished: Path, number: int | None):
    exported = export(finished, number, "torch")
    state = torch.load(exported.path, weights_only=True)
    assert type(state) is dict
    module = load_model(finished)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensor in module.state_dict().values():
        tensor.zero_()
    module.load_state_dict(state)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_neither_data_nor_beginning_need_be_there(finished: Path, tmp_path: Path, monkeypatch):
    beginning = tmp_path / "first.safetensors"
    save_file(load_file(finished / "model.safetensors"), beginning)
    raw = BASE | {"task": BASE["task"] | {"init_from": str(beginning)}}
    summary = simulate(raw, run_dir=tmp_path / "run")
    beginning.unlink()

    def gone(self: Any, num_nodes: int) -> Any:
        raise AssertionError("data are read")

    monkeypatch.setattr(Digits, "train_samples", gone)
    monkeypatch.setattr(Digits, "validation_samples", gone)
    assert export(tmp_path / "run", 3, "torch").digest == summary.digest


def test_a_run_that_has_not_ended(finished: Path, tmp_path: Path):
    shutil.copytree(finished / "checkpoints", tmp_path / "run/checkpoints")
    shutil.copy(finished / "config.yaml", tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"has not ended with a model; --round 3 exports a checkpoint's; there are 2, 3"
    ):
        export(tmp_path / "run")
    assert export(tmp_path / "run", 3).digest == digest_of(finished)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match="has not ended with a model; and there is no checkpoint of it"):
        export(tmp_path / "run")


def test_a_directory_that_was_moved(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "copy")
    assert export(tmp_path / "copy", 3).run_id == "run"
    (tmp_path / "copy/summary.json").unlink()
    assert export(tmp_path / "copy", 3).run_id == "run"
    (tmp_path / "copy/run.json").unlink()
    assert export(tmp_path / "copy", 3).run_id == "copy"


# --- the command ----------------------------------------------------------------------------------------------------


def starling(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="starling")


def refused(*arguments: object) -> str:
    result = starling("export", *arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("error: ")


def test_the_command(finished: Path, tmp_path: Path):
    result = starling("export", finished, "--round", 2, "--format", "torch", "--to", tmp_path / "m.pt", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer == {
        "status": "ok",
        "run_id": "run",
        "round": 2,
        "format": "torch",
        "path": str(tmp_path / "m.pt"),
        "nodes": 3,
        "digest": answer["digest"],
        "error": None,
    }
    shown = starling("export", finished, "--round", 2).stdout
    assert "the model of the checkpoint of round 2, the mean of 3 nodes'" in shown
    assert answer["digest"] in shown
    assert "model-round-000002.safetensors" in shown
    assert "the final model" in starling("export", finished).stdout


def test_bad_input_is_refused_in_one_line(finished: Path, tmp_path: Path):
    assert refused(tmp_path).endswith(": this is no run directory (it has no config.yaml)")
    assert refused(finished, "--round", 1).endswith(
        "there is no checkpoint of round 1; there are rounds 2, 3, counted from 0"
    )
    assert refused(finished, "--format", "hf").startswith(
        "--format hf: the task digits has no form that Hugging Face's"
    )
    (tmp_path / "file").write_text("x")
    assert refused(finished, "--to", tmp_path / "file/model.safetensors").endswith(": Not a directory")
    for form in ("safetensors", "torch"):
        assert "cannot be written: " in refused(finished, "--format", form, "--to", f"/proc/model.{form}")
    state = finished / "checkpoints/round-000002/state.json"
    good = state.read_bytes()
    state.write_bytes(good[:-1])
    try:
        message = refused(finished, "--round", 2)
    finally:
        state.write_bytes(good)
    assert message.endswith(f"state.json: has {len(good) - 1} of {len(good)} bytes; there are also round 3")
    assert starling("export", finished, "--format", "onnx").exit_code == 2
