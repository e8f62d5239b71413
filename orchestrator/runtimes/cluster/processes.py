"""Processes on Ray: started for nodes or to stand by, given notice, probed, and struck by faults."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from starling.actors.data.fingerprint import difference
from starling.actors.host.compatibility import versions
from starling.actors.remote.messages import Ready, Setup
from starling.actors.remote.node_actor import remote_class
from starling.actors.wire.tickets import Failed
from starling.algorithms.api import SERVER
from starling.algorithms.registry import carried
from starling.algorithms.words import listed
from starling.orchestrator.errors import DataError
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.runtimes.events import Log, Notice, Up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from starling.actors.data.fingerprint import Fingerprint
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.placement import Placement

_FETCH_TIMEOUT_S = 60.0
"""A contribution that cannot be fetched in this time is missing."""


class SameData:
    """Compares the data of every process with those of the first one.

    Args:
        task: name of the task, for messages.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._first: Ready | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the first process's data; empty before it is up."""
        return {} if self._first is None else self._first.fingerprint

    def compare(self, nodes: Sequence[NodeId], ready: Ready) -> None:
        """Compare the data of a process that hosts ``nodes``.

        Raises:
            DataError: they differ; names the process and the difference.
        """
        if self._first is None:
            self._first = ready
            return
        unlike = difference(self._first.fingerprint, ready.fingerprint)
        if unlike is not None:
            who = f"of node {listed(nodes)}" if nodes else "in the process that stands by"
            raise DataError(
                f"task {self._task}: the data {who} ({ready.place}) are not those of {self._first.place}: {unlike}; "
                "all processes must read the same files, and divide them alike (at random only with a seed)"
            )


class ClusterProcesses:
    """Starts actors, lets spares take places, and gives notice.

    Args:
        config: of the run.
        loop: reports what becomes of processes.
        pool: the actors.
        placement: where new actors go.
    """

    def __init__(self, config: Config, loop: EventLoop, pool: ActorPool, placement: Placement) -> None:
        self._config = config
        self._loop = loop
        self._pool = pool
        self._placement = placement
        self.same_data = SameData(config.task.name)
        self.num_parts = config.num_nodes
        """Number of parts of the data; ``start`` may set another before the first launch."""
        self.begun = False
        """Whether all initial nodes are up: a failing process is then a lost one, and no longer an error of the run."""
        self.num_starts: Counter[NodeId] = Counter()
        """Number of processes that each node has been given."""

    # --- launch ------------------------------------------------------------------------------------------------------

    @property
    def num_spares(self) -> int:
        return sum(actor.is_spare for actor in self._pool.actors)

    def stand_by(self, count: int) -> None:
        for _ in range(count):
            self.start_actor(())

    def launch(self, nodes: Sequence[NodeId]) -> None:
        for members in self.groups(nodes):
            if any(actor.alive and actor.ready is None and actor.nodes == members for actor in self._pool.actors):
                continue  # another node of that process has asked for it
            # One that is still being started is sooner there than one that is not.
            spares = sorted((one for one in self._pool.actors if one.is_spare), key=lambda one: one.ready is None)
            if not spares or SERVER in members:
                self.start_actor(members)
                continue
            self._take_place(spares[0], members, self._count_start(members))

    def groups(self, nodes: Iterable[NodeId]) -> list[tuple[NodeId, ...]]:
        """Group nodes by process; a node always shares one with the same others."""
        together: defaultdict[int, list[NodeId]] = defaultdict(list)
        for node in nodes:
            together[node // self._config.cluster.nodes_per_actor if node != SERVER else SERVER].append(node)
        return [tuple(members) for members in together.values()]

    def start_actor(self, nodes: tuple[NodeId, ...]) -> None:
        """Start an actor that hosts ``nodes``; without nodes it stands by."""
        num_cpus, num_gpus = self._placement.demand(len(nodes) or self._config.cluster.nodes_per_actor)
        options = {
            # A coordinator adds up what others send: it needs no GPU.
            "num_gpus": 0 if SERVER in nodes else num_gpus,
            "num_cpus": num_cpus,
            "max_restarts": 0,  # Ray would start it again without its state
            "scheduling_strategy": self._placement.strategy(),
            # Ray's head keeps a record of some hundred bytes of each call: 29 kB a round of four nodes.
            "enable_task_events": False,
        }
        handle = remote_class().options(**options).remote()
        actor = self._pool.add(nodes, handle, self._count_start(nodes))
        # Parked at once: a process that dies while it starts is noticed like any other.
        self._pool.call(actor, handle.watch.remote(), self._on_watch)
        # It may have to wait for a place; once it has one, it must not take for ever.
        self._pool.call(actor, handle.ping.remote(), self._on_place)
        self._pool.call(actor, handle.setup.remote(self._setup(actor)), self.on_setup)

    def _setup(self, actor: Actor) -> Setup:
        config = self._config.dump()
        return Setup(
            nodes=actor.nodes,
            num_nodes=self.num_parts,
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
            average=config["evaluation"]["average"],
            incarnation=actor.incarnation,
            sys_path=self._placement.sys_path(),
            parts=carried(config),
        )

    def _count_start(self, nodes: tuple[NodeId, ...]) -> int:
        """Return the incarnation that ``nodes`` are about to begin."""
        self.num_starts.update(nodes)
        return max((self.num_starts[node] for node in nodes), default=1) - 1

    def _take_place(self, spare: Actor, nodes: tuple[NodeId, ...], incarnation: int) -> None:
        """Give ``nodes`` to a spare, which may still be starting."""
        is_ready = spare.ready is not None
        spare.nodes, spare.ready, spare.launched, spare.incarnation = nodes, None, self._loop.now, incarnation
        self._pool.host(spare, nodes)
        if is_ready:
            self._embody(spare)
            self._on_place(spare, spare.machine)  # it has had one all the time

    def _embody(self, spare: Actor) -> None:
        self._pool.call(spare, spare.handle.embody.remote(spare.nodes, spare.incarnation), self.on_setup)

    def _relieve(self, spare: Actor) -> None:
        """Give a spare that came up the nodes of an actor that finds no place: the spare may have taken the last."""
        for one in self._pool.actors:
            if one.alive and one.nodes and not one.machine and SERVER not in one.nodes:
                one.alive = False
                self._pool.kill(one)
                self._take_place(spare, one.nodes, one.incarnation)
                return

    def _on_place(self, actor: Actor, machine: str) -> None:
        timeout = self._config.cluster.start_timeout_s
        actor.machine = machine

        def check() -> None:
            if actor.alive and actor.ready is None:
                error = TimeoutError(f"it did not come up within {timeout:g} s (cluster.start_timeout_s)")
                self._pool.lost(actor, error)

        self._loop.after(timeout, check)

    def on_setup(self, actor: Actor, result: Ready | Failed) -> None:
        """Take an actor's answer to ``setup`` or ``embody``.

        Raises:
            DataError: before the run has begun: the actor's versions or data differ from the first one's.
        """
        if isinstance(result, Failed):
            self._on_failed(actor, result)
            return
        if actor.nodes and not result.devices:
            # It was started to stand by, and its place has been given to it meanwhile.
            self._embody(actor)
            return
        try:
            self.same_data.compare(actor.nodes, result)
        except DataError as error:
            if not self.begun:
                raise
            # The others are at one, and go on; a replacement that draws other samples is not to join them.
            self._refuse(actor, result.machine, str(error))
            return
        actor.ready = result
        if actor.is_spare:
            self._relieve(actor)
            return
        for node in actor.nodes:
            self._pool.came_up(actor, node)
            if self.begun:
                self._loop.report(Up(actor.facts_of(node), result.import_s))
            where = f"{result.place}, {result.devices[node]}, {result.num_samples[node]} samples"
            who = "server" if node == SERVER else f"node {node}"
            self._loop.report(Log(node, (f"{who}: {where}", *result.warnings)))

    def _on_failed(self, actor: Actor, failed: Failed) -> None:
        if self.begun:
            # The others could begin with this configuration: it is the machine that lacks data or packages.
            self._refuse(actor, actor.machine, failed.message)
        elif failed.traceback is None:
            raise DataError(failed.message)
        else:
            self._loop.report(Reached(actor.nodes[0] if actor.nodes else 0, failed))

    def _refuse(self, actor: Actor, machine: str, reason: str) -> None:
        """Take an actor for lost, and place no further ones on its machine if there is room elsewhere."""
        if machine:
            self._placement.avoid(machine)
        self._pool.lost(actor, RuntimeError(reason))

    # --- notice ------------------------------------------------------------------------------------------------------

    def _on_watch(self, actor: Actor, _: str) -> None:
        """The parked call only returns when the process got SIGTERM."""
        self._pool.call(actor, actor.handle.watch.remote(), self._on_watch)
        self.notice(actor, self._config.cluster.drain_s, "its process got SIGTERM")

    def notice(self, actor: Actor, left_s: float, reason: str) -> None:
        """Report that an actor ends in ``left_s`` seconds; a spare is lost at once."""
        if not actor.alive or actor.leaving:
            return
        actor.leaving = True
        if actor.is_spare:
            self._pool.lost(actor, RuntimeError(reason))
        deadline = self._loop.now + left_s
        home = self._pool.home
        self._loop.report(*(Notice(node, deadline, reason) for node in actor.nodes if home[node] is actor))

    # --- probes and faults -------------------------------------------------------------------------------------------

    def probe(self, nodes: Sequence[NodeId]) -> None:
        for actor, _ in self._pool.by_actor(nodes):
            if actor.alive:
                self._probe(actor)

    def _probe(self, actor: Actor) -> None:
        grace, answered = self._config.cluster.cancel_grace_s, threading.Event()
        self._pool.call(actor, actor.handle.ping.remote(), lambda _, __: answered.set())

        def check() -> None:
            if actor.alive and not answered.is_set():
                error = TimeoutError(f"it did not answer within {grace:g} s (cluster.cancel_grace_s)")
                self._pool.lost(actor, error)

        self._loop.after(grace, check)

    def kill(self, node: NodeId) -> None:
        self._pool.kill(self._pool.home[node])

    def give_up(self, node: NodeId, reason: str) -> None:
        self._pool.lost(self._pool.home[node], RuntimeError(reason))

    def hang(self, node: NodeId) -> None:
        self._pool.home[node].handle.hang.remote()

    def preempt(self, node: NodeId) -> None:
        self._pool.home[node].handle.preempt.remote()
