import gc
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from starling.orchestrator.config.schema import Config
from starling.orchestrator.driver import resolve
from starling.orchestrator.runtimes.cluster import session, watcher
from tests.cluster.machines import Machines
from tests.paths import PYTHONPATH


class Rays:
    """A process is connected to one Ray at a time: the one that was needed last goes on until another is."""

    def __init__(self) -> None:
        self._session: session.Session | None = None
        self._machines: Machines | None = None

    def shared(self) -> str:
        if self._session is None:
            self.close()
            # Its workers are to have this checkout's code, whoever else connects to it.
            before = session._set({"PYTHONPATH": PYTHONPATH})
            self._session = session.connect("local", num_cpus=16, num_gpus=2)
            session._restore(before)
        return ray.get_runtime_context().gcs_address

    def machines(self) -> Machines:
        if self._machines is None:
            self.close()
            self._machines = Machines()
        return self._machines

    def close(self) -> None:
        for one in (self._session, self._machines):
            if one is not None:
                one.close()
        self._session = self._machines = None
        gc.collect()


@pytest.fixture(scope="session")
def rays() -> Iterator[Rays]:
    those = Rays()
    yield those
    those.close()


@pytest.fixture
def shared_ray(rays: Rays) -> str:
    """One Ray for all ordinary tests, by its address. Runs reach it with ``cluster.address: auto``."""
    return rays.shared()


@pytest.fixture
def machines(rays: Rays) -> Machines:
    """A Ray cluster whose machines a test adds, drains and kills; runs reach it with ``cluster.address: auto``."""
    return rays.machines()


@pytest.fixture
def config(shared_ray: str) -> Callable[..., Config]:
    """Makes a small configuration for the shared Ray."""

    def make(algorithm: object = "fedavg", *overrides: str, task: object = "digits") -> Config:
        raw = {
            "rounds": 2,
            "algorithm": algorithm,
            "task": task,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            # Two processes, each with two nodes: what is inside of one, and what is between them.
            "cluster": {"address": "auto", "nodes": {"min": 1, "target": 4}, "nodes_per_actor": 2},
            "tracking": "none",
        }
        return resolve(raw, overrides)

    return make


class Processes:
    """Processes that carry this test's mark in their environment: a program and all that it started."""

    def __init__(self, temporary: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._temporary = temporary
        self._programs: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End the programs that a test which failed has left; their pipes would be the next test's errors."""
        for program in self._programs:
            program.kill()
            program.communicate(timeout=60)

    def temporary_files(self) -> list[Path]:
        return list(self._temporary.iterdir())

    def start(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
        names = {"STARLING_TEST_MARK": self.mark, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **environment}
        names["TMPDIR"] = str(self._temporary)
        program = subprocess.Popen(
            [sys.executable, "-c", "from starling.orchestrator.cli.main import main; main()", *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, **names},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._programs.append(program)
        return program

    def alive(self) -> list[str]:
        found = []
        # Titles that processes of Ray's show may overwrite their environment.
        of_ray = watcher.processes_of(self._temporary)
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if int(folder.name) not in of_ray and self.mark.encode() not in (folder / "environ").read_bytes():
                    continue
                if "\nState:\tZ" in (folder / "status").read_text():
                    continue
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:150])
            except OSError:
                continue
        return found

    def of_ray(self, program: subprocess.Popen[str], name: str) -> int:
        """The id of the raylet or the GCS (``gcs_server``) that a program started."""
        for child in psutil.Process(program.pid).children(recursive=True):
            if child.name() == name:
                return child.pid
        raise AssertionError(f"{name} does not run")

    def wait_until_gone(self, limit_s: float = 60) -> list[str]:
        """What is still there after a bounded wait; nothing, if all is well."""
        deadline = time.monotonic() + limit_s
        while (found := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


@pytest.fixture
def processes() -> Iterator[Processes]:
    # Not tmp_path, which is too long for the sockets in it.
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as folder:
        marked = Processes(Path(folder))
        yield marked
        marked.close()
        assert marked.wait_until_gone() == []
