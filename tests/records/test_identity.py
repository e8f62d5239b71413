"""Whose a run directory is: its id stays, its configuration does not change unseen, and others' code is not run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml
from typer.testing import CliRunner

from starling.orchestrator import api, driver
from starling.orchestrator.checkpoints.export import export
from starling.orchestrator.checkpoints.manifest import Manifest, checksum_of, sum_of
from starling.orchestrator.cli import main
from starling.orchestrator.errors import ConfigError, exit_code
from starling.orchestrator.jobs import plan
from starling.orchestrator.records import identity
from starling.orchestrator.records.run_config import configuration
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.sweep import sweep
from tests.conformance import StoppedError, Stopper

BASE: dict[str, Any] = {
    "task": "quadratic",
    "algorithm": {"name": "fedavg", "epochs": 1},
    "optimizer": {"lr": 0.05},
    "rounds": 3,
    "tracking": "none",
    "evaluation": {"every_rounds": 0},
    "cluster": {"nodes": {"target": 2}},
    "checkpoint": {"every_rounds": 1},
}
CODE = """
from pathlib import Path
from starling.actors.tasks.quadratic import Quadratic
Path({ran!r}).write_text("ran")
class Mine(Quadratic):
    pass
"""


def stopped(path: Path, raw: Any = BASE) -> Path:
    with pytest.raises(StoppedError):
        api.simulate(raw, run_dir=path, observers=[Stopper(1)])
    return path


def edit(path: Path, **changes: Any) -> None:
    raw = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(raw | changes))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside no configuration, which leaves a trace when it is imported."""
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{name}.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code")])
    yield name
    sys.modules.pop(name, None)


