"""The Ray runtime against the simulator, on one shared Ray."""

import re
import time
from collections.abc import Callable

import pytest
import ray

from starling.actors.replica.spec import NonFiniteLossError
from starling.orchestrator.api import replay, run, simulate
from starling.orchestrator.config.schema import Config
from starling.orchestrator.errors import ClusterError, NodeFailedError, exit_code
from starling.orchestrator.records.observers import Observer, Started
from tests.cases import CASES
from tests.conformance import Case

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

Make = Callable[..., Config]
IN_CI = [pytest.mark.slow, pytest.mark.smoke]
HERE = "tests.cluster.programs"


class Watcher(Observer):
    def __init__(self) -> None:
        self.lines: dict[int, list[str]] = {}
        self.started: Started | None = None

    def on_start(self, started: Started) -> None:
        self.started = started

    def on_log(self, node, lines) -> None:
        self.lines.setdefault(node, []).extend(lines)


def actors_alive(limit_s: float = 20) -> float:
    """Node actors of this process's Ray, by the resources they hold, after a bounded wait for there to be none."""
    deadline = time.monotonic() + limit_s
    while (used := ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    return used


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("fedavg", ["algorithm.fraction=0.5", "cluster.nodes.target=5", "cluster.nodes_per_actor=2"]),
        pytest.param(
            {"name": "diloco", "inner_steps": 3}, ["task.model=cnn", "cluster.nodes_per_actor=3"], marks=IN_CI
        ),
        # 12 MB: twelve parts would fit, so each node reduces one
        ({"name": "diloco", "inner_steps": 2}, ["task.model.name=mlp", "task.model.width=40000"]),
        # the same in one process, where nothing goes through the store
        pytest.param(
            {"name": "diloco", "inner_steps": 2},
            ["task.model.name=mlp", "task.model.width=40000", "cluster.nodes_per_actor=4"],
            marks=IN_CI,
        ),
        # fewer contributors than parts, and the reducers are not those that were expected
        pytest.param(
            {"name": "fedavg", "fraction": 0.4, "steps": 1},
            ["task.model.name=mlp", "task.model.width=40000", "cluster.nodes.target=5", "cluster.nodes_per_actor=2"],
            marks=IN_CI,
        ),
        pytest.param(f"{HERE}:Gathering", [], marks=IN_CI),
        ({"name": f"{HERE}:Gathering", "sizes": [10, 20_000, 30_000]}, ["task.model.name=mlp", "task.model.width=500"]),
        pytest.param(
            {"name": f"{HERE}:Gathering", "sizes": [20_000, 30_000]},
            ["task.model.name=mlp", "task.model.width=500", "cluster.nodes_per_actor=2"],
            marks=IN_CI,
        ),
    ],
)
def test_the_cluster_ends_with_the_simulators_bits_and_bytes(config: Make, tmp_path, algorithm, overrides):
    settings = config(algorithm, *overrides)
    real = run(settings, run_dir=tmp_path / "real")
    simulated = simulate(settings, run_dir=tmp_path / "simulated")
    assert real.digest == simulated.digest
    assert real.bytes["payload"] == simulated.bytes["payload"]
    assert real.metrics == simulated.metrics
    if settings.cluster.num_actors == 1 and settings.task.model_dump()["model"].get("width") == 40000:
        assert real.bytes["transport"] == 0
    assert actors_alive() == 0


LAST = {type(case.algorithm).__module__.split(".")[2]: case for case in CASES}
"""One of each family: what others of it do on Ray differs little from that."""

FULL = [pytest.mark.slow, pytest.mark.long]
SOME = [pytest.param(case, id=case.name, marks=IN_CI if case in LAST.values() else FULL) for case in CASES]


@pytest.mark.parametrize("case", SOME)
def test_conformance_cases_end_with_the_simulators_bits(shared_ray: str, tmp_path, case: Case):
    overrides = ["rounds=3", "tracking=none", "cluster.address=auto", "cluster.nodes_per_actor=2"]
    real = run(case.config, overrides, run_dir=tmp_path / "real")
    if not case.algorithm.synchronous:  # the order of messages is the cluster's own, and in its log
        assert replay(tmp_path / "real", run_dir=tmp_path / "replay").digest == real.digest
        return
    simulated = simulate(case.config, overrides, run_dir=tmp_path / "simulated")
    assert real.digest == simulated.digest
    assert real.bytes["payload"] == simulated.bytes["payload"]


