"""``starling submit``: a training as a job of a running Ray cluster, reached through the cluster's job server.

The controller runs on the cluster as well: it goes on when this machine sleeps, and only log lines cross the network.
The working directory is sent, without files that are never needed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starling.orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED, ClusterError, ConfigError, RunError
from starling.orchestrator.given_path import given
from starling.orchestrator.records import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray.job_submission import JobSubmissionClient

    from starling.orchestrator.config.schema import Config

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

EXCLUDES = ("/runs/", "/mlruns/", "/mlartifacts/", "/mlflow.db", ".venv/", ".git/", "__pycache__/", "*.pyc")
"""Patterns left out of the working directory, besides those of ``.gitignore`` and ``.rayignore``."""

_RUNS = "~/starling/runs"
"""Folder of run directories on the cluster's head; Ray removes a job's working directory some time after the job."""

_STOP_S = 60
"""Ray gives a job that it stops three seconds, in which no run can close."""

_AGENT_S = 60
"""A head that has just come up takes jobs a little later than it answers."""

_REQUEST_TIMEOUT_S = 30.0
_STATUS_PERIOD_S = 5.0
_RECONNECTS = 5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Choice(StrEnum):
    """Choices for the job when its submitter is interrupted."""

    ASK = "ask"
    STOP = "stop"
    LEAVE = "leave"


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Args:
        name: the job's id, and the name of the run.
        run_dir: where its run is written, on the cluster.
    """

    name: str
    address: str
    run_dir: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {"job_id": self.name, "address": self.address, "run_dir": self.run_dir}


def plan(config: Config, path: Path, overrides: list[str], working_dir: Path) -> tuple[str, str, dict[str, Any]]:
    """Return the job's id, the command that it runs on the cluster, and the runtime environment for Ray.

    Raises:
        ConfigError: the file is not among those that are sent.
    """
    environment = dict(config.cluster.runtime_env)
    # The whole job gets it: Ray refuses a driver that asks for other files than its job has.
    folder = given(environment.pop("working_dir", working_dir), "the working directory")
    if not folder.is_dir():
        raise ConfigError(f"the working directory {folder} does not exist; --working-dir names the one that is sent")
    try:
        file = given(path, "configuration").relative_to(folder)
    except ValueError:
        raise ConfigError(
            f"{path} is outside of the working directory {folder}, which is what the cluster gets; "
            "go to a folder that has it, or set --working-dir"
        ) from None
    kept = file.parts[0] if f"/{file.parts[0]}/" in EXCLUDES else None
    if kept is not None:
        raise ConfigError(f"{path} is in {kept}/, which is not sent; copy it to another folder of {folder}")
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    settings = [*overrides, "cluster.address=auto", "cluster.runtime_env={}"]
    words = ["python", "-m", "starling", "run", str(file), "--run-dir", f"{_RUNS}/{name}"]
    if identity.is_run_directory(folder / file.parent):
        words.append("--trust")  # decided here: the head has another key, to which every directory is somebody else's
    for setting in settings:
        words += ["--set", setting]
    environment["working_dir"] = str(folder)
    environment["excludes"] = [*EXCLUDES, *environment.get("excludes", [])]
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
    environment["env_vars"] = variables | environment.get("env_vars", {})
    return name, shlex.join(words), environment


