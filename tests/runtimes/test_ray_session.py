"""What a session leaves behind, as far as that shows without a Ray."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray._private import node, utils, worker

from starling.orchestrator.errors import ClusterError
from starling.orchestrator.runtimes.cluster import failures, ray_internals, session
from starling.orchestrator.runtimes.cluster.session import _owner, _remove_abandoned
from starling.orchestrator.runtimes.cluster.watcher import dismiss, watch
from tests.paths import PYTHONPATH


def test_folders_of_processes_that_were_killed_are_removed_and_no_others(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    facts = {"starling-gone": _owner(gone.pid), "starling-mine": _owner(os.getpid())}
    gone.communicate(b"\n")
    machine, pid, started = facts["starling-gone"].split()
    facts["starling-of-a-container"] = f"{machine}1 {pid} {started}"
    facts["starling-of-another"] = f"x{machine} {pid} {started}"
    facts["starling-again"] = f"{machine} {os.getpid()} 1.0"  # its number is somebody else's by now
    facts["starling-torn"] = machine
    for name, text in facts.items():
        (tmp_path / name / "r").mkdir(parents=True)
        (tmp_path / name / "owner").write_text(text)
    (tmp_path / "starling-of-a-user").mkdir()
    _remove_abandoned(tmp_path)
    left = {one.name.removeprefix("starling-") for one in tmp_path.iterdir()}
    assert left == {"mine", "of-a-container", "of-another", "torn", "of-a-user"}


def folders() -> set[Path]:
    return set(Path("/tmp").glob("starling-*"))


@pytest.mark.parametrize(
    ("error", "tries"),
    [(Exception("it timed out\nat length"), 2), (AssertionError(), 1), (ImportError("no such module"), 1)],
)
def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, tries: int
):
    places: list[str] = []

    def init(*, _temp_dir: str, **_: object) -> None:
        places.append(_temp_dir)
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "PYTHONOPTIMIZE" not in os.environ
        raise error

    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setattr(ray, "init", init)
    before, environment, handler = folders(), dict(os.environ), signal.getsignal(signal.SIGHUP)
    with pytest.raises(ClusterError) as caught:
        session.connect("local", num_cpus=1)
    assert str(caught.value).startswith(f"cluster.address local: Ray does not start: {type(error).__name__}")
    assert "\n" not in str(caught.value)
    assert len(set(places)) == len(places) == tries
    assert caplog.text.count("it is started once more") == tries - 1
    assert (folders() - before, dict(os.environ)) == (set(), environment)
    assert signal.getsignal(signal.SIGHUP) == handler


def test_of_a_ray_only_what_trains_is_started():
    servers = [getattr(node.Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")]
    ours: Any = SimpleNamespace()
    with ray_internals.bare():
        for name in ("start_monitor", "start_log_monitor"):
            getattr(node.Node, name)(ours)
        node.Node.start_api_server(ours, include_dashboard=False, raise_on_failure=False)
        assert utils.get_dashboard_dependency_error() is not None
    assert vars(ours) == {"_webui_url": ""}
    assert servers == [node.Node.start_monitor, node.Node.start_log_monitor, node.Node.start_api_server]
    assert utils.get_dashboard_dependency_error() is None


def test_no_place_for_rays_files_is_one_line(monkeypatch):
    def full(**_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.setattr(session.tempfile, "mkdtemp", full)
    with pytest.raises(ClusterError, match="files cannot be written to /tmp .No space left on device.; .*TMPDIR"):
        session.connect("local", num_cpus=1)


def test_what_rays_servers_said_is_part_of_the_line(tmp_path: Path):
    (tmp_path / "raylet.out").write_text(
        "[2026-11-30 15:00:00,000 I 1 1] (raylet) a.cc:1: fine\n"
        "[2026-11-30 15:00:00,001 C 1 1] (raylet) b.cc:2: Likely a bug. Check failed: "
        "status1.has_value() no file /tmp/starling-a/r/x_port\n*** StackTrace\n"
    )
    (tmp_path / "dashboard.log").write_text("  File 'x'\nOSError: [Errno 98] in use\n")
    assert failures.said_last(tmp_path) == "raylet said: no file /tmp/starling-a/r/x_port"
    assert failures.said_last(tmp_path, ["gcs_server"]) is None
    line = str(failures.not_started(RuntimeError("no\nanswer"), tmp_path))
    assert line.startswith("cluster.address local: Ray does not start: RuntimeError: no; raylet said: no file; ")


def test_a_ray_of_our_own_that_is_gone_is_named(monkeypatch, tmp_path: Path):
    ours = SimpleNamespace(dead_processes=lambda: [("log_monitor", None), ("raylet", None)])
    monkeypatch.setattr(worker, "_global_node", ours)
    session.Session(None, owned=True, environment={}).check()  # somebody else's
    with pytest.raises(ClusterError, match="Ray is gone: its raylet ended$"):
        session.Session(tmp_path, owned=False, environment={}).check()


def test_a_watcher_cleans_up_after_a_process_that_is_killed(tmp_path: Path):
    folder, other = tmp_path / "starling-a", tmp_path / "starling-ab"
    for one in (folder, other):
        (one / "r").mkdir(parents=True)
    sleep = "import time; time.sleep(600)"
    servers = [subprocess.Popen([sys.executable, "-c", sleep, f"--temp-dir={one}/r"]) for one in (folder, other)]
    # Agents and workers show a title, and write logs.
    with (folder / "r/agent.log").open("w") as log:
        agent, of_a_user = (
            subprocess.Popen([title, "600"], executable="/bin/sleep", stdout=log) for title in ("ray::Agent", "sleep")
        )
    body = f"""
import os, pathlib
from starling.orchestrator.runtimes.cluster.watcher import watch
print(watch(pathlib.Path({str(folder)!r})).pid, flush=True)
os.kill(os.getpid(), 9)
"""
    try:
        driver = subprocess.run(
            [sys.executable, "-c", body],
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )
        watcher = int(driver.stdout)
        assert driver.returncode == -signal.SIGKILL
        assert servers[0].wait(60) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while psutil.pid_exists(watcher) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(watcher)
        assert not folder.exists()
        assert other.exists()
        assert servers[1].poll() is None
        assert agent.wait(60) == -signal.SIGKILL
        assert of_a_user.poll() is None
    finally:
        for server in (*servers, agent, of_a_user):
            server.kill()
            server.wait()


def test_a_watcher_that_is_dismissed_is_gone(tmp_path: Path):
    watcher = watch(tmp_path / "starling-none")
    assert watcher is not None
    dismiss(watcher)
    assert watcher.returncode == 0
