"""Resuming on Ray: whatever ended the controller, the run goes on, and ends with the bits of the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from starling.orchestrator import api
from tests.cluster.test_processes import wait_for
from tests.control.test_resume import Interrupter, lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starling.orchestrator.config.schema import Config
    from tests.cluster.conftest import Processes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EACH_ROUND = "checkpoint.every_rounds=1"
ADAM = "optimizer={name: adamw, lr: 0.01}"
TEXT = """
name: killed
rounds: 40
algorithm: {name: diloco, inner_steps: 100}
task: digits
optimizer: {name: adamw, lr: 0.01}
cluster: {nodes: {target: 3}}
evaluation: {every_rounds: 0}
checkpoint: {every_rounds: 2}
"""


def interrupted(config: Config, path: Path, after: int) -> Path:
    with contextlib.suppress(KeyboardInterrupt):
        api.run(config, run_dir=path, observers=[Interrupter(after)])
    assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    return path


def test_an_interrupted_run_goes_on_with_the_same_bits(config: Callable[..., Config], tmp_path: Path):
    settings = config(
        {"name": "streaming_diloco", "inner_steps": 4, "fragments": 2, "pattern": "size"}, "rounds=6", ADAM
    )
    path = interrupted(settings, tmp_path / "run", after=2)
    summary = api.resume(path)
    assert summary.digest == api.simulate(settings, run_dir=tmp_path / "simulated").digest
    assert [event["round"] for event in lines(path) if event["event"] == "resume"] == [2]


@pytest.mark.slow
def test_an_asynchronous_run_goes_on_and_is_replayed(config: Callable[..., Config], tmp_path: Path):
    # Large messages too: what waits in a box is in the store.
    settings = config(
        {"name": "fedbuff", "buffer_size": 2, "steps": 4},
        *("rounds=10", EACH_ROUND, "task={name: digits, model: {name: mlp, width: 300}}"),
    )
    path = interrupted(settings, tmp_path / "run", after=4)
    summary = api.resume(path)
    assert (summary.status, summary.rounds) == ("finished", 10)
    assert api.replay(path, run_dir=tmp_path / "again").digest == summary.digest


@pytest.mark.slow
@pytest.mark.long
def test_with_more_nodes_and_after_a_loss(config: Callable[..., Config], tmp_path: Path):
    kill = json.dumps([{"kind": "kill", "node": 1, "round": 1, "phase": "train"}])
    keys = [f"faults.events={kill}", "cluster.nodes_per_actor=1", "cluster.nodes.target=3"]
    path = interrupted(config("diloco", "rounds=8", EACH_ROUND, "algorithm.inner_steps=4", *keys), tmp_path / "run", 3)
    summary = api.resume(path, ["cluster.nodes.target=4"])
    assert (summary.status, summary.nodes["lost"], summary.replicas) == ("finished", 1, "identical")
    assert [event["view"] for event in lines(path) if event["event"] == "begin"][-1] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.smoke), pytest.param(3, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(kills: int, tmp_path: Path, processes: Processes):
    from mlflow import MlflowClient

    rng = random.Random(0)
    # Killed while it makes its tables, MLflow leaves a database that it cannot use any more; they are made before.
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    (tmp_path / "config.yaml").write_text(TEXT)
    path = tmp_path / "run"
    arguments: tuple[str, ...] = ("run", str(tmp_path / "config.yaml"), "--run-dir", str(path), "--json")
    for text in ("3 of 40 rounds done", "  loss ", "  loss ")[:kills]:
        program = processes.start(*arguments, cwd=tmp_path)
        wait_for(program, text)
        time.sleep(rng.uniform(0.0, 0.5))
        program.kill()
        program.communicate(timeout=30)
        deadline = time.monotonic() + 30
        while (orphans := [name for name in processes.alive() if "NodeActor" in name]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert orphans == []
        arguments = ("resume", str(path), "--json")
    program = processes.start(*arguments, cwd=tmp_path)
    out, err = program.communicate(timeout=200)
    assert program.returncode == 0, err
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    whole = api.simulate(tmp_path / "config.yaml", ["tracking=none"], run_dir=tmp_path / "simulated")
    assert answer["digest"] == whole.digest
    names = "undone.jsonl", "events.jsonl"
    resumed = [event["round"] for name in names for event in lines(path, name) if event["event"] == "resume"]
    assert len(resumed) == kills
    assert 1 <= min(resumed) <= max(resumed) < 39
    # Ray's agents first try to tell the dead drivers of their raylets' deaths, which can take them half a minute.
    assert processes.wait_until_gone(limit_s=100) == []
    assert processes.temporary_files() == []  # who was killed could not remove its own
    (run,) = client.search_runs([client.get_experiment_by_name("starling").experiment_id])
    assert run.info.status == "FINISHED"
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")} == set(range(40))


@pytest.mark.slow
def test_sigterm_saves_and_exits_130(tmp_path: Path, processes: Processes):
    (tmp_path / "config.yaml").write_text(TEXT.replace("every_rounds: 2}", "every_rounds: 100}") + "tracking: none\n")
    path = tmp_path / "run"
    program = processes.start("run", str(tmp_path / "config.yaml"), "--run-dir", str(path), "--json", cwd=tmp_path)
    wait_for(program, "3 of 40 rounds done")
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=90)
    assert program.returncode == 130, err
    answer = json.loads(out.splitlines()[-1])
    assert answer["checkpoints"]["last_round"] == answer["rounds"] - 1 >= 2
    assert f"starling resume {path}" in err
