"""A Ray that ends, or stands still, under a run: bounded waits, one line, and nothing that is left behind."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from starling.orchestrator.records.lease import Lease
from tests.cluster.test_processes import wait_for, write
from tests.cluster.test_runtime import actors_alive

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.cluster.conftest import Processes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

VITAL = ["raylet", "gcs_server"]
ROUNDS = 3000
"""More than there is time for."""


def begin(processes: Processes, folder: Path, *more: str) -> subprocess.Popen[str]:
    """A run that has done some rounds."""
    patience = ("--set", "cluster.cancel_grace_s=1")
    config = str(write(folder, ROUNDS))
    program = processes.start("run", config, "--json", "--run-dir", "run", *patience, *more, cwd=folder)
    wait_for(program, f"30 of {ROUNDS:,} rounds done", limit_s=240)
    return program


def ends(program: subprocess.Popen[str], processes: Processes, code: int) -> tuple[dict[str, object], str]:
    """Wait for it; return what it says on both streams. Nothing of it is there afterwards."""
    out, err = program.communicate(timeout=100)
    assert program.returncode == code, err
    assert "Traceback" not in err
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize("name", VITAL)
def test_a_run_ends_with_one_line_when_a_process_of_its_ray_is_killed(tmp_path: Path, processes: Processes, name: str):
    program = begin(processes, tmp_path)
    os.kill(processes.of_ray(program, name), signal.SIGKILL)
    summary, err = ends(program, processes, 3)
    assert summary["status"] == "failed"
    assert err.splitlines()[-1] == f"error: the run's own Ray is gone: its {name} ended; starling resume goes on"


@pytest.mark.parametrize("name", VITAL)
def test_one_that_stays_stopped_is_ended_and_the_run_with_it(tmp_path: Path, processes: Processes, name: str):
    program = begin(processes, tmp_path)
    pid = processes.of_ray(program, name)
    os.kill(pid, signal.SIGSTOP)
    summary, err = ends(program, processes, 3)
    assert summary["status"] == "failed"
    said = (
        f"Ray's {name} (process {pid}) is stopped: little goes on without it; it is ended in 21 s, and the run with it"
    )
    assert said in err
    assert err.splitlines()[-1] == f"error: the run's own Ray is gone: its {name} ended; starling resume goes on"


@pytest.mark.parametrize("name", VITAL)
def test_one_that_goes_on_in_time_is_only_said(tmp_path: Path, processes: Processes, name: str):
    program = begin(processes, tmp_path)
    pid = processes.of_ray(program, name)
    os.kill(pid, signal.SIGSTOP)
    wait_for(program, "is stopped")
    os.kill(pid, signal.SIGCONT)
    wait_for(program, f"Ray's {name} (process {pid}) goes on")
    wait_for(program, "rounds done")
    program.send_signal(signal.SIGINT)
    summary, _ = ends(program, processes, 130)
    assert summary["status"] == "interrupted"
    assert summary["nodes"] == {"started": 2, "joined": 0, "lost": 0, "drained": 0}


@pytest.mark.parametrize(("name", "number"), [("raylet", signal.SIGTERM), ("gcs_server", signal.SIGINT)])
def test_a_run_can_be_interrupted_while_its_ray_stands_still(
    tmp_path: Path, processes: Processes, name: str, number: int
):
    program = begin(processes, tmp_path)
    os.kill(processes.of_ray(program, name), signal.SIGSTOP)
    wait_for(program, "is stopped")
    program.send_signal(number)
    summary, _ = ends(program, processes, 130)
    assert summary["status"] == "interrupted"
    Lease(tmp_path / "run").release()  # nobody else holds it


def test_a_killed_driver_leaves_no_actor_on_a_ray_of_others(tmp_path: Path, shared_ray: str, processes: Processes):
    settings = ("--set", f"cluster.address={shared_ray}", "--set", "cluster.num_cpus=1")
    program = processes.start(
        *("run", str(write(tmp_path, ROUNDS)), "--json", *settings),
        cwd=tmp_path,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"],
    )
    wait_for(program, f"30 of {ROUNDS:,} rounds done")
    assert actors_alive(0) == 2
    program.kill()
    program.communicate(timeout=60)
    assert processes.wait_until_gone() == []
    assert actors_alive() == 0