def forget(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process that stands elsewhere."""
    sys.modules.pop(name, None)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not one.startswith(str(tmp_path))])
    (tmp_path / "ran").unlink(missing_ok=True)


# --- other names -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_under_another_name_of_its_directory(tmp_path: Path):
    whole = api.simulate(BASE, run_dir=tmp_path / "whole")
    path = stopped(tmp_path / "first")
    shutil.move(path, tmp_path / "second")
    summary = api.resume(tmp_path / "second")
    assert (summary.digest, summary.run_id) == (whole.digest, "first")
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    assert api.resume(tmp_path / "third", ["rounds=4"]).rounds == 4
    assert export(tmp_path / "third", 3).run_id == "first"


def test_so_does_one_without_the_file(tmp_path: Path):
    path = stopped(tmp_path / "first")
    (path / "run.json").unlink()
    shutil.move(path, tmp_path / "second")
    assert api.resume(tmp_path / "second").run_id == "first"


@pytest.mark.parametrize("run_id", ["../x", "", "..", "a/b", "a\u0000", None, 7])
def test_an_id_that_leads_elsewhere_is_refused(tmp_path: Path, run_id: Any):
    path = stopped(tmp_path / "run")
    facts = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(facts | {"run_id": run_id}))
    with pytest.raises(ConfigError, match=r"run.json: run_id should be") as error:
        api.resume(path)
    assert exit_code(error.value) == 2


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_configuration_that_was_edited_is_refused_key_by_key(tmp_path: Path):
    path = stopped(tmp_path / "run")
    edit(path, optimizer={"lr": 0.07}, rounds=4, seed=3, checkpoint={"every_rounds": 1, "keep": 5})
    with pytest.raises(ConfigError) as error:
        api.resume(path)
    lines = str(error.value).splitlines()
    assert [line.partition("config.yaml: ")[2].split(",")[0] for line in lines] == [
        "optimizer.lr is 0.07",
        "rounds is 4",
        "seed is 3",
    ]
    assert "give --set rounds=4 if that is meant" in lines[1]
    assert "begin another run" in lines[2]
    edit(path, seed=0)
    with pytest.raises(ConfigError, match="optimizer.lr") as error:
        api.resume(path, ["rounds=4"])
    assert len(str(error.value).splitlines()) == 1
    assert api.resume(path, ["rounds=4", "optimizer.lr=0.07"]).rounds == 4


def test_changes_may_be_accepted_and_are_then_known(tmp_path: Path):
    path = stopped(tmp_path / "run")
    edit(path, optimizer={"lr": 0.07}, rounds=5)
    with pytest.raises(StoppedError):
        api.resume(path, accept_changes=True, observers=[Stopper(2)])
    shutil.rmtree(path / "checkpoints/round-000002", ignore_errors=True)  # it was not saved with them
    assert api.resume(path).rounds == 5


def test_what_says_where_a_run_is_recorded_may_be_edited(tmp_path: Path):
    path = stopped(tmp_path / "run")
    edit(path, name="other", checkpoint={"every_rounds": 2, "keep": 1})
    assert api.resume(path).status == "finished"


# --- trust -----------------------------------------------------------------------------------------------------------


def test_ones_own_run_goes_on_from_anywhere(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch):
    path = stopped(tmp_path / "run", BASE | {"task": f"{module}:Mine"})
    forget(module, monkeypatch, tmp_path)
    assert api.resume(path).status == "finished"
    assert (tmp_path / "ran").exists()


def test_code_that_a_foreign_directory_names_is_not_run(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch):
    path = stopped(tmp_path / "run", BASE | {"task": f"{module}:Mine"})
    done = tmp_path / "done/run"
    shutil.copytree(path, done)
    api.resume(done)
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "somebody else's"))
    forget(module, monkeypatch, tmp_path)
    for act in (
        lambda: api.resume(path),
        lambda: api.replay(done, run_dir=tmp_path / "again"),
        lambda: api.simulate(done / "config.yaml", run_dir=tmp_path / "again"),
        lambda: api.load_model(done),
        lambda: export(done),
        lambda: export(done, 1),
        lambda: configuration(done),
        lambda: api.run(done / "config.yaml", run_dir=tmp_path / "again"),
        lambda: sweep(done / "config.yaml", Options(space="fedavg", samples=1), sweep_dir=tmp_path / "again"),
    ):
        with pytest.raises(ConfigError, match=rf"names '{module}:Mine', and you did not write that.*--trust") as error:
            act()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert api.resume(path, trust=True).status == "finished"
    assert (tmp_path / "ran").exists()
    forget(module, monkeypatch, tmp_path)
    assert export(path).digest is not None  # it was written by this one now


COMMANDS = {
    "check": [],
    "data": [],
    "bandwidth": [],
    "submit": ["--address", "http://127.0.0.1:9", "--no-wait"],
    "run": [],
    "simulate": ["--run-dir", "again"],
    "sweep": ["--space", "fedavg", "--samples", "1", "--simulate", "--sweep-dir", "again"],
    "resume": [],
    "export": [],
    "rebuild": [],
    "track": [],
}


def test_every_command_that_takes_a_configuration_or_a_run_can_be_told_to_trust():
    taking = {
        name
        for name, command in cast("Any", typer.main.get_command(main.app)).commands.items()
        if any(one.param_type_name == "argument" and one.name in ("config", "run_dir") for one in command.params)
    }
    assert taking == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_a_foreign_directory_names(
    command: str, tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
):
    """Not even when one stands in that directory, and the module is there too."""
    path = stopped(tmp_path / "run", BASE | {"task": f"{module}:Mine"})
    (path / f"{module}.py").write_text((tmp_path / "code" / f"{module}.py").read_text())
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "somebody else's"))
    forget(module, monkeypatch, tmp_path)
    monkeypatch.chdir(path)
    given = (
        path / "config.yaml"
        if command in ("check", "data", "bandwidth", "submit", "run", "simulate", "sweep")
        else path
    )
    result = CliRunner().invoke(main.app, [command, str(given), *COMMANDS[command]])
    assert result.exit_code == 2
    assert f"names '{module}:Mine', and you did not write that on this machine" in result.output
    assert "--trust" in result.output
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["check", "data", "bandwidth", "simulate"])
def test_code_of_a_foreign_directory_is_run_when_it_is_trusted(
    command: str, tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
):
    path = stopped(tmp_path / "run", BASE | {"task": f"{module}:Mine"})
    forget(module, monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    extra = COMMANDS[command]
    with monkeypatch.context() as foreign:
        foreign.setenv(identity.STATE_DIR, str(tmp_path / "somebody else's"))
        result = CliRunner().invoke(main.app, [command, str(path / "config.yaml"), "--trust", *extra])
    assert (result.exit_code, (tmp_path / "ran").exists()) == (0, True), result.output


def test_a_job_takes_what_was_decided_here(tmp_path: Path):
    """The head has another key, to which this directory is somebody else's."""
    path = stopped(tmp_path / "work/run")
    for file, is_trusted in ((path / "config.yaml", True), (tmp_path / "work/mine.yaml", False)):
        _, command, _ = plan(driver.resolve(BASE), file, [], tmp_path / "work")
        assert ("--trust" in command) == is_trusted
    with pytest.raises(ConfigError, match="is in runs/, which is not sent"):
        plan(driver.resolve(BASE), tmp_path / "work/runs/one/config.yaml", [], tmp_path / "work")


def test_a_module_inside_of_the_directory_is_not_found(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch):
    path = stopped(tmp_path / "run")
    (path / f"{module}.py").write_text((tmp_path / "code" / f"{module}.py").read_text())
    forget(module, monkeypatch, tmp_path)
    edit(path, task=f"{module}:Mine")
    for act in (lambda: api.resume(path), lambda: api.simulate(path / "config.yaml", run_dir=tmp_path / "again")):
        with pytest.raises(ConfigError, match="--trust"):
            act()
    assert not (tmp_path / "ran").exists()


def forge(path: Path, *, keep_mark: bool) -> None:
    """Make another state of a checkpoint's, with all checksums right, as somebody without the key can."""
    folder = max((path / "checkpoints").iterdir())
    state = json.loads((folder / "state.json").read_text())
    state["controller"]["progress"]["samples"]["drawn"] += 1
    state["sums"]["controller"] = sum_of(state["controller"])
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(data), "checksum": checksum_of(data)}
    del manifest["checksum"]
    if not keep_mark:
        del manifest["mark"]
    (folder / "manifest.json").write_bytes(Manifest.model_validate(manifest).to_bytes())