def connect(address: str) -> JobSubmissionClient:
    """Connect to the job server at ``address``.

    Raises:
        ClusterError: there is none, or it does not let us in.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Bounds each request, which Ray does not."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:  # noqa: ANN401
            return super()._do_request(method, endpoint, **{"timeout": _REQUEST_TIMEOUT_S, **options})

    if urlsplit(address).scheme not in ("http", "https"):
        raise ClusterError(f"--address {address}: is not the address of a job server, as in {DEFAULT_ADDRESS}")
    try:
        with _address_of_its_own():
            return Client(address)
    except AuthenticationError as error:
        raise ClusterError(_refusal(address, str(error))) from None
    except (ConnectionError, requests.exceptions.RequestException, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise ClusterError(
            f"--address {address}: no job server answers there ({reason}); open a tunnel to the head first: "
            "ray dashboard cluster.yaml"
        ) from None


def _refusal(address: str, said: str) -> str:
    which = "wants a token" if "401" in said or "required" in said else "does not accept this token"
    return (
        f"--address {address}: the cluster {which}; set RAY_AUTH_MODE=token, and have the head's token in "
        "~/.ray/auth_token or RAY_AUTH_TOKEN"
    )


@contextlib.contextmanager
def _address_of_its_own() -> Iterator[None]:
    """Ray prefers these to the address that it is given."""
    kept = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def submit(
    client: JobSubmissionClient, address: str, planned: tuple[str, str, dict[str, Any]], shown: Callable[[str], object]
) -> Job:
    """Send the working directory, and start the job.

    Raises:
        ClusterError: the cluster refuses it.
    """
    import requests
    from ray.exceptions import AuthenticationError

    name, command, environment = planned
    for log in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(log).setLevel(logging.WARNING)
    shown(f"sending {environment['working_dir']} to {address}")
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            client.submit_job(entrypoint=command, runtime_env=environment, submission_id=name)
            break
        except AuthenticationError as error:
            raise ClusterError(_refusal(address, str(error))) from None
        except (RuntimeError, ValueError, requests.exceptions.RequestException) as error:
            reason = str(error).strip().partition("\n")[0][:300]
            if "No available agent" not in reason or time.monotonic() > deadline:
                raise ClusterError(f"--address {address}: the job was not accepted: {reason}") from None
            time.sleep(1)
    return Job(name, address, f"{_RUNS}/{name}")


class Follower:
    """Shows a job's log until it has ended, also across interruptions of the connection and of its user.

    Args:
        show: given pieces of the log.
        ask: what to do when interrupted: ``stop``, ``leave``, or ``None`` to go on following.
        note: told what concerns the following itself.
    """

    def __init__(
        self,
        client: JobSubmissionClient,
        job: Job,
        show: Callable[[str], object],
        ask: Callable[[], Choice | None],
        note: Callable[[str], object],
    ) -> None:
        self._client, self._job = client, job
        self._show, self._ask, self._note = show, ask, note
        self._shown = 0
        """Characters of the log: a connection begins with its first one again."""

    def follow(self, said: str = "") -> int:
        """Follow the job; return its exit code, or that of an interruption. ``said`` is noted first.

        Raises:
            ClusterError: the connection is lost, and does not come back.
        """
        lost = 0
        while True:
            try:
                if said:
                    self._note(said)
                    said = ""
                asyncio.run(self._follow())
                return self._exit_code()
            except KeyboardInterrupt:
                choice = self._ask()
                if choice is Choice.STOP:
                    return self._stop()
                if choice is Choice.LEAVE:
                    self._note(f"the job goes on; {self._how()}")
                    return EXIT_INTERRUPTED
            except (OSError, RuntimeError) as error:  # requests' and aiohttp's errors are the former
                lost += 1
                if lost > _RECONNECTS:
                    raise ClusterError(f"the connection was lost ({error}); the job goes on; {self._how()}") from None
                time.sleep(lost)

    def _how(self) -> str:
        options = f"--address {self._job.address} {self._job.name}"
        return f"ray job logs --follow {options}, ray job stop {options}"

    async def _follow(self) -> None:
        tail = asyncio.create_task(self._tail())
        try:
            while not tail.done():
                await asyncio.wait([tail], timeout=_STATUS_PERIOD_S)
                # A tunnel that died says nothing: the status is asked, which is bounded.
                if not tail.done() and await asyncio.to_thread(self._status) in _ENDED:
                    await asyncio.wait([tail], timeout=_STATUS_PERIOD_S)
                    break
            if tail.done():
                tail.result()
        finally:
            tail.cancel()
            await asyncio.wait([tail], timeout=_STATUS_PERIOD_S)

    async def _tail(self) -> None:
        passed = 0
        async for piece in self._client.tail_job_logs(self._job.name):
            new = piece[max(0, self._shown - passed) :]
            passed += len(piece)
            if new:
                self._show(new)
                self._shown = passed

    def _status(self) -> str:
        return str(self._client.get_job_status(self._job.name).value)

    def _exit_code(self) -> int:
        deadline = time.monotonic() + _REQUEST_TIMEOUT_S
        while (info := self._client.get_job_info(self._job.name)).status.value not in _ENDED:
            if time.monotonic() > deadline:
                raise RuntimeError("its log has ended, and the job has not")
            time.sleep(0.2)
        if info.status.value == "STOPPED":
            return EXIT_INTERRUPTED
        if info.status.value == "SUCCEEDED":
            return 0
        if info.driver_exit_code is None:  # it never began: no log says why
            raise RunError(f"the job failed: {_last_line(info.message)}")
        return info.driver_exit_code if 0 < info.driver_exit_code <= EXIT_INTERRUPTED else EXIT_FAILED

    def _stop(self) -> int:
        self._note(f"stopping the job; its nodes have {_STOP_S} s to close")
        deadline = time.monotonic() + _STOP_S + _REQUEST_TIMEOUT_S
        try:
            self._client.stop_job(self._job.name)
            with contextlib.suppress(KeyboardInterrupt):  # the impatient: it has been told to stop
                while self._status() not in _ENDED and time.monotonic() < deadline:
                    time.sleep(0.5)
            self._note(f"the job is {self._status().lower()}")
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"the job may go on: it could not be asked to stop ({error}); {self._how()}") from None
        return EXIT_INTERRUPTED


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "Ray does not say why"


# --- the command ----------------------------------------------------------------------------------------------------
