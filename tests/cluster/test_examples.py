"""The examples, as the README says them: a Ray of their own, tracked in MLflow, and the simulator's bits."""

import json
from pathlib import Path

import pytest

from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.driver import resolve
from tests.cluster.conftest import Processes
from tests.paths import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def finish(processes: Processes, folder: Path, *arguments: str) -> dict:
    program = processes.start(*arguments, "--json", cwd=folder)
    out, err = program.communicate(timeout=280)
    assert program.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fedavg", marks=[pytest.mark.slow, pytest.mark.smoke]),
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in ("diloco", "dsgd")),
    ],
)
def test_an_example_runs_and_equals_its_simulation(tmp_path, processes: Processes, name: str):
    path = str(ROOT / f"examples/{name}.yaml")
    real = finish(processes, tmp_path, "run", path, "--run-dir", "runs/real")
    simulated = finish(processes, tmp_path, "simulate", path, "--run-dir", "runs/simulated")
    assert real["status"] == simulated["status"] == "finished"
    assert real["digest"] == simulated["digest"]
    assert real["metrics"] == simulated["metrics"]
    assert real["bytes"]["payload"] == simulated["bytes"]["payload"]
    assert real["bytes"]["per_round"] == make_plan(resolve(path)).payload_bytes["per_round"]
    assert simulated["virtual_seconds"] > 0
    assert real["virtual_seconds"] is None
    assert (tmp_path / "runs/mlflow.db").exists()
    assert (tmp_path / "runs/real/model.safetensors").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.long
def test_the_asynchronous_example_is_replayed_to_its_digest(tmp_path, processes: Processes):
    path = str(ROOT / "examples/fedbuff.yaml")
    real = finish(processes, tmp_path, "run", path, "--run-dir", "runs/real")
    again = finish(processes, tmp_path, "simulate", "--replay", "runs/real", "--run-dir", "runs/again")
    assert real["status"] == again["status"] == "finished"
    assert real["digest"] == again["digest"]
    assert real["rounds"] == again["rounds"] == 40


@pytest.mark.slow
def test_the_demo_loses_a_node_and_learns_more_than_the_frequencies_of_bytes(tmp_path, processes: Processes):
    summary = finish(processes, tmp_path, "run", str(ROOT / "examples/streaming_diloco.yaml"))
    assert summary["metrics"]["loss"] < 0.8 * summary["baselines"]["unigram_entropy"]
    assert summary["nodes"] == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    assert summary["replicas"] == "identical"


@pytest.mark.slow
def test_nodes_come_and_go_and_the_log_repeats_it(tmp_path, processes: Processes):
    real = finish(processes, tmp_path, "run", str(ROOT / "examples/elastic.yaml"), "--run-dir", "runs/real")
    assert real["nodes"]["started"] == 3
    assert real["nodes"]["lost"] == real["nodes"]["drained"] == 1
    assert real["nodes"]["joined"] >= 1
    assert real["replicas"] == "identical"
    again = finish(processes, tmp_path, "simulate", "--replay", "runs/real", "--run-dir", "runs/again")
    assert again["digest"] == real["digest"]