@pytest.mark.parametrize("keep_mark", [True, False])
def test_a_checkpoint_that_was_edited_is_not_gone_on_from_unasked(tmp_path: Path, keep_mark: bool):
    path = stopped(tmp_path / "run")
    whole = shutil.copytree(path, tmp_path / "whole")
    forge(path, keep_mark=keep_mark)
    number = int(max(one.name for one in (path / "checkpoints").iterdir()).removeprefix("round-"))
    for act in (lambda: api.resume(path), lambda: export(path, number)):
        with pytest.raises(ConfigError, match=r"round-\d+: was edited since it was written, .* --trust") as error:
            act()
        assert "\n" not in str(error.value)
    assert export(path, number, trust=True).run_id == "run"
    assert api.resume(path, trust=True).status == "finished"
    assert api.resume(whole).status == "finished"


def test_a_checkpoint_of_somebody_else_is_taken_over_with_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted before the first checkpoint of its own, the run is not asked about again; edited then, it is."""
    path = stopped(tmp_path / "run")
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "somebody else's"))
    assert not identity.is_ours(path)
    with pytest.raises(StoppedError):
        api.resume(path, ["checkpoint.every_rounds=100"], observers=[Stopper(2)])
    assert identity.is_ours(path)
    edited = shutil.copytree(path, tmp_path / "edited")
    forge(edited, keep_mark=True)
    with pytest.raises(ConfigError, match="was edited since it was written"):
        api.resume(edited)
    assert api.resume(path).status == "finished"


def test_without_a_place_for_a_key_there_are_no_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "file/below"))
    path = stopped(tmp_path / "run")
    assert "mark" not in json.loads((max((path / "checkpoints").iterdir()) / "manifest.json").read_text())
    assert api.resume(path).status == "finished"


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"every_rounds": 1, "uri": "/elsewhere"}},
        {"tracking": {"name": "mlflow", "uri": "sqlite:////elsewhere/x.db"}},
        {"cluster": {"nodes": {"target": 2}, "address": "10.0.0.1:6379"}},
        {"cluster": {"nodes": {"target": 2}, "runtime_env": {"pip": ["evil"]}}},
    ],
)
def test_neither_are_addresses_and_environments_of_others_used(tmp_path: Path, changes: dict[str, Any]):
    path = stopped(tmp_path / "run")
    edit(path, **changes)
    with pytest.raises(ConfigError, match="you did not write that on this machine"):
        api.resume(path)
    assert not Path("/elsewhere").exists()


def test_a_mark_is_of_these_names_alone(tmp_path: Path):
    path = stopped(tmp_path / "run")
    facts = json.loads((path / "run.json").read_text())
    assert identity.is_ours(path)
    (path / "run.json").write_text(json.dumps(facts | {"names": ["evil:Task"]}))
    assert not identity.is_ours(path)
    (path / "run.json").write_text(json.dumps(facts | {"folders": ["/tmp"]}))
    assert not identity.is_ours(path)


def test_the_key_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "state"))
    key = identity._key()
    assert key is not None
    assert identity._key() == key
    assert [one.name for one in (tmp_path / "state").iterdir()] == ["key"]
    assert (tmp_path / "state/key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(identity.STATE_DIR, str(tmp_path / "file/below"))
    assert identity._key() is None
    assert identity._mark(["a:B"], []) == ""
