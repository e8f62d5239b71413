"""Sweeps on Ray: whole runs in placement groups; nothing left behind however they end; gone on with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from starling import run
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import ClusterError, ConfigError
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.sweep import resume_sweep, sweep
from tests.cluster.conftest import Processes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = """
from ray import tune

lr = {"optimizer.lr": tune.loguniform(0.03, 1.0)}
wide = {"optimizer.lr": tune.loguniform(0.0001, 1.0)}
odd = {"optimizer.lr": tune.loguniform(0.03, 1.0), "algorithm.fraction": tune.choice([0.5])}
"""

CONFIG = """
name: swept
rounds: 6
algorithm: diloco
task: digits
optimizer: {name: sgd, lr: 0.1}
evaluation: {every_rounds: 2}
cluster: {address: ADDRESS, nodes: {target: 2}, num_cpus: 0.5, nodes_per_actor: NODES}
tracking: TRACKING
"""


def write(
    folder: Path, *, address: str = "local", tracking: str = "none", rounds: int = 6, nodes_per_actor: int = 2
) -> Path:
    (folder / "spaces.py").write_text(SPACE)
    text = CONFIG.replace("ADDRESS", address).replace("TRACKING", tracking).replace("rounds: 6", f"rounds: {rounds}")
    text = text.replace("NODES", str(nodes_per_actor))
    (folder / "config.yaml").write_text(text.replace("diloco", "{name: diloco, inner_steps: 5}"))
    return folder / "config.yaml"


def left_on_ray() -> list[str]:
    """Actors and placement groups that are there."""
    from ray._private.state import actors
    from ray.util import placement_group_table

    living = [f"actor {one['ActorClassName']}" for one in actors().values() if one["State"] != "DEAD"]
    groups = [f"group {one['state']}" for one in placement_group_table().values() if one["state"] != "REMOVED"]
    return living + groups


def wait_until_nothing_is_left(limit_s: float = 30) -> list[str]:
    deadline = time.monotonic() + limit_s
    while (found := left_on_ray()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.smoke
def test_on_a_shared_ray(tmp_path: Path, shared_ray: str):
    """Trials are the runs that they would be alone, some are stopped, one fails; nothing is left."""
    del shared_ray
    config = resolve(write(tmp_path, address="auto", nodes_per_actor=1))
    options = Options(
        space=f"{tmp_path}/spaces.py:lr", samples=4, scheduler="asha", max_concurrent=2, metrics=("loss", "bytes")
    )
    result = sweep(config, options, sweep_dir=tmp_path / "sweep")
    assert wait_until_nothing_is_left() == []
    ends = [trial.end for trial in result.trials]
    assert ends.count("finished") >= 1
    assert set(ends) <= {"finished", "stopped"}
    assert all(trial.rounds == 6 for trial in result.trials if trial.end == "finished")
    assert all(trial.rounds in (2, 4) for trial in result.trials if trial.end == "stopped")
    assert result.best is not None
    assert result.best in result.front
    best = result.best.first
    alone = run(result.best_config, run_dir=tmp_path / "alone")
    assert alone.digest == (best.summary or {})["digest"]
    assert alone.metrics["loss"] == best.value("loss")
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [
        *("best.yaml", "config.yaml", "results.csv", "run.json", "summary.json", "sweep.json", "sweep.png"),
        *("trials", "trials.jsonl"),
    ]
    # A second look at a sweep that is over runs nothing.
    again = resume_sweep(tmp_path / "sweep")
    assert [trial.end for trial in again.trials] == ends


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, shared_ray: str):
    del shared_ray
    config = resolve(write(tmp_path, address="auto"))
    space = f"{tmp_path}/spaces.py:lr"
    with pytest.raises(ClusterError) as refused:
        sweep(config, Options(space=space, samples=40, max_concurrent=40), sweep_dir=tmp_path / "many")
    assert str(refused.value).startswith("--max-concurrent 40: 16 trials fit at a time, each of which asks for 1 CPU")
    with pytest.raises(ConfigError) as refused:
        sweep(config, Options(space=space, samples=2, metrics=("los",)), sweep_dir=tmp_path / "metric")
    assert str(refused.value) == "--metric los: the runs do not report it (did you mean loss?)"
    with pytest.raises(ConfigError) as refused:
        sweep(config, Options(space=f"{tmp_path}/spaces.py:odd", samples=2), sweep_dir=tmp_path / "key")
    assert str(refused.value).startswith(f"--space {tmp_path}/spaces.py:odd: algorithm.fraction is not a field")
    assert not (tmp_path / "key").exists()
    assert wait_until_nothing_is_left() == []


@pytest.mark.long
def test_a_population_clones_through_checkpoints(tmp_path: Path, shared_ray: str):
    del shared_ray
    (tmp_path / "met").mkdir()
    # Of trials that come one after the other none is behind.
    together = {"name": "tests.cluster.programs:Meeting", "folder": str(tmp_path / "met"), "runs": 4}
    path = write(tmp_path, address="auto", rounds=8)
    config = resolve(yaml.safe_load(path.read_text()) | {"algorithm": together})
    options = Options(space=f"{tmp_path}/spaces.py:wide", samples=4, scheduler="pbt")
    result = sweep(config, options, sweep_dir=tmp_path / "sweep")
    assert wait_until_nothing_is_left() == []
    assert [trial.end for trial in result.trials] == ["finished"] * 4
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    changed = {line["trial"] for line in lines if "change" in line}
    assert changed
    for number in changed:
        folder = tmp_path / "sweep" / "trials" / f"trial-{number:04}"
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        resumed = [event for event in events if event["event"] == "resume"]
        assert resumed
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.long
def test_a_trial_whose_controller_dies_goes_on(tmp_path: Path, shared_ray: str):
    from ray._private.state import actors

    from starling.orchestrator.sweeps.tune import Watcher

    del shared_ray
    config = resolve(write(tmp_path, address="auto", rounds=8), ["checkpoint.every_rounds=1"])
    killed: list[int] = []

    class Killer(Watcher):
        """Kills the process of the controller at the trial's second report, after the fourth round."""

        def on_report(self, trial):
            if trial.rounds == 4 and not killed:
                living = [one for one in actors().values() if one["State"] == "ALIVE"]
                (controller,) = [one["Pid"] for one in living if one["ActorClassName"] == "StarlingTrial"]
                killed.append(controller)
                os.kill(controller, signal.SIGKILL)

    # With a scheduler a trial waits at its reports.
    options = Options(space=f"{tmp_path}/spaces.py:lr", samples=1, scheduler="asha")
    result = sweep(config, options, sweep_dir=tmp_path / "sweep", watcher=lambda *_: Killer())
    assert killed
    assert [trial.end for trial in result.trials] == ["finished"]
    folder = tmp_path / "sweep" / "trials" / "trial-0000"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event["round"] for event in events if event["event"] == "resume"]
    assert 0 <= resumed < 3
    alone = run(result.best_config, run_dir=tmp_path / "alone")
    assert alone.digest == (result.trials[0].summary or {})["digest"]
    assert wait_until_nothing_is_left() == []


