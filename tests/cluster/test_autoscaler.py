"""Ray's real autoscaler: nodes without a place bring machines, a run takes them in its middle, idle ones go."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.cluster import sandbox
from tests.cluster.sandbox import Sandbox
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.smoke, pytest.mark.timeout(540), pytest.mark.xdist_group("sandbox")]

HEAD = "10.77.0.1"
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""Those of Ray's provider of machines that are only processes."""


@pytest.fixture
def machines() -> Iterator[Sandbox]:
    lacking = sandbox.lacks()
    if lacking is not None:
        pytest.skip(f"no machines of one's own on this computer: {lacking}")
    here = Sandbox(HEAD)
    yield here
    here.close()


def test_pending_nodes_bring_machines_and_idle_machines_go(machines: Sandbox):
    (head,) = machines.machines
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    # The node types of cluster.yaml, with processes instead of machines.
    types = {
        name: {key: one[key] for key in ("labels", "min_workers", "max_workers", "priority") if key in one}
        | {"node_config": {}, "resources": {"CPU": 4, "GPU": 1, "object_store_memory": 100_000_000}}
        for name, one in config["available_node_types"].items()
    }
    types[HEAD_TYPE] = types.pop(config["head_node_type"]) | {"resources": {"CPU": 0}}
    fake = {
        "cluster_name": "fake",
        "max_workers": config["max_workers"],
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": config["upscaling_speed"],
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "gcs_address": f"{HEAD}:6379",
        },
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "docker": {},
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip
    (head.home / "fake.yaml").write_text(yaml.safe_dump(fake))
    assert head.run("ray", "get-auth-token", "--generate").returncode == 0
    started = head.run(
        "ray", "start", "--head", f"--node-ip-address={HEAD}", "--port=6379", "--num-cpus=0", "--num-gpus=0",
        "--dashboard-host=127.0.0.1", "--autoscaling-config=fake.yaml", "--labels=ray.io/market-type=on-demand",
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=HEAD_ID,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
        RAY_NODE_TYPE_NAME=HEAD_TYPE,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )  # fmt: skip
    assert started.returncode == 0, started.stdout
    assert num_machines(head) == 0

    # Nobody has a place when it begins; two are enough to go on; the third comes when it is there.
    settings = [
        "cluster.address=auto", "cluster.num_gpus=1", "cluster.num_cpus=1", "cluster.nodes={min: 2, target: 3}",
        "cluster.nodes_per_actor=1", "cluster.start_timeout_s=90", "algorithm={name: fedavg, steps: 1}", "rounds=200",
        "tracking=none", "evaluation.every_rounds=0",
    ]  # fmt: skip
    run = head.run(
        "starling", "run", str(ROOT / "examples/fedavg.yaml"), "--run-dir", "run", "--json",
        *(word for setting in settings for word in ("--set", setting)),
        timeout_s=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + head.log("monitor.*")
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["nodes"]["started"] + summary["nodes"]["joined"] == 3
    assert summary["nodes"]["lost"] == 0
    assert summary["replicas"] == "identical"
    # Spot machines before the others, as their priority says.
    launched = re.findall(r"Launched (\d+) nodes of type (\S+)\.", log := head.log("monitor.log", 10_000))
    assert {kind for _, kind in launched} == {"gpu.spot"}, log
    assert sum(int(count) for count, _ in launched) == 3, log

    deadline = time.monotonic() + 60
    while num_machines(head):
        assert time.monotonic() < deadline, head.run("ray", "status").stdout
        time.sleep(1)


LIST = """
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print("GPUs:", sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes()))
"""


def num_machines(head: sandbox.Machine) -> int:
    """Those with a GPU."""
    said = head.run("python", "-c", LIST)
    assert said.returncode == 0, said.stdout
    # Ray's own lines of machines are printed among it, log_to_driver or not.
    return int(said.stdout.rpartition("GPUs: ")[2].split()[0])
