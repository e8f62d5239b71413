"""Ray's cluster launcher for real: machines reached by ssh, a training submitted to them, and all of it taken down."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from starling import simulate
from tests.cluster import sandbox
from tests.cluster.sandbox import Sandbox
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.smoke, pytest.mark.timeout(540), pytest.mark.xdist_group("sandbox")]

HEAD, WORKER = "10.77.0.1", "10.77.0.2"
TINY = ["rounds=2", "cluster.nodes.target=2", "tracking=none", "evaluation.every_rounds=0"]


@pytest.fixture
def machines() -> Iterator[Sandbox]:
    lacking = sandbox.lacks()
    if lacking is not None:
        pytest.skip(f"no machines of one's own on this computer: {lacking}")
    here = Sandbox(HEAD, WORKER, "10.77.0.9")
    yield here
    here.close()
    assert not here.folder.exists()


def test_from_ray_up_to_ray_down(machines: Sandbox, tmp_path: Path):
    head, worker, laptop = machines.machines
    # The cluster of examples/clusters/on-premises.yaml, with these machines and this computer's size.
    config = yaml.safe_load((ROOT / "examples/clusters/on-premises.yaml").read_text())
    config["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": machines.key}
    # This checkout is there already, and no network to install from.
    config["setup_commands"] = []
    config["file_mounts"] = {key: value for key, value in config["file_mounts"].items() if "token" in key}
    for commands, address, cpus in (
        ("head_start_ray_commands", HEAD, 0),
        ("worker_start_ray_commands", WORKER, 2),
    ):
        config[commands] = [
            line.replace("ray start ", f"ray start --node-ip-address={address} --num-cpus={cpus} ")
            for line in config[commands]
        ]
    (laptop.home / "cluster.yaml").write_text(yaml.safe_dump(config))
    token = laptop.run("ray", "get-auth-token", "--generate")
    assert token.returncode == 0, token.stdout
    (laptop.home / ".ray/auth_token").chmod(0o600)

    up = laptop.run("ray", "up", "-y", "cluster.yaml", RAY_UP_enable_autoscaler_v2="0", timeout_s=200)
    assert up.returncode == 0, up.stdout
    assert (head.home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600

    # The worker is started by the head, through ssh as well.
    deadline = time.monotonic() + 60
    while (nodes := head.run("ray", "status").stdout).count("local.cluster.node") < 1 or "0.0/2.0 CPU" not in nodes:
        assert time.monotonic() < deadline, nodes
        time.sleep(0.5)
    assert (worker.home / ".ray/auth_token").read_text() == (laptop.home / ".ray/auth_token").read_text()

    # The job server listens on the head's loopback alone; here all machines share one, as through a tunnel.
    training = ["python", "-m", "starling", "run", "fedavg.yaml", "--run-dir", "/tmp/home/run"]
    for setting in [*TINY, "cluster.address=auto"]:
        training += ["--set", setting]
    submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", str(ROOT / "examples")]
    job = laptop.run(*submit, "--", *training, timeout_s=200)
    assert job.returncode == 0, job.stdout
    assert "2 of 2 rounds done" in job.stdout
    summary = json.loads((head.home / "run/summary.json").read_text())
    assert summary["digest"] == simulate(ROOT / "examples/fedavg.yaml", TINY, run_dir=tmp_path / "simulated").digest
    # Its nodes were on the worker.
    assert f"on {WORKER}" in (head.home / "run/logs/node-000.log").read_text()

    down = laptop.run("ray", "down", "-y", "cluster.yaml", timeout_s=60)
    assert down.returncode == 0, down.stdout
    assert "No nodes remaining" in down.stdout
    left = head.run("python", "-c", "import psutil; print([one.name() for one in psutil.process_iter()])").stdout
    assert "python" in left
    assert "gcs_server" not in left
    assert "raylet" not in left