def start(processes: Processes, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return processes.start(
        "sweep",
        str(folder / "config.yaml"),
        "--space",
        "spaces.py:lr",
        "--sweep-dir",
        "sweep",
        "--json",
        *arguments,
        cwd=folder,
        **environment,
    )


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_one_that_is_ended_leaves_nothing_and_goes_on(tmp_path: Path, processes: Processes, number: int):
    from mlflow import MlflowClient

    write(tmp_path, rounds=40, tracking=f"{{name: mlflow, uri: 'sqlite:///{tmp_path}/mlflow.db'}}")
    (tmp_path / "config.yaml").write_text(
        (tmp_path / "config.yaml").read_text().replace("every_rounds: 2", "every_rounds: 10")
        + "checkpoint: {every_rounds: 2}\n"
    )
    program = start(processes, tmp_path, "--samples", "2", "--max-concurrent", "1")
    trial = tmp_path / "sweep" / "trials" / "trial-0000"
    deadline = time.monotonic() + 300
    while len(list(trial.glob("checkpoints/*/manifest.json"))) < 3 and time.monotonic() < deadline:
        assert program.poll() is None, program.communicate()[1]
        time.sleep(0.05)
    program.send_signal(number)
    out, err = program.communicate(timeout=120)
    if number == signal.SIGINT:
        assert processes.wait_until_gone() == []
        assert program.returncode == 130, err
        assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
        assert "Traceback" not in err
        assert processes.temporary_files() == []
    done = len((trial / "metrics.jsonl").read_text().splitlines())
    assert 2 < done < 40
    again = processes.start("sweep", "--resume", "sweep", "--json", cwd=tmp_path)
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert [one["status"] for one in answer["trials"]] == ["finished", "finished"], answer["trials"]
    events = [json.loads(line) for line in (trial / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["round"] > 0
    assert len((trial / "metrics.jsonl").read_text().splitlines()) == 40
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("starling").experiment_id])
    assert sorted(one.info.run_name for one in runs) == ["sweep", "trial-0000", "trial-0001"]
    assert {one.info.status for one in runs} == {"FINISHED"}
    assert processes.wait_until_gone(limit_s=100) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_one_whose_own_ray_is_gone_says_so_and_goes_on(tmp_path: Path, processes: Processes, number: int):
    path = write(tmp_path, rounds=3000)
    path.write_text(path.read_text() + "checkpoint: {every_rounds: 2}\n")
    program = start(processes, tmp_path, "--samples", "2", "--max-concurrent", "1", "--set", "cluster.cancel_grace_s=1")
    trial = tmp_path / "sweep" / "trials" / "trial-0000"
    deadline = time.monotonic() + 300
    while not list(trial.glob("checkpoints/*/manifest.json")) and time.monotonic() < deadline:
        assert program.poll() is None, program.communicate()[1]
        time.sleep(0.05)
    os.kill(processes.of_ray(program, "raylet"), number)
    out, err = program.communicate(timeout=150)
    assert program.returncode == 3, err
    said = "error: the sweep's own Ray is gone: its raylet ended; starling sweep --resume goes on"
    assert err.splitlines()[-1] == said
    answer = json.loads(out.splitlines()[-1])
    assert answer["status"] == "failed"
    assert {one["status"] for one in answer["trials"]} == {"unfinished"}, "they go on another time"
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real ``mlflow server`` on loopback, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"sqlite:///{self._folder}/server.db"
        arguments = ["server", "--backend-store-uri", store, "--artifacts-destination", str(self._folder / "artifacts")]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server does not come up")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path):
    one = Server(tmp_path)
    one.start()
    yield one
    one.kill()


@pytest.mark.long
def test_a_tracker_that_goes_away_and_comes_back_has_all(tmp_path: Path, server: Server, monkeypatch):
    """A simulated sweep whose tracker is killed in the middle, and comes back before the end."""
    import mlflow.pytorch
    import torch
    from mlflow import MlflowClient

    from starling import load_model
    from starling.orchestrator.sweeps.tune import Watcher

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri = f"http://127.0.0.1:{server.port}"
    write(tmp_path, tracking=f"{{name: mlflow, uri: '{uri}'}}")
    config = resolve(tmp_path / "config.yaml", ["algorithm=fedavg"])

    class Killer(Watcher):
        """Kills the tracker when the second trial is over, and starts it again after the fourth."""

        ended = 0

        def on_trial_end(self, trial):
            self.ended += 1
            if self.ended == 2:
                server.kill()
            if self.ended == 4:
                server.start()

    options = Options(space=f"{tmp_path}/spaces.py:lr", samples=6, simulate=True, max_concurrent=1)
    result = sweep(config, options, sweep_dir=tmp_path / "sweep", watcher=lambda *_: Killer())
    assert [trial.end for trial in result.trials] == ["finished"] * 6
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("starling").experiment_id])
    by_name = {one.info.run_name: one for one in runs}
    assert sorted(by_name) == ["sweep", *(f"trial-{number:04}" for number in range(6))]
    assert len(runs) == 7
    parent = by_name.pop("sweep")
    assert parent.info.status == "FINISHED"
    assert result.best is not None
    for name, one in by_name.items():
        assert one.info.status == "FINISHED"
        tags = {"mlflow.parentRunId": parent.info.run_id, "algorithm": "fedavg", "task": "digits", "nodes": "2"}
        assert one.data.tags.items() >= (tags | {"faults": "none"}).items()
        history = client.get_metric_history(one.info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(6)), name
    best = by_name[result.best.first.name]
    mlflow.set_tracking_uri(uri)
    module = mlflow.pytorch.load_model(f"runs:/{best.info.run_id}/model")
    ours = load_model(tmp_path / "sweep" / "trials" / result.best.first.name)
    inputs = torch.rand(5, 64)
    assert torch.allclose(module(inputs), ours(inputs), atol=1e-6)


