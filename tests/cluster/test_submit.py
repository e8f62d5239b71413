"""Trainings submitted to a running cluster through its job server: a real head on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from starling import simulate
from tests.cluster.conftest import Processes
from tests.paths import PYTHONPATH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# One Ray with a job server serves them all.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("submit")]

HEAD = """
import sys, ray
from ray._private import parameter, utils

class Params(parameter.RayParams):
    def __init__(self, **options):
        # By default a fixed port: of two Rays on one computer one would take no jobs.
        super().__init__(**options | {"dashboard_agent_listen_port": 0})

parameter.RayParams = Params
ray.init(address="local", num_cpus=4, _temp_dir=sys.argv[1], include_dashboard=True, dashboard_host="127.0.0.1",
         dashboard_port=int(sys.argv[2]), log_to_driver=False)
# As ray start does: a job asks this file which of the machine's Rays it is in, and is given any one without it.
utils.write_ray_address(ray.get_runtime_context().gcs_address, sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
ray.shutdown()
"""
SUBMIT = """
import signal
from starling.orchestrator.cli.main import main
# A shell's background jobs, as these tests may be, do not hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
STATUS_AND_STOP = """
import sys
from starling.orchestrator.jobs import connect
client = connect(sys.argv[1])
print(client.get_job_status(sys.argv[2]).value)
client.stop_job(sys.argv[2])
"""
TINY = """
rounds: 2
algorithm: fedavg
task: digits
optimizer: {name: sgd, lr: 0.1}
evaluation: {every_rounds: 0}
cluster: {nodes: {target: 2}}
tracking: none
"""


class Head:
    """A Ray of its own with a job server, and what is needed to reach it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="st-", dir="/tmp")
        self.home = Path(self._folder.name)
        self.processes = Processes(self.home)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.token = self.home / "token"
        self.token.write_text("5" * 64)
        self.token.chmod(0o600)
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "PYTHONPATH": PYTHONPATH,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "STARLING_TEST_MARK": self.processes.mark,
            "COLUMNS": "200",
        }
        for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):  # of the Ray that other tests share
            self.environment.pop(name, None)
        command = [sys.executable, "-c", HEAD, str(self.home / "r"), str(port)]
        self._process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        while self._process.stdout.readline() != "ready\n":
            assert self._process.poll() is None

    def close(self) -> None:
        self._process.communicate(timeout=60)
        left = self.processes.wait_until_gone()
        self._folder.cleanup()
        assert left == []


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    one = Head()
    yield one
    one.close()


@pytest.fixture
def submit(head: Head, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Begins ``starling submit`` in a folder that has a tiny configuration."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def start(*arguments: str, stdin: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE, **environment: str):
        command = [sys.executable, "-c", SUBMIT, "submit", "tiny.yaml", "--address", head.address, *arguments]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**head.environment, **environment},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    return start


def until(condition: Callable[[], object], limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.smoke
def test_a_job_trains_to_the_simulators_digest(
    head: Head, submit: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    out, err = (job := submit("--set", "seed=3", "--json")).communicate(timeout=120)
    assert job.returncode == 0, out + err
    answer = json.loads(out.splitlines()[-1])
    assert answer["status"] == "finished"
    assert answer["exit_code"] == 0
    assert "2 of 2 rounds done" in err  # the job's log, followed
    assert answer["run_dir"] == f"~/starling/runs/{answer['job_id']}"
    summary = json.loads((head.home / "starling/runs" / answer["job_id"] / "summary.json").read_text())
    simulated = simulate(tmp_path / "tiny.yaml", ["seed=3"], run_dir=tmp_path / "simulated")
    assert summary["digest"] == simulated.digest


@pytest.mark.long
def test_the_exit_code_is_the_jobs(submit: Callable[..., subprocess.Popen[str]]):
    out, _ = (job := submit("--set", "optimizer.lr=1.0e+30")).communicate(timeout=120)
    assert job.returncode == 3, out
    assert "error: node" in out


@pytest.mark.long
def test_ctrl_c_asks_and_stops_the_job(head: Head, submit: Callable[..., subprocess.Popen[str]]):
    ours, theirs = pty.openpty()
    job = submit("--set", "rounds=100000", stdin=theirs, stderr=theirs)
    os.close(theirs)
    said = bytearray()
    os.set_blocking(ours, False)

    def hears(text: bytes) -> bool:
        with contextlib.suppress(OSError):
            said.extend(os.read(ours, 65536))
        return text in said

    assert job.stdout is not None
    while " rounds done" not in (line := job.stdout.readline()):
        assert line, said
    reader = threading.Thread(target=job.stdout.read, daemon=True)  # a full pipe would hold it up
    reader.start()
    job.send_signal(signal.SIGINT)
    until(lambda: hears(b"[f]ollowing"))
    os.write(ours, b"s\n")
    until(lambda: hears(b"the job is stopped"), 90)
    assert job.wait(timeout=30) == 130
    reader.join(timeout=30)
    job.stdout.close()
    os.close(ours)
    # Its run was told to end, and closed.
    (run,) = [
        one for one in (head.home / "starling/runs").iterdir() if "interrupted" in (one / "summary.json").read_text()
    ]
    assert (run / "config.yaml").exists()


@pytest.mark.long
def test_without_a_terminal_an_interrupted_submitter_leaves_the_job_running(
    head: Head, submit: Callable[..., subprocess.Popen[str]]
):
    job = submit("--set", "rounds=100000", "--json")
    assert job.stderr is not None
    while not (line := job.stderr.readline()).startswith("job run-"):
        assert line
    name = line.split()[1]
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 130, err
    assert f"ray job stop --address {head.address} {name}" in err
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    said = subprocess.run(
        [sys.executable, "-c", STATUS_AND_STOP, head.address, name],
        env=head.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout.strip() in ("PENDING", "RUNNING")


def test_a_wrong_token_is_refused_in_one_line(submit: Callable[..., subprocess.Popen[str]]):
    _, err = (job := submit(RAY_AUTH_TOKEN="6" * 64)).communicate(timeout=60)
    assert job.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the cluster does not accept this token; set RAY_AUTH_MODE=token" in line
    assert "Traceback" not in err
