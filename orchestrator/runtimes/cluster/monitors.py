"""Monitors of a run on Ray: machines that die or drain, processes of Ray itself, object stores, system metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.orchestrator.runtimes.cluster import session, store
from starling.orchestrator.runtimes.cluster.vitals import Vitals, state_of
from starling.orchestrator.runtimes.events import Room, Used

if TYPE_CHECKING:
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.placement import Placement
    from starling.orchestrator.runtimes.cluster.processes import ClusterProcesses
    from starling.orchestrator.runtimes.cluster.session import Machines

_STANDSTILL_S = 20.0
"""Besides ``cluster.cancel_grace_s``: how long Ray's own processes may stand still before they are ended."""

_USAGE_PERIOD_S, _FIRST_USAGE_S = 10.0, 2.0
"""Seconds between two requests for system metrics, and before the first."""


class Monitors:
    """Polls in threads of its own, and reports in the controller's.

    Args:
        config: of the run.
        loop: takes what the threads find.
        pool: the actors.
        placement: the Ray that is watched.
        processes: told of machines that are about to leave.
    """

    def __init__(
        self, config: Config, loop: EventLoop, pool: ActorPool, placement: Placement, processes: ClusterProcesses
    ) -> None:
        self._config = config
        self._loop = loop
        self._pool = pool
        self._placement = placement
        self._processes = processes
        self._vital: dict[str, int] = {}
        """Process ids of a Ray of our own, without which nothing goes on."""
        self._vitals: Vitals | None = None
        self._machines: session.MachineWatch | None = None
        self._stores: store.StoreWatch | None = None

    def watch_ray(self) -> None:
        """Watch the processes of a Ray of our own, from its start on."""
        self._vital = dict(self._placement.vital)
        if self._vital:
            patience_s = _STANDSTILL_S + self._config.cluster.cancel_grace_s
            self._vitals = Vitals(
                self._vital, patience_s, lambda name: self._loop.submit(lambda: self._say_ended(name))
            )

    def watch_run(self) -> None:
        """Watch machines, stores and system metrics, once the nodes are up."""
        self._machines = session.MachineWatch(lambda machines: self._loop.submit(lambda: self._on_machines(machines)))
        self._stores = store.StoreWatch(is_local=self._placement.is_local)
        self._loop.after(_FIRST_USAGE_S, self._measure)

    def check(self) -> None:
        """Raise ``RunError`` if a process of a Ray of our own has ended."""
        ended = [name for name, pid in self._vital.items() if state_of(pid) in (None, "Z", "X")]
        if ended and (self._placement.is_local or self._placement.is_shared):
            self._say_ended(ended[0])

    def _say_ended(self, name: str) -> None:
        raise self._placement.ended(name)

    def _measure(self) -> None:
        """Ask all processes for system metrics, but those that have not answered the last time yet."""
        self._loop.after(_USAGE_PERIOD_S, self._measure)
        for actor in self._pool.actors:
            if actor.alive and actor.ready is not None and actor.nodes and not actor.is_asked:
                actor.is_asked = True
                self._pool.call(actor, actor.handle.usage.remote(), self._on_usage)

    def _on_usage(self, actor: Actor, values: dict[str, float]) -> None:
        actor.is_asked = False
        self._loop.report(*(Used(node, values) for node in actor.nodes if self._pool.home[node] is actor))

    def _on_machines(self, machines: Machines) -> None:
        """Take a poll of Ray's machines, of which there is one every few hundred milliseconds."""
        for actor in self._pool.actors:
            if not actor.alive or actor.ready is None:
                continue
            machine = actor.ready.machine
            if machine in machines.dead:
                self._pool.lost(actor, session.MachineLostError("its machine is gone"))
            elif machine in machines.draining:
                left_s = machines.draining[machine]
                drain_s = self._config.cluster.drain_s if left_s is None else left_s
                self._processes.notice(actor, drain_s, "its machine is to be taken away (drain)")
        if self._config.cluster.nodes.target == "auto":
            num_alive = sum(actor.alive for actor in self._pool.actors)
            self._loop.report(Room(self._placement.count_free(self._config.cluster.nodes_per_actor, num_alive)))

    def hasten(self) -> None:
        """The run ends: poll no more, and end a process of Ray at once that stands still and would block the end."""
        if self._vitals is not None:
            self._vitals.hasten()
        for watch in (self._machines, self._stores):
            if watch is not None:
                watch.stop()

    def stop(self) -> None:
        """Ray has been disconnected: watch nothing any more."""
        if self._vitals is not None:
            self._vitals.stop()