@pytest.mark.parametrize("algorithm", ["fedavg", pytest.param("dsgd", marks=IN_CI)])
def test_a_running_average_has_the_simulators_bits(algorithm: str, shared_ray: str, tmp_path):
    raw = {"algorithm": {"name": algorithm, "steps": 2}, "task": "digits", "rounds": 4, "tracking": "none"}
    raw |= {"evaluation": {"average": "ema"}, "cluster": {"address": "auto", "nodes_per_actor": 2}}
    raw["faults"] = {"events": [{"kind": "kill", "node": 3, "round": 1, "phase": "post"}]}
    real = run(raw, run_dir=tmp_path / "real")
    replayed = replay(tmp_path / "real", run_dir=tmp_path / "replay")
    assert real.average_digest not in (None, real.digest)
    assert (replayed.digest, replayed.average_digest, replayed.metrics) == (
        real.digest,
        real.average_digest,
        real.metrics,
    )


def test_a_node_that_kills_itself_is_named_and_nothing_is_left(config: Make, tmp_path):
    watcher = Watcher()
    settings = config(
        {"name": f"{HERE}:Dying", "victim": 2}, "rounds=3", "cluster.nodes.min=4", "cluster.nodes_per_actor=1"
    )
    summary = run(settings, run_dir=tmp_path / "run", observers=[watcher])
    assert summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    message = r"node 2 \(pid \d+ on .*\) was lost in round 1: its process died .*; it is started again"
    assert any(re.match(message, line) for line in watcher.lines[2])
    assert actors_alive() == 0


def test_what_a_users_task_raises_comes_back_with_its_traceback_and_the_nodes_name(config: Make, tmp_path):
    with pytest.raises(NodeFailedError, match="node 1, round 0: ZeroDivisionError: the user's mistake") as error:
        run(config(task=f"{HERE}:Faulty"), run_dir=tmp_path / "run")
    assert "programs.py" in (error.value.traceback or "")
    assert exit_code(error.value) == 3
    assert actors_alive() == 0


@pytest.mark.slow
@pytest.mark.smoke
def test_a_loss_that_is_not_finite_names_node_and_round(config: Make, tmp_path):
    with pytest.raises((NodeFailedError, NonFiniteLossError), match=r"node \d, round \d+: loss is (nan|inf)"):
        run(config("fedavg", "optimizer.lr=1e30", "rounds=6"), run_dir=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.smoke
def test_the_tracker_is_told_what_each_nodes_process_uses(config: Make, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = config(
        # Longer than until the first look.
        *({"name": f"{HERE}:Endless", "seconds": 0.25}, "rounds=12", "cluster.nodes.target=3"),
        f"tracking={{name: mlflow, uri: '{uri}'}}",
    )
    run(settings, run_dir=tmp_path / "run")
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("starling").experiment_id])
    for node in range(3):
        values = {
            name.rpartition("/")[2]: value
            for name, value in found.data.metrics.items()
            if name.startswith(f"system/node-{node:03}/")
        }
        assert values["memory_megabytes"] > 50
        assert values["cpu_utilization_percentage"] > 0
        assert 0 < values["machine_memory_usage_percentage"] < 100
        assert "machine_cpu_utilization_percentage" in values


def test_nodes_without_gpus_see_none_and_use_one_thread(config: Make, tmp_path):
    watcher = Watcher()
    run(config(f"{HERE}:Environment"), run_dir=tmp_path / "run", observers=[watcher])
    for node in range(4):
        assert "CUDA_VISIBLE_DEVICES='' threads=1" in watcher.lines[node]
        log = (tmp_path / f"run/logs/node-{node:03d}.log").read_text()
        assert "CUDA_VISIBLE_DEVICES='' threads=1" in log


def test_each_node_is_pinned_to_a_gpu_of_its_own(config: Make, tmp_path):
    watcher = Watcher()
    settings = config(
        f"{HERE}:Environment", "cluster.num_gpus=1", "cluster.nodes.target=2", "cluster.nodes_per_actor=1"
    )
    run(settings, run_dir=tmp_path / "run", observers=[watcher])
    assert watcher.started is not None
    assert sorted(gpu for facts in watcher.started.nodes for gpu in facts.gpus) == ["0", "1"]
    seen = {line for lines in watcher.lines.values() for line in lines if "CUDA" in line}
    assert seen == {"CUDA_VISIBLE_DEVICES='0' threads=1", "CUDA_VISIBLE_DEVICES='1' threads=1"}


def test_more_gpus_than_there_are_is_said_before_anything_waits(config: Make, tmp_path):
    message = r"4 nodes ask for 1 GPU each, the cluster has 2 \(ray status\); lower"
    with pytest.raises(ClusterError, match=message) as error:
        run(config("fedavg", "cluster.num_gpus=1", "cluster.nodes.min=4"), run_dir=tmp_path / "run")
    assert exit_code(error.value) == 2
