"""What ``starling run`` leaves behind on a Ray of its own: nothing, however it ends."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.cluster.conftest import Processes
from tests.paths import PYTHONPATH

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

CONFIG = """
name: processes
rounds: {rounds}
algorithm: {{name: "tests.cluster.programs:Endless", seconds: 0.2}}
task: digits
cluster: {{nodes: {{target: 2}}}}
evaluation: {{every_rounds: 0}}
tracking: none
"""


def write(folder: Path, rounds: int) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(rounds=rounds))
    return path


def wait_for(program: subprocess.Popen[str], text: str, limit_s: float = 120) -> str:
    """Read the program's stderr up to a line with ``text``; killed, and an error, if that takes too long."""
    timer = threading.Timer(limit_s, program.kill)
    timer.start()
    seen = ""
    assert program.stderr is not None
    for line in program.stderr:
        seen += line
        if text in line:
            timer.cancel()
            return seen
    timer.cancel()
    raise AssertionError(f"{text!r} never came:\n{seen}")


def test_a_finished_run_leaves_nothing(tmp_path, processes: Processes):
    program = processes.start("run", str(write(tmp_path, 3)), "--json", cwd=tmp_path)
    out, err = program.communicate(timeout=200)
    assert program.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "finished"
    assert summary["nodes"] == {"started": 2, "joined": 0, "lost": 0, "drained": 0}
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=[pytest.mark.slow, pytest.mark.smoke])]
)
def test_an_interrupted_run_leaves_nothing_and_exits_130(tmp_path, processes: Processes, number: int):
    program = processes.start("run", str(write(tmp_path, 150)), "--json", cwd=tmp_path)
    wait_for(program, "3 of 150 rounds done")
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert "Traceback" not in err
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []


@pytest.mark.slow
def test_a_killed_driver_takes_its_ray_along(tmp_path, processes: Processes):
    program = processes.start("run", str(write(tmp_path, 150)), "--json", cwd=tmp_path)
    wait_for(program, "3 of 150 rounds done")
    program.kill()
    program.communicate(timeout=60)
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []


@pytest.mark.slow
@pytest.mark.smoke
def test_a_failed_run_leaves_nothing_and_exits_3(tmp_path, processes: Processes):
    config = write(tmp_path, 5)
    faulty = ("--set", "algorithm=fedavg", "--set", "task=tests.cluster.programs:Faulty")
    program = processes.start("run", str(config), *faulty, "--json", cwd=tmp_path)
    out, err = program.communicate(timeout=200)
    assert program.returncode == 3, err
    assert json.loads(out.splitlines()[-1])["status"] == "failed"
    assert "error: node 1, round 0: ZeroDivisionError: the user's mistake" in err
    assert processes.wait_until_gone() == []
    assert processes.temporary_files() == []


def test_an_address_without_ray_is_an_error_of_one_line(tmp_path, processes: Processes):
    config = write(tmp_path, 1)
    program = processes.start("run", str(config), "--set", "cluster.address=127.0.0.1:1", cwd=tmp_path)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 2
    assert "cluster.address 127.0.0.1:1: nothing answers there" in err
    assert "Traceback" not in err


def test_a_wrong_token_says_what_to_check(tmp_path, shared_ray: str, processes: Processes):
    config = write(tmp_path, 1)
    program = processes.start(
        "run",
        str(config),
        "--set",
        f"cluster.address={shared_ray}",
        cwd=tmp_path,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0" * 64,
    )
    _, err = program.communicate(timeout=100)
    assert program.returncode == 2, err
    assert "RAY_AUTH_TOKEN" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.smoke
def test_another_process_reaches_a_running_ray_by_its_address(tmp_path, shared_ray: str, processes: Processes):
    program = processes.start(
        "run",
        str(write(tmp_path, 2)),
        "--set",
        f"cluster.address={shared_ray}",
        "--json",
        cwd=tmp_path,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"],
    )
    out, err = program.communicate(timeout=200)
    assert program.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["status"] == "finished"


@pytest.mark.slow
@pytest.mark.smoke
def test_a_store_that_is_too_small_is_named_and_nobody_is_left_out(tmp_path, processes: Processes):
    settings = [
        "cluster.object_store_gb=0.08",
        "task={name: digits, model: {name: mlp, width: 200000}}",
        "algorithm=ddp",
    ]
    keys = [argument for setting in settings for argument in ("--set", setting)]
    program = processes.start("run", str(write(tmp_path, 1)), *keys, "--run-dir", "out", "--json", cwd=tmp_path)
    out, err = program.communicate(timeout=200)
    assert program.returncode == 2, err
    assert "in Ray's object store on" in err
    assert "which has 80.0 MB; raise cluster.object_store_gb" in err
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["status"] == "failed"
    events = [json.loads(line)["event"] for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert not {"late", "lost", "commit"}.intersection(events)


MINE = """
import os
from tests.cluster.programs import Base
from starling.algorithms.api import AllReduce

class Mine(Base):
    async def round(self, node):
        print("mine runs with", os.environ["FLAVOUR"])
        await AllReduce(node.parameters)
"""


@pytest.mark.slow
@pytest.mark.smoke
def test_a_runtime_env_takes_the_users_module_to_the_nodes(tmp_path, shared_ray: str, processes: Processes):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "brought_along.py").write_text(MINE)
    environment = f"cluster.runtime_env={{py_modules: ['{folder}/brought_along.py'], env_vars: {{FLAVOUR: vanilla}}}}"
    program = processes.start(
        "run",
        str(write(tmp_path, 1)),
        "--json",
        "--run-dir",
        "out",
        "--set",
        "algorithm=brought_along:Mine",
        "--set",
        f"cluster.address={shared_ray}",
        "--set",
        environment,
        cwd=tmp_path,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"],
        PYTHONPATH=f"{PYTHONPATH}:{folder}",
    )
    _, err = program.communicate(timeout=200)
    assert program.returncode == 0, err
    assert "mine runs with vanilla" in (tmp_path / "out/logs/node-000.log").read_text()
