"""Ray sessions: a Ray of our own on this machine, or a running one."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

from starling.orchestrator.errors import ClusterError, RunError
from starling.orchestrator.process_identity import started_at
from starling.orchestrator.runtimes.cluster import failures, head, ray_internals, watcher
from starling.orchestrator.signals import ENDING

_LOG = logging.getLogger("starling")

_TOKEN = secrets.token_hex(32)
"""Token of every Ray that this process starts: Ray reads it once per process."""

_PROBE_TIMEOUT_S = 3

_MAX_BASE_LENGTH = 20

_PREFIX = "starling-"
_OWNER = "owner"
"""File in our temporary folder that names the process that made it, and when that began."""

_RAYS = "r"
"""Ray's subfolder of our temporary folder: Ray lets everybody write to its own folder."""

_LOGS = f"{_RAYS}/session_latest/logs"
_TOKEN_FILE = "auth_token"  # noqa: S105 - its name

_REMOVE_TIMEOUT_S = 5.0
_MACHINES_PERIOD_S = 0.4

_UNLIMITED = 1_000_000
"""Places for processes that ask for nothing."""

_SYSTEM_CONFIG = {
    # The store frees in batches, by default once a second. A fast round would then write to memory that was never
    # touched, round after round, and the kernel clears each page first: ten times slower than memory that is reused.
    "free_objects_period_milliseconds": 20,
    # Nobody looks at the record of each call that the GCS keeps: 100,000 of them, and with them 29 kB a round of four
    # nodes. 0: none are kept.
    "task_events_report_interval_ms": 0,
    # By default 15: beside any other program of the machine's user a node would get a tenth of a core.
    "worker_niceness": 0,
}


class Session:
    """A connection to Ray; ``close`` ends everything that the session started."""

    def __init__(
        self,
        folder: Path | None,
        *,
        owned: bool,
        environment: dict[str, str | None],
        watcher: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self._printer = ray_internals.print_with(_take_lines) if owned else None
        self._folder = folder
        self._owned = owned
        self._environment = environment
        self._watcher = watcher

    @property
    def is_local(self) -> bool:
        """Whether this Ray was started for this session."""
        return self._folder is not None

    def worker_output(self, pid: int, num_lines: int = 20) -> list[str]:
        """Return the last lines that a worker process of our own Ray wrote to stderr; empty for other Rays."""
        if self._folder is None:
            return []
        lines: list[str] = []
        for path in self._folder.glob(f"{_RAYS}/session_latest/logs/worker-*-{pid}.err"):
            with contextlib.suppress(OSError):
                lines += path.read_text(errors="replace").splitlines()[-num_lines:]
        return lines

    def check(self) -> None:
        """Check the processes of our own Ray.

        Raises:
            ClusterError: one that a run cannot do without has ended.
        """
        if self._folder is None:
            return
        dead = ray_internals.ended_vital_processes()
        if dead:
            told = failures.said_last(self._folder / _LOGS, dead)
            reason = f" ({told})" if told else ""
            raise ClusterError(f"cluster.address local: Ray is gone: its {' and '.join(dead)} ended{reason}")

    @property
    def vital(self) -> dict[str, int]:
        """Ids by name of the processes of our own Ray that a run cannot do without."""
        return {} if self._folder is None else ray_internals.vital_processes()

    def ended(self, name: str, what: str = "run", resume: str = "starling resume") -> RunError:
        """Return the error that says which vital process has ended, whose Ray it was, and which command goes on."""
        told = None if self._folder is None else failures.said_last(self._folder / _LOGS, [name])
        reason = f" ({told})" if told else ""
        return RunError(f"the {what}'s own Ray is gone: its {name} ended{reason}; {resume} goes on")

    def close(self) -> None:
        """Disconnect, and end a Ray of our own."""
        if self._owned:
            ray.shutdown()
        if self._printer is not None:
            ray_internals.print_with(self._printer)
        _restore(self._environment)
        if self._environment:
            ray_internals.read_authentication_again()
        if self._folder is not None:
            # Nobody else ends the processes of a Ray that did not come up.
            watcher.clean(self._folder, _REMOVE_TIMEOUT_S)
            # Ray makes folders of a session that is over again when this process begins another.
            atexit.register(watcher.clean, self._folder, _REMOVE_TIMEOUT_S)
        if self._watcher is not None:
            watcher.dismiss(self._watcher)


def _remove_abandoned(base: Path) -> None:
    """Remove folders whose processes were killed before they could remove them."""
    for owner in base.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            facts = owner.read_text(encoding="ascii")
            machine, pid, _ = facts.split()
            mine = _owner(int(pid))
            # Of a machine or a container that shares the folder with us we do not know the processes.
            if machine == mine.split()[0] and facts != mine:
                shutil.rmtree(owner.parent / _RAYS, ignore_errors=True)
                if not (owner.parent / _RAYS).exists():  # else its Ray is ending: another time
                    shutil.rmtree(owner.parent, ignore_errors=True)


def _owner(pid: int) -> str:
    """Return a name of a process that no later process with its id has."""
    machine = f"{platform.node()}/{Path('/proc/self/ns/pid').stat().st_ino}"
    return f"{machine} {pid} {started_at(pid)}"


def _take_lines(data: dict[str, Any], *_: object, **__: object) -> None:
    """Log lines of workers that Ray would print."""
    for line in data["lines"]:
        _LOG.debug("ray: %s", line)


class MachineLostError(Exception):
    """A machine is gone, and all processes on it."""


@dataclass(frozen=True)
class Machines:
    """Machines of a cluster, by Ray's names."""

    dead: frozenset[str]
    draining: dict[str, float | None]
    """Machines that are about to be removed, and seconds until then; None if unknown."""


class MachineWatch:
    """Polls Ray's machines in a thread of its own: Ray itself notifies nobody.

    Args:
        report: called in that thread, with every answer.
    """

    def __init__(self, report: Callable[[Machines], None]) -> None:
        self._report = report
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starling-machines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_MACHINES_PERIOD_S):
            # A head that does not answer is told by whatever else is asked of it.
            with contextlib.suppress(Exception):
                self._report(machines())

    def stop(self) -> None:
        """Stop polling. Never raises."""
        self._over.set()
        self._thread.join(timeout=_PROBE_TIMEOUT_S)