@pytest.mark.long
def test_a_simulated_sweep_is_confirmed_on_the_cluster(tmp_path: Path, processes: Processes):
    path = write(tmp_path)
    # Relative to where the sweep is started, for the first trial of an actor and for those after it.
    (tmp_path / "book.txt").write_text("".join(f"{number} is {number**2} by itself. " for number in range(1000)))
    task = {"name": "text_lm", "corpus": "book.txt", "context": 16, "model": {"layers": 1, "width": 16, "heads": 2}}
    config = yaml.safe_load(path.read_text()) | {"task": task}
    config["evaluation"]["max_batches"] = 2
    path.write_text(yaml.safe_dump(config))
    program = start(
        processes, tmp_path, "--samples", "4", "--seeds", "2", "--search", "optuna", "--simulate", "--confirm", "1"
    )
    out, err = program.communicate(timeout=400)
    assert program.returncode == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert [one["stage"] for one in answer["trials"]] == ["search"] * 8 + ["confirm"] * 2
    assert {one["status"] for one in answer["trials"]} == {"finished"}
    best, there = answer["best"], answer["confirmed"][0]
    digests = {one["trial"]: one["digest"] for one in answer["trials"]}
    assert [digests[number] for number in best["trials"]] == [digests[number] for number in there["trials"]]
    assert best["deviations"]["loss"] > 0
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []
