"""The processes of a run on Ray: started, watched, replaced, and ended. Base of ``cluster.Cluster``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from starling.actors.data.fingerprint import difference
from starling.actors.host.compatibility import versions
from starling.actors.remote.messages import Ready, Setup
from starling.actors.remote.node_actor import remote_class
from starling.actors.wire.tickets import Failed
from starling.algorithms.api import SERVER
from starling.algorithms.registry import carried
from starling.algorithms.words import listed
from starling.orchestrator.errors import ClusterError, DataError, NodeFailedError, NodeLostError
from starling.orchestrator.runtimes.cluster import session as ray_session
from starling.orchestrator.runtimes.cluster import store
from starling.orchestrator.runtimes.cluster.calls import POLL_S, Actor, Calls
from starling.orchestrator.runtimes.cluster.vitals import Vitals, state_of
from starling.orchestrator.runtimes.events import (
    Died,
    Happening,
    Log,
    NodeFacts,
    Notice,
    NotUp,
    Raised,
    Room,
    SpareLost,
    Up,
    Used,
)
from starling.orchestrator.runtimes.traffic import contribution_bytes, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.actors.data.fingerprint import Fingerprint
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.cluster.session import Machines

_LOG = logging.getLogger("starling")

_FETCH_TIMEOUT_S = 60.0
"""A contribution that cannot be fetched in this time is missing."""

_STOP_TIMEOUT_S = 10.0

_STANDSTILL_S = 20.0
"""Besides ``cluster.cancel_grace_s``: how long Ray's own processes may stand still before they are ended."""

_MAX_STARTS = 3
"""Of a node, before the run begins."""

_USAGE_PERIOD_S, _FIRST_USAGE_S = 10.0, 2.0
"""Between two looks at what processes use."""

_FIRST_WAVE = 8
"""Processes that are started before any others."""


def _asking(count: int, what: str) -> str:
    return f"{count} nodes ask for {what} each" if count > 1 else f"1 node asks for {what}"


class Processes(Calls):
    """The actors of a run; see ``runtime.Runtime`` for what their nodes are asked."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self.num_parts: int | None = None
        self.part_sizes: tuple[int, ...] | None = None
        self.fingerprint: Fingerprint = {}
        self._first: Ready | None = None
        """Of the process with whose data those of all others are compared."""
        self._avoided: set[str] = set()
        """Machines on which a process read other data than the first one."""
        self._session: ray_session.Session | None = None
        self._machines: ray_session.MachineWatch | None = None
        self._stores: store.StoreWatch | None = None
        self._vitals: Vitals | None = None
        self._vital: dict[str, int] = {}
        """Processes of a Ray of our own that a run cannot do without."""
        self._actors: list[Actor] = []
        self._home: dict[NodeId, Actor] = {}
        """The process in which each node is, or was last."""
        self._successors: dict[NodeId, Actor] = {}
        """Ready, for nodes that are there still."""
        self._embodied: Counter[NodeId] = Counter()
        self._begun = False
        """``start`` has returned."""
        self._halting: set[NodeId] = set()
        self._retiring: set[NodeId] = set()
        self._retired: set[tuple[int, NodeId]] = set()
        """Nodes that have left, by process: it is ended when all of its nodes have."""

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> list[NodeFacts]:
        try:
            return self._start()
        except Exception:
            if self._session is not None:
                self._session.check()  # what failed is a consequence, of which nobody can make anything
            raise

    def _start(self) -> list[NodeFacts]:
        config, cluster = self._config, self._config.cluster
        per_process = cluster.nodes_per_actor
        # Our own Ray has room for spares, and for one more process, in which a node goes on whose own is to end.
        extra = (cluster.warm_spares + 1) * per_process + config.algorithm.has_server
        self._session = self._connect(cluster.num_cpus * (config.num_nodes + extra))
        self._vital = self._session.vital
        if self._vital:
            patience_s = _STANDSTILL_S + cluster.cancel_grace_s
            self._vitals = Vitals(self._vital, patience_s, lambda name: self._queue.put(lambda: self._say_ended(name)))
        nodes = self._nodes_with_room()
        places = self._places(nodes)
        # Nodes that come later are handed what others leave; federated data are each node's own.
        grows = cluster.nodes.target == "auto" and config.data.source != "federated"
        self.num_parts = self.num_parts or (len(nodes) if grows else config.num_nodes)
        self._room_for(places)
        # What is wrong with the data or the task shows on the first few; a hundred processes need not start for it.
        for wave in (places[:_FIRST_WAVE], places[_FIRST_WAVE:]):
            for members in wave:
                self._launch(members)
            self._wait_until_ready(places)
        if config.algorithm.has_server:
            self._launch((SERVER,))
            self._wait_until_ready(places)
        self._begun = True
        up = [actor for actor in self._actors if actor.alive and actor.ready is not None]
        first = self._facts_of(up[0])
        self.layout, self.baselines, self.part_sizes = first.layout, first.baselines, first.part_sizes
        self._machines = ray_session.MachineWatch(lambda machines: self._queue.put(lambda: self._on_machines(machines)))
        self._warn_of_stores([node for actor in up for node in actor.nodes if node != SERVER])
        self._stores = store.StoreWatch(is_local=self._session.is_local)
        self._after(_FIRST_USAGE_S, self._measure)
        return [self._node_facts(node) for actor in up for node in actor.nodes]

    def check(self) -> None:
        ended = [name for name, pid in self._vital.items() if state_of(pid) in (None, "Z", "X")]
        if ended and self._session is not None:
            self._say_ended(ended[0])

    def _say_ended(self, name: str) -> None:
        """One of Ray's own processes is gone: nothing comes back.

        Raises:
            RunError: always.
        """
        assert self._session is not None
        raise self._session.ended(name)

    def _measure(self) -> None:
        """Ask all processes what they use; one that has not answered yet is not asked again."""
        self._after(_USAGE_PERIOD_S, self._measure)
        for actor in self._actors:
            if actor.alive and actor.ready is not None and actor.nodes and not actor.is_asked:
                actor.is_asked = True
                self._call(actor, actor.handle.usage.remote(), self._on_usage)

    def _on_usage(self, actor: Actor, values: dict[str, float]) -> None:
        actor.is_asked = False
        self._ready.extend(Used(node, values) for node in actor.nodes if self._home[node] is actor)

    def _connect(self, num_cpus: float) -> ray_session.Session:
        """``num_cpus`` are those of a Ray of our own."""
        cluster = self._config.cluster
        return ray_session.connect(
            cluster.address,
            num_cpus=num_cpus,
            object_store_bytes=cluster.object_store_bytes,
            runtime_env=cluster.runtime_env or None,
        )

    def _strategy(self) -> Any:  # noqa: ANN401 - a name, or an object of Ray's
        """Where Ray places processes: on machines that have the right data, if there is room."""
        return ray_session.elsewhere(self._avoided) if self._avoided else "SPREAD"

    def _count_places(self, num_nodes: int, *, free: bool = False) -> int:
        """How many processes of so many nodes there is room for, or (``free``) room left for."""
        return ray_session.places(*self._each(num_nodes), free=free)

    def _sys_path(self) -> tuple[str, ...]:
        """Where processes are to look for modules: as we do, if they are on this machine."""
        return tuple(folder for folder in sys.path if folder) if self._session and self._session.is_local else ()

    def _nodes_with_room(self) -> list[NodeId]:
        """The nodes that the run begins with."""
        nodes, config = [*self._config.initial_nodes], self._config
        if config.cluster.nodes.target != "auto":
            return nodes
        per_process = config.cluster.nodes_per_actor
        free = self._count_places(per_process, free=True) * per_process
        return nodes[: max(free, config.cluster.nodes.min)]

    def _places(self, nodes: Iterable[NodeId]) -> list[tuple[NodeId, ...]]:
        """Nodes by process: the same ones are together, whenever they are started."""
        together: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            together[node // self._config.cluster.nodes_per_actor if node != SERVER else SERVER].append(node)
        return [tuple(members) for members in together.values()]

    def _each(self, num_nodes: int) -> tuple[float, float]:
        """CPUs and GPUs of a process."""
        return self._config.cluster.num_cpus * num_nodes, self._config.cluster.num_gpus * num_nodes

    def _room_for(self, places: Sequence[tuple[NodeId, ...]]) -> int:
        """How many of the processes find a place, or will with machines that the autoscaler brings; others begin later.

        Raises:
            ClusterError: those that do are fewer than ``nodes.min``. An endless wait for a place would say less.
        """
        cluster = self._config.cluster
        there = min(self._count_places(len(places[0])), len(places))
        if sum(len(members) for members in places[:there]) >= cluster.nodes.min and there:
            return there
        if ray_session.brings_machines():
            sizes = itertools.accumulate(len(members) for members in places)
            return next((count for count, size in enumerate(sizes, 1) if size >= cluster.nodes.min), len(places))
        available = ray.cluster_resources()
        for resource, each in (("GPU", cluster.num_gpus), ("CPU", cluster.num_cpus)):
            if each * max(cluster.nodes.min, 1) > available.get(resource, 0.0) + 1e-6:
                break
        message = (
            f"cluster: {_asking(max(cluster.nodes.min, 1), f'{each:g} {resource}')}, "
            f"the cluster has {available.get(resource, 0.0):g} (ray status); "
            f"lower cluster.nodes.min or cluster.num_{resource.lower()}s, or add machines"
        )
        raise ClusterError(message)

    def _wait_until_ready(self, places: Sequence[tuple[NodeId, ...]]) -> None:
        """Wait for all processes that were started, or for as many of ``places`` as there is room for.

        Raises:
            StarlingError: they do not come up.
        """
        deadline = self.now + self._config.cluster.start_timeout_s
        later: list[Happening] = []
        # The server is wanted in any case.
        extra = sum(SERVER in actor.nodes for actor in self._actors)
        # Counted again and again: Ray needs seconds to learn that a machine has died.
        while True:
            alive = [actor for actor in self._actors if actor.alive]
            if sum(actor.ready is not None for actor in alive) >= min(self._room_for(places) + extra, len(alive)):
                break
            happening = self.next(min(deadline, self.now + POLL_S))
            match happening:
                case Log() | Notice():
                    later.append(happening)
                case Raised(_, message, traceback):
                    raise NodeFailedError(message, traceback)
                case NotUp(node, reason) | Died(node, reason):
                    if self._embodied[node] >= _MAX_STARTS:
                        message = f"node {node} was lost while it started, {_MAX_STARTS} times: {reason}"
                        raise NodeLostError(message)
                    # A machine that has just died is still counted among those where there is room.
                    later.append(Log(node, (f"node {node} was lost while it started: {reason}; it is started again",)))
                    together = next((members for members in places if node in members), (node,))
                    if not any(actor.alive and actor.nodes == together for actor in self._actors):
                        self._launch(together)
                case _ if self.now >= deadline:
                    names = listed(node for actor in alive if actor.ready is None for node in actor.nodes)
                    message = (
                        f"cluster: nodes {names} did not come up within {self._config.cluster.start_timeout_s:g} s; "
                        "is there room for them (ray status)? raise cluster.start_timeout_s if they are only slow"
                    )
                    raise ClusterError(message)
                case _:
                    pass
        self._ready.extendleft(reversed(later))  # once there is somebody to take it

    def close(self) -> None:
        if self._vitals is not None:
            self._vitals.hasten()  # what is stopped would keep Ray from ending
        if self._machines is not None:
            self._machines.stop()
        if self._stores is not None:
            self._stores.stop()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor.handle, no_restart=True)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        # The parked calls tell when the processes are really gone; on a Ray of our own, its end takes them along.
        shared = self._session is not None and not self._session.is_local
        while shared and any(actor.alive for actor in self._actors) and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # a late answer may be an error, which matters no more
                self.next(min(deadline, time.monotonic() + POLL_S))
        self._actors = []
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None
        if self._vitals is not None:
            self._vitals.stop()

    # --- nodes that come ---------------------------------------------------------------------------------------------

    @property
    def num_spares(self) -> int:
        return sum(actor.is_spare for actor in self._actors)

    def stand_by(self, count: int) -> None:
        for _ in range(count):
            self._launch(())

    def launch(self, nodes: Sequence[NodeId]) -> None:
        for members in self._places(nodes):
            if any(actor.alive and actor.ready is None and actor.nodes == members for actor in self._actors):
                continue  # another node of that process has asked for it
            # One that is still being started is sooner there than one that is not.
            spares = sorted((one for one in self._actors if one.is_spare), key=lambda one: one.ready is None)
            if not spares or SERVER in members:
                self._launch(members)
                continue
            self._take_place(spares[0], members, self._count_embodiment(members))

    def _take_place(self, spare: Actor, nodes: tuple[NodeId, ...], incarnation: int) -> None:
        """Let a process that stands by, or is being started for that, take a place."""
        is_ready = spare.ready is not None
        spare.nodes, spare.ready, spare.launched, spare.incarnation = nodes, None, self.now, incarnation
        for node in nodes:
            self._home.setdefault(node, spare)
        if is_ready:
            self._embody(spare)
            self._on_place(spare, None)  # it has had one all the time

    def _embody(self, spare: Actor) -> None:
        self._call(spare, spare.handle.embody.remote(spare.nodes, spare.incarnation), self._on_setup)

    def _relieve(self, spare: Actor) -> None:
        """Let a spare that has come up take the place of nodes that Ray has no room for: it has had the last."""
        for one in self._actors:
            if one.alive and one.nodes and not one.placed and SERVER not in one.nodes:
                one.alive = False
                ray.kill(one.handle, no_restart=True)
                self._take_place(spare, one.nodes, one.incarnation)
                return

    def _count_embodiment(self, nodes: tuple[NodeId, ...]) -> int:
        self._embodied.update(nodes)
        return max((self._embodied[node] for node in nodes), default=1) - 1

    def _launch(self, nodes: tuple[NodeId, ...]) -> None:
        """Start a process for ``nodes``, or one that stands by."""
        cluster = self._config.cluster
        num_cpus, num_gpus = self._each(len(nodes) or cluster.nodes_per_actor)
        options = {
            # A coordinator adds up what others send: it needs no GPU.
            "num_gpus": 0 if SERVER in nodes else num_gpus,
            "num_cpus": num_cpus,
            "max_restarts": 0,  # Ray would start it again without its state
            "scheduling_strategy": self._strategy(),
            # Ray's head keeps a record of some hundred bytes of each call: 29 kB a round of four nodes.
            "enable_task_events": False,
        }
        handle = remote_class().options(**options).remote()
        actor = Actor(len(self._actors), nodes, handle, self.now, self._count_embodiment(nodes))
        self._actors.append(actor)
        for node in nodes:
            self._home.setdefault(node, actor)
        # Parked at once: a process that dies while it starts is noticed like any other.
        self._call(actor, handle.watch.remote(), self._on_watch)
        # It may have to wait for a place; once it has one, it must not take for ever.
        self._call(actor, handle.ping.remote(), self._on_place)
        self._call(actor, handle.setup.remote(self._setup(actor)), self._on_setup)

    def _setup(self, actor: Actor) -> Setup:
        config = self._config.dump()
        return Setup(
            nodes=actor.nodes,
            num_nodes=self.num_parts or self._config.num_nodes,
            algorithm=config["algorithm"],
            task=config["task"],
            data=config["data"],
            optimizer=config["optimizer"],
            seed=self._config.seed,
            rounds=self._config.rounds,
            skip_nan=self._config.on_nan == "skip",
            fetch_timeout_s=_FETCH_TIMEOUT_S,
            drain_s=self._config.cluster.drain_s,
            versions=versions(),
            incarnation=actor.incarnation,
            sys_path=self._sys_path(),
            parts=carried(config),
        )

    def _on_place(self, actor: Actor, _: object) -> None:
        timeout = self._config.cluster.start_timeout_s
        actor.placed = True

        def check() -> None:
            if actor.alive and actor.ready is None:
                self._lost(actor, TimeoutError(f"it did not come up within {timeout:g} s (cluster.start_timeout_s)"))

        self._after(timeout, check)

    def _on_setup(self, actor: Actor, result: Ready | Failed) -> None:
        if isinstance(result, Failed):
            if self._begun:
                self._lost(actor, RuntimeError(result.message))
                return
            if result.traceback is None:
                raise DataError(result.message)
            self._ready.append(Raised(actor.nodes[0] if actor.nodes else 0, result.message, result.traceback))
            return
        if actor.nodes and not result.devices:
            # It was started to stand by, and its place has been given to it meanwhile.
            self._embody(actor)
            return
        try:
            self._compare(actor, result)
        except DataError as error:
            if not self._begun:
                raise
            # The others are at one, and go on; a replacement that draws other samples is not to join them.
            self._avoided.add(result.machine)
            self._lost(actor, RuntimeError(str(error)))
            return
        actor.ready = result
        if actor.is_spare:
            self._relieve(actor)
            return
        for node in actor.nodes:
            if self._home[node].alive and self._home[node] is not actor:
                self._successors[node] = actor
            else:
                self._home[node] = actor
            if self._begun:
                self._ready.append(Up(self._facts(actor, node), result.import_s))
            where = f"{result.place}, {result.devices[node]}, {result.num_samples[node]} samples"
            who = "server" if node == SERVER else f"node {node}"
            self._ready.append(Log(node, (f"{who}: {where}", *result.warnings)))

    def _compare(self, actor: Actor, ready: Ready) -> None:
        """Compare a process's data with those of the first one.

        Raises:
            DataError: they are others; names the process, and what is not alike.
        """
        if self._first is None:
            self._first, self.fingerprint = ready, ready.fingerprint
            return
        unlike = difference(self._first.fingerprint, ready.fingerprint)
        if unlike is not None:
            nodes = listed(actor.nodes)
            who = (
                f"of node {nodes} ({ready.place})" if actor.nodes else f"in the process that stands by ({ready.place})"
            )
            raise DataError(
                f"task {self._config.task.name}: the data {who} are not those of {self._first.place}: {unlike}; "
                "all processes must read the same files, and divide them alike (at random only with a seed)"
            )

    def _place(self, node: NodeId) -> tuple[str, int]:
        """Ray's name for the machine of a node that is up, and its process."""
        home = self._home[node]
        return self._facts_of(home).machine, home.index

    def _room_in_stores(self, needed: Mapping[str, int], what: str) -> None:
        store.check_room(needed, what, is_local=self._session is not None and self._session.is_local)

    def _warn_of_stores(self, nodes: Sequence[NodeId]) -> None:
        """Say before the first round, which may be long, that its exchanges will hardly fit."""
        assert self.layout is not None
        each = contribution_bytes(self._config.algorithm, self.layout, len(nodes))
        try:
            self._room_in_stores(stored_bytes(each, sorted(nodes), self._place), "an exchange")
        except ClusterError as error:
            _LOG.warning("%s", error)

    @staticmethod
    def _facts_of(actor: Actor) -> Ready:
        assert actor.ready is not None
        return actor.ready

    def _node_facts(self, node: NodeId) -> NodeFacts:
        return self._facts(self._home[node], node)

    def _facts(self, actor: Actor, node: NodeId) -> NodeFacts:
        ready = self._facts_of(actor)
        return NodeFacts(node, ready.place, ready.devices[node], ready.num_samples[node], ready.gpus, ready.warnings)

    # --- nodes that go -----------------------------------------------------------------------------------------------

    def _on_watch(self, actor: Actor, _: str) -> None:
        """The parked call only returns when the process got SIGTERM."""
        self._call(actor, actor.handle.watch.remote(), self._on_watch)
        self._notice(actor, self.now + self._config.cluster.drain_s, "its process got SIGTERM")

    def _notice(self, actor: Actor, deadline: float, reason: str) -> None:
        if not actor.alive or actor.leaving:
            return
        actor.leaving = True
        if actor.is_spare:
            self._lost(actor, RuntimeError(reason))
        self._ready.extend(Notice(node, deadline, reason) for node in actor.nodes if self._home[node] is actor)

    def _on_machines(self, machines: Machines) -> None:
        """What Ray says of machines, which it asks every few hundred milliseconds."""
        for actor in self._actors:
            if not actor.alive or actor.ready is None:
                continue
            machine = actor.ready.machine
            if machine in machines.dead:
                self._lost(actor, ray_session.MachineLostError("its machine is gone"))
            elif machine in machines.draining:
                left_s = machines.draining[machine]
                drain_s = self._config.cluster.drain_s if left_s is None else left_s
                self._notice(actor, self.now + drain_s, "its machine is to be taken away (drain)")
        if self._config.cluster.nodes.target == "auto":
            self._ready.append(Room(self._count_places(self._config.cluster.nodes_per_actor, free=True)))

    def probe(self, nodes: Sequence[NodeId]) -> None:
        for actor, _ in self._by_actor(nodes):
            if actor.alive:
                self._probe(actor)

    def _probe(self, actor: Actor) -> None:
        grace, answered = self._config.cluster.cancel_grace_s, threading.Event()
        self._call(actor, actor.handle.ping.remote(), lambda _, __: answered.set())

        def check() -> None:
            if actor.alive and not answered.is_set():
                self._lost(actor, TimeoutError(f"it did not answer within {grace:g} s (cluster.cancel_grace_s)"))

        self._after(grace, check)

    def kill(self, node: NodeId) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self._home[node].handle, no_restart=True)

    def hang(self, node: NodeId) -> None:
        self._home[node].handle.hang.remote()

    def preempt(self, node: NodeId) -> None:
        self._home[node].handle.preempt.remote()

    def _lost(self, actor: Actor, error: BaseException) -> None:
        """A call failed: the process is dead, or suspect because our own methods never raise. Then it is killed."""
        spare, was_up = actor.is_spare, actor.ready is not None
        actor.alive = False
        reason = ray_session.reason_of(error)
        if not isinstance(error, ray.exceptions.ActorDiedError):
            with contextlib.suppress(Exception):
                ray.kill(actor.handle, no_restart=True)
        if spare:
            self._ready.append(SpareLost(reason))
            return
        output = self._session.worker_output(actor.ready.pid) if self._session and actor.ready else []
        for node in actor.nodes:
            if (actor.index, node) in self._retired:
                continue  # it had left before, and another process has its place
            if output:
                self._ready.append(Log(node, tuple(output)))
            if self._home[node] is actor and was_up:
                self._retiring.discard(node)
                self._on_gone(node)
                self._ready.append(Died(node, reason))
            else:
                self._successors.pop(node, None)
                self._ready.append(NotUp(node, reason))
            self._succeed(node)

    def _on_gone(self, node: NodeId) -> None:
        """A node is gone, and was not expected to be."""

    def _succeed(self, node: NodeId) -> None:
        """Let who was started for a leaving node take its place."""
        successor = self._successors.pop(node, None)
        if successor is not None:
            self._home[node] = successor

    def _by_actor(self, nodes: Iterable[NodeId]) -> list[tuple[Actor, list[NodeId]]]:
        """Messages to one process travel as one call with a list of its nodes."""
        grouped: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            grouped[self._home[node].index].append(node)
        return [(self._actors[index], members) for index, members in grouped.items()]
