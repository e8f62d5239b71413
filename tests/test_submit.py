"""What ``starling submit`` sends, and how it follows a job. The server is a stand-in; tests/cluster has a real one."""

from __future__ import annotations

import shlex
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from ray._private.runtime_env.packaging import create_package
from typer.testing import CliRunner

from starling.orchestrator import jobs
from starling.orchestrator.cli import submit
from starling.orchestrator.cli.main import app
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import ClusterError, ConfigError, RunError
from starling.orchestrator.jobs import Choice, Follower, Job, connect, plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TINY: dict[str, Any] = {"name": "tiny", "algorithm": "fedavg", "task": "digits"}
JOB = Job("tiny-1", "http://127.0.0.1:8265", "~/starling/runs/tiny-1")


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_job_runs_the_same_file_on_its_own_cluster(tmp_path: Path):
    file = tmp_path / "configs" / "tiny.yaml"
    file.parent.mkdir()
    file.touch()
    name, command, environment = plan(resolve(TINY), file, ["seed=1", "name=a b"], tmp_path)
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "starling", "run", "configs/tiny.yaml"]
    # Where it is kept: the working directory of a job is removed after it.
    assert words[5:7] == ["--run-dir", f"~/starling/runs/{name}"]
    assert words[7:] == [
        "--set", "seed=1", "--set", "name=a b", "--set", "cluster.address=auto", "--set", "cluster.runtime_env={}",
    ]  # fmt: skip
    assert environment["working_dir"] == str(tmp_path)
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30  # Ray's three seconds let no run close


def test_the_whole_job_gets_the_configurations_runtime_env(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tiny.yaml").touch()
    wanted = {"working_dir": str(folder), "pip": ["einops"], "env_vars": {"A": "1"}, "excludes": ["big/"]}
    config = resolve({**TINY, "cluster": {"runtime_env": wanted}})
    _, command, environment = plan(config, folder / "tiny.yaml", [], tmp_path)
    assert "run tiny.yaml" in command
    assert environment["working_dir"] == str(folder)
    assert environment["pip"] == ["einops"]
    assert environment["env_vars"].items() >= {"A": "1"}.items()
    assert environment["excludes"][-1] == "big/"


def test_runs_environments_and_history_stay_at_home(tmp_path: Path):
    here = tmp_path / "here"
    sent = ["tiny.yaml", "my_task.py", "data/runs/kept.csv", ".gitignore"]
    kept = [
        "runs/a/model.safetensors", "runs/mlflow.db", ".venv/bin/python", ".git/config", "sub/.venv/x", "mlruns/0/a",
        "mlflow.db", "__pycache__/a.pyc", "secret.txt",
    ]  # fmt: skip
    for name in sent + kept:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (here / ".gitignore").write_text("secret.txt\n")
    _, _, environment = plan(resolve(TINY), here / "tiny.yaml", [], here)
    create_package(str(here), tmp_path / "sent.zip", include_gitignore=True, excludes=environment["excludes"])
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        assert sorted(one for one in archive.namelist() if not one.endswith("/")) == sorted(sent)


def test_a_file_that_is_not_sent_is_refused(tmp_path: Path):
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match=r"tiny.yaml is outside of the working directory .*; .* --working-dir"):
        plan(resolve(TINY), tmp_path / "tiny.yaml", [], tmp_path / "work")
    with pytest.raises(ConfigError, match=r"working directory .*nowhere does not exist"):
        plan(resolve(TINY), tmp_path / "tiny.yaml", [], tmp_path / "nowhere")


# --- errors of one line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:1", "no job server answers there"),
        ("127.0.0.1:8265", "is not the address of a job server, as in http://127.0.0.1:8265"),
        ("ray://127.0.0.1:10001", "is not the address of a job server"),
    ],
)
def test_an_address_without_a_job_server(address: str, said: str, monkeypatch: pytest.MonkeyPatch):
    # Ray would take this one instead of the one that it is given.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(ClusterError, match=f"--address {address}: .*{said}") as caught:
        connect(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "said"), [(401, "wants a token"), (403, "does not accept this token")])
def test_a_token_that_is_missing_or_wrong(status: int, said: str):
    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            ClusterError, match=f"--address {address}: the cluster {said}; set RAY_AUTH_MODE=token"
        ) as caught:
            connect(address)
        server.shutdown()
    assert "\n" not in str(caught.value)


def test_the_configuration_is_checked_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("algorithm: fedavgg\ntask: digits\n")

    def refuse(address: str) -> None:
        raise AssertionError(address)

    monkeypatch.setattr(submit, "connect", refuse)
    for file, said in (("bad.yaml", "fedavg"), ("none.yaml", "none.yaml")):
        result = CliRunner().invoke(app, ["submit", file])
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert said in line


# --- following --------------------------------------------------------------------------------------------------------


class Status(str):
    """As Ray's: a string with a value."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


class Server:
    """Tells a log in pieces; exceptions among them are raised in their place."""

    def __init__(self, *connections: Sequence[str | BaseException], status: str = "SUCCEEDED", code: int | None = 0):
        self._connections = list(connections)
        self.status, self.driver_exit_code, self.message = Status(status), code, "Traceback\nValueError: no such pip\n"
        self.stopped: list[str] = []

    async def tail_job_logs(self, name: str):
        for piece in self._connections.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def get_job_info(self, name: str) -> Server:
        return self

    def get_job_status(self, name: str) -> Status:
        return self.status

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)
        self.status = Status("STOPPED")


def follow(server: Server, answer: Choice | None = None) -> tuple[int, str, list[str]]:
    shown: list[str] = []
    notes: list[str] = []
    code = Follower(server, JOB, shown.append, lambda: answer, notes.append).follow()
    return code, "".join(shown), notes


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)


def test_a_lost_connection_goes_on_where_it_was():
    server = Server(
        ["one\n", "two\n", RuntimeError("gone")], ["one\ntw", "o\nth", OSError("gone")], ["one\ntwo\nthree\n"]
    )
    assert follow(server) == (0, "one\ntwo\nthree\n", [])


def test_a_connection_that_does_not_come_back_says_how_to_go_on():
    server = Server(*[[RuntimeError("gone")]] * 20, status="RUNNING")
    with pytest.raises(ClusterError, match=r"was lost \(gone\); the job goes on; ray job logs --follow .* tiny-1"):
        follow(server)


@pytest.mark.parametrize(
    ("status", "code", "ours"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 2, 2),
        ("FAILED", -9, 3),
        ("FAILED", 255, 3),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(status: str, code: int | None, ours: int):
    assert follow(Server(["log"], status=status, code=code))[0] == ours


def test_a_job_that_could_not_begin_says_why():
    with pytest.raises(RunError, match="the job failed: ValueError: no such pip"):
        follow(Server([], status="FAILED", code=None))


def test_an_interruption_does_what_its_user_says():
    interrupted = ["one\n", KeyboardInterrupt()], ["one\ntwo\n"]
    assert follow(Server(*interrupted), None) == (0, "one\ntwo\n", [])
    code, shown, (note,) = follow(left := Server(*interrupted, status="RUNNING"), Choice.LEAVE)
    assert (code, shown, left.stopped) == (130, "one\n", [])
    assert "the job goes on" in note
    assert "ray job stop --address http://127.0.0.1:8265 tiny-1" in note
    code, shown, notes = follow(stopped := Server(*interrupted, status="RUNNING"), Choice.STOP)
    assert (code, shown, stopped.stopped) == (130, "one\n", ["tiny-1"])
    assert notes[-1] == "the job is stopped"