def machines() -> Machines:
    """Ask Ray for its machines; takes about a millisecond."""
    dead = frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])
    # Milliseconds of the wall clock; 0: nobody has said when.
    deadlines = ray_internals.draining_machines()
    now = time.time()
    draining = {name: max(0.0, at / 1000 - now) if at else None for name, at in deadlines.items()}
    return Machines(dead, draining)


def places(num_cpus: float, num_gpus: float, *, free: bool = False) -> int:
    """Count the processes of this size that fit on the cluster, or (``free``) still fit.

    Machines that are being drained count for nothing.
    """
    resources: dict[str, dict[str, float]] = (
        ray_internals.free_resources()
        if free
        else {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    )
    leaving = ray_internals.draining_machines()
    total = 0
    for name, there in resources.items():
        wanted = [(there.get("CPU", 0.0), num_cpus), (there.get("GPU", 0.0), num_gpus)]
        fits = [int((have + 1e-6) // each) for have, each in wanted if each]
        if name not in leaving:
            total += min(fits, default=_UNLIMITED)
    return total


def elsewhere(machines: Collection[str]) -> NodeLabelSchedulingStrategy:
    """Return a strategy that places processes on other machines than these, while others have room."""
    return NodeLabelSchedulingStrategy({}, soft={"ray.io/node-id": NotIn(*sorted(machines))})


def brings_machines() -> bool:
    """Return whether Ray's autoscaler may add machines for processes without a place.

    Only version 2 says so: the one that ``ray up`` and KubeRay start.
    """
    with contextlib.suppress(Exception):
        return ray_internals.has_autoscaler_v2()
    return False


def connect(
    address: str,
    *,
    num_cpus: float,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
    runtime_env: dict[str, Any] | None = None,
) -> Session:
    """Start a Ray on this machine (``local``), or connect to a running one (``auto``, ``host:port``).

    A Ray of our own has ``num_cpus`` logical CPUs, the GPUs of this machine unless ``num_gpus`` says otherwise, and an
    object store of ``object_store_bytes`` (default: 30 % of the memory that is free).
    ``runtime_env`` is the job's: Ray uploads local folders for a whole job only. A process that is connected already
    keeps the one it has.

    Raises:
        ClusterError: there is none, or it does not let us in.
    """
    ray_internals.check_version()
    if address == "local":
        return _start(num_cpus, num_gpus, object_store_bytes, runtime_env)
    if ray.is_initialized():
        return Session(None, owned=False, environment={})
    try:
        with head.as_written(address), _quiet(), head.quiet():
            head.probe(address)
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                namespace="starling",
                runtime_env=runtime_env,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = (
            f"cluster.address {address}: cannot connect ({_first_line(error)}); check that Ray runs there (ray status) "
            "and that this process has the cluster's token: RAY_AUTH_MODE=token with the same RAY_AUTH_TOKEN or "
            "~/.ray/auth_token as the head"
        )
        raise ClusterError(message) from None
    return Session(None, owned=True, environment={})


def _start(
    num_cpus: float, num_gpus: int | None, object_store_bytes: int | None, runtime_env: dict[str, Any] | None
) -> Session:
    if ray.is_initialized():
        message = (
            "cluster.address local: this process is connected to a Ray already; set cluster.address: auto to use it"
        )
        raise ClusterError(message)
    try:
        return _start_once(num_cpus, num_gpus, object_store_bytes, runtime_env)
    except failures.TimedOutError:
        # It gives itself half a minute, which a busy machine may need for its agents' imports alone.
        _LOG.warning("Ray has not come up within the time that it gives itself; it is started once more")
    return _start_once(num_cpus, num_gpus, object_store_bytes, runtime_env)


def _start_once(
    num_cpus: float, num_gpus: int | None, object_store_bytes: int | None, runtime_env: dict[str, Any] | None
) -> Session:
    folder = _folder()
    environment = _set(
        {
            # Only processes of this run may talk to it, and nothing is written to ~/.ray. A file and not a variable:
            # variables are in error reports, and in what `ps e` shows.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / _TOKEN_FILE),
            "RAY_AUTH_TOKEN": None,  # it would be preferred
            "PYTHONOPTIMIZE": None,  # Ray's agents do not start without their docstrings
            "RAY_REDIS_ADDRESS": None,  # of another Ray
            ray_internals.GCS_PORT_VARIABLE: None,  # any that is free
            "RAY_USAGE_STATS_ENABLED": "0",
            # Bind to loopback. Ray does so by itself on systems where it does not support clusters of machines.
            ray_internals.CLUSTERS_VARIABLE: "0",
        }
    )
    ray_internals.read_authentication_again()
    session = Session(folder, owned=True, environment=environment, watcher=watcher.watch(folder))
    try:
        with _quiet(), ray_internals.bare(), ray_internals.loopback_only():
            ray.init(
                address="local",
                num_cpus=max(1, math.ceil(num_cpus)),
                num_gpus=num_gpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                namespace="starling",
                runtime_env=runtime_env,
                _temp_dir=str(folder / _RAYS),
                _system_config=_SYSTEM_CONFIG,
            )
        session.check()
    except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes
        problem = failures.not_started(error, folder / _LOGS)
        session.close()
        raise problem from None
    except BaseException:
        session.close()
        raise
    return session


def _folder() -> Path:
    """Make a temporary folder for a Ray of our own, with the token in it.

    Raises:
        ClusterError: none can be made.
    """
    base = "the temporary folder"
    try:
        # Unix sockets live in it, whose paths may have 107 characters, and Ray's own part of them takes 62.
        base = tempfile.gettempdir()
        base = base if len(base) <= _MAX_BASE_LENGTH else "/tmp"  # noqa: S108
        _remove_abandoned(Path(base))
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            (folder / _OWNER).write_text(_owner(os.getpid()), encoding="ascii")
            token = folder / _TOKEN_FILE
            with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(_TOKEN)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise failures.not_writable(base, error) from None
    return folder


def reason_of(error: BaseException) -> str:
    """Return why a call failed, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, MachineLostError | TimeoutError) or type(error) is RuntimeError:
        return lines[0]
    if not isinstance(error, ray.exceptions.ActorDiedError):
        return f"{type(error).__name__}: {lines[-1]}"
    if "creation task" in lines[0]:
        advice = "is this version of Starling installed there, and what cluster.runtime_env names?"
        return f"its process could not begin ({lines[-1]}); {advice}"
    if getattr(error, "preempted", False):
        return "its machine was preempted"
    return "its process died (killed, out of memory or crashed)"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Ray's start-up messages, and keep this process's signal handlers.

    Processes that are started meanwhile ignore SIGHUP. A terminal that goes away tells all processes that were begun in
    it, and we need those of Ray to save what the nodes have. They end with us.
    """
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what goes wrong is raised too, and said in one line
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDING} if main else {}
    if main:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        logger.setLevel(level)
        for number, handler in handlers.items():
            # Ray's own handler of SIGTERM prints a C++ stack and may abort the process while it is closing.
            signal.signal(number, handler)


def _set(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set or remove environment variables; return their previous values."""
    before = {name: os.environ.get(name) for name in variables}
    _restore(variables)
    return before


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
