"""Several machines on this one: a Ray cluster with a raylet for each, which tests add, drain and kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from starling.orchestrator.records.observers import Observer
from starling.orchestrator.runtimes.cluster import ray_internals, session, watcher
from tests.paths import PYTHONPATH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.records.observers import RoundRecord, Started


_FAST = {
    # A machine's death is known after a second or so instead of fifteen.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
    # Idle workers, one for each CPU, would only delay those that are asked for.
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,
    "worker_niceness": 0,  # 15 by default: on a busy computer a start would take minutes
}


class Machines:
    """A head without room for nodes, and machines beside it; those that a test leaves intact serve the next one."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))  # short: sockets lie in it
        self._before = {name: os.environ.get(name) for name in ("PYTHONPATH",)}
        os.environ["PYTHONPATH"] = PYTHONPATH
        self._environment = session._set(
            {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": session._TOKEN,
                "RAY_USAGE_STATS_ENABLED": "0",
                ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # loopback
            }
        )
        ray_internals.read_authentication_again()
        self._enabled = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            self._cluster = self._start()
            self._session = session.connect(self._cluster.address, num_cpus=0)
        except BaseException:  # nobody has it who could close it
            ray.shutdown()
            watcher.clean(self._folder)
            self._restore()
            raise
        self._sizes: dict[Any, int] = {}
        self._spoilt: set[Any] = set()
        self._started: set[tuple[int, str]] = set()
        """Processes that ran on machines that are gone, with the moment of their start: ids are used again."""

    def _start(self) -> Cluster:
        # The address of the last cluster is written where other users of this machine would find it.
        with (
            ray_internals.bare(),
            mock.patch("ray._private.utils.write_ray_address"),
            mock.patch("ray._private.worker.ray._private.utils.write_ray_address"),
        ):
            return Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "temp_dir": str(self._folder),
                    "include_dashboard": False,
                    "_system_config": _FAST,
                },
            )

    def _restore(self) -> None:
        ray_constants.ENABLE_RAY_CLUSTER = self._enabled
        session._restore(self._environment)
        session._restore(self._before)
        ray_internals.read_authentication_again()

    def provide(self, *sizes: int) -> list[Any]:
        """Machines with so many CPUs each, and no others."""
        wanted, provided = list(sizes), []
        for machine, size in list(self._sizes.items()):
            if size in wanted and machine not in self._spoilt:
                wanted.remove(size)
                provided.append(machine)
            else:
                self.kill(machine)
        provided += map(self.add, wanted)
        deadline = time.monotonic() + 30
        # Ray goes on to count a machine that was killed for a second or so.
        while sum(one["Alive"] for one in ray.nodes()) > len(provided) + 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        return sorted(provided, key=lambda one: sizes.index(self._sizes[one]))

    def add(self, num_cpus: int) -> Any:
        with ray_internals.bare():
            machine = self._cluster.add_node(num_cpus=num_cpus, temp_dir=str(self._folder))
        self._sizes[machine] = num_cpus
        return machine

    def kill(self, machine: Any) -> None:
        """SIGKILL, as if somebody had pulled the plug."""
        self._remove(machine, graceful=False)

    def remove(self, machine: Any) -> None:
        """Take it away as Ray does when nobody needs it."""
        self._remove(machine, graceful=True)

    def _remove(self, machine: Any, *, graceful: bool) -> None:
        if machine not in self._sizes:
            return
        del self._sizes[machine]
        self._started |= _descendants(_raylet(machine))
        self._cluster.remove_node(machine, allow_graceful=graceful)

    def drain(self, machine: Any, seconds: float) -> None:
        """Announce that it will be taken away, as a cloud does with spot machines."""
        self._spoilt.add(machine)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(
            machine.node_id, reason, "a test's", deadline
        )
        assert accepted, why

    def of(self, pid: int) -> Any:
        """The machine on which a process runs."""
        return next(one for one in self._sizes if pid in {child for child, _ in _descendants(_raylet(one))})

    def close(self) -> None:
        """Stop everything; nothing is left."""
        for machine in list(self._sizes):
            self._remove(machine, graceful=False)
        self._started |= _descendants(_raylet(self._cluster.head_node))
        self._session.close()
        self._cluster.shutdown()
        self._restore()
        left = wait_until_gone(self._started)
        shutil.rmtree(self._folder, ignore_errors=True)
        assert left == set()


def _raylet(machine: Any) -> int:
    return machine.all_processes["raylet"][0].process.pid


def _stat(pid: int | str) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; ``None``: there is no such process, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def identity(pid: int) -> tuple[int, str] | None:
    """A process, with the moment of its start."""
    fields = _stat(pid)
    return None if fields is None else (pid, fields[19])


def _descendants(root: int) -> set[tuple[int, str]]:
    children: dict[int, set[tuple[int, str]]] = {}
    for folder in Path("/proc").iterdir():
        fields = _stat(folder.name) if folder.name.isdigit() else None
        if fields is not None:
            children.setdefault(int(fields[1]), set()).add((int(folder.name), fields[19]))
    found: set[tuple[int, str]] = set()
    pending = [root]
    while pending:
        here = children.get(pending.pop(), set())
        pending += [pid for pid, _ in here - found]
        found |= here
    return found


def wait_until_gone(those: set[tuple[int, str]], limit_s: float = 60) -> set[tuple[int, str]]:
    """Which of the processes are still there after a bounded wait."""
    deadline = time.monotonic() + limit_s
    while (left := {one for one in those if identity(one[0]) == one}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@dataclass
class Story(Observer):
    """What happens in a run, and what a test does at which moment of it."""

    events: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[NodeId, list[str]] = field(default_factory=dict)
    pids: dict[NodeId, int] = field(default_factory=dict)
    """Of the process in which each node is, or was last."""
    processes: set[tuple[int, str]] = field(default_factory=set)
    rounds: list[RoundRecord] = field(default_factory=list)
    on: list[tuple[Callable[[Mapping[str, Any]], bool], Callable[[], object]]] = field(default_factory=list)

    def when(self, what: str, do: Callable[[], object], **facts: Any) -> None:
        """Do something, once, at the first event of this kind with these facts."""
        self.on.append((lambda event: {"event": what, **facts}.items() <= event.items(), do))

    def of(self, what: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == what]

    def nodes(self, what: str) -> list[NodeId]:
        """The nodes that events of this kind name, in order."""
        return [event["node"] for event in self.of(what)]

    def _is_at(self, node: NodeId, place: str) -> None:
        match = re.match(r"pid (\d+) on", place)
        assert match is not None
        self.pids[node] = int(match[1])
        known = identity(self.pids[node])
        self.processes |= {known} if known is not None else set()

    def on_start(self, started: Started) -> None:
        for facts in started.nodes:
            self._is_at(facts.node, facts.place)

    def on_log(self, node: NodeId, lines: Sequence[str]) -> None:
        self.lines.setdefault(node, []).extend(lines)

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))
        if event["event"] == "up":
            self._is_at(event["node"], event["place"])
        due = [one for one in self.on if one[0](event)]
        self.on = [one for one in self.on if one not in due]
        for _, do in due:
            do()

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def terminate(self, node: NodeId) -> None:
        """A real SIGTERM for the process of a node."""
        os.kill(self.pids[node], signal.SIGTERM)
