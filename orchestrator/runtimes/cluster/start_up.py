"""Start-up on Ray: the processes of a run's first nodes, in waves, until enough are ready."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import ray

from starling.actors.wire.tickets import Failed
from starling.algorithms.api import SERVER
from starling.algorithms.words import listed
from starling.orchestrator.errors import ClusterError, NodeFailedError, NodeLostError
from starling.orchestrator.protocol.events import Reached
from starling.orchestrator.runtimes.cluster import session
from starling.orchestrator.runtimes.cluster.event_loop import POLL_S
from starling.orchestrator.runtimes.events import Died, Happening, Log, Notice, NotUp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.cluster.actors import Actor, ActorPool
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.cluster.placement import Placement
    from starling.orchestrator.runtimes.cluster.processes import ClusterProcesses

_LOG = logging.getLogger("starling")

_MAX_STARTS = 3
"""Starts of one node before the run begins."""

_FIRST_WAVE = 8
"""Processes that are started before any others."""


class StartUp:
    """Starts the processes of the initial nodes, and waits for those that find a place.

    Args:
        config: of the run.
        loop: gives the events meanwhile, and takes those back that are for later.
        pool: the actors.
        placement: counts the places.
        processes: starts actors.
    """

    def __init__(
        self, config: Config, loop: EventLoop, pool: ActorPool, placement: Placement, processes: ClusterProcesses
    ) -> None:
        self._config = config
        self._loop = loop
        self._pool = pool
        self._placement = placement
        self._processes = processes

    def run(self, num_parts: int | None) -> list[Actor]:
        """Start the nodes, and return the actors that are ready.

        Args:
            num_parts: into how many parts the data are divided; None: one for each node.

        Raises:
            StarlingError: they do not come up.
        """
        config = self._config
        nodes = self._nodes_with_room()
        places = self._processes.groups(nodes)
        # Nodes that come later are handed what others leave; federated data are each node's own.
        grows = config.cluster.nodes.target == "auto" and config.data.source != "federated"
        self._processes.num_parts = num_parts or (len(nodes) if grows else config.num_nodes)
        self._room_for(places)
        # What is wrong with the data or the task shows on the first few; a hundred processes need not start for it.
        for wave in (places[:_FIRST_WAVE], places[_FIRST_WAVE:]):
            for members in wave:
                self._processes.start_actor(members)
            self._wait_until_ready(places)
        if config.algorithm.has_server:
            self._processes.start_actor((SERVER,))
            self._wait_until_ready(places)
        self._processes.begun = True
        return [actor for actor in self._pool.actors if actor.alive and actor.ready is not None]

    def _nodes_with_room(self) -> list[NodeId]:
        """Return the nodes with which the run begins."""
        nodes, config = [*self._config.initial_nodes], self._config
        if config.cluster.nodes.target != "auto":
            return nodes
        per_process = config.cluster.nodes_per_actor
        free = self._placement.count_free(per_process, len(self._pool.actors)) * per_process
        return nodes[: max(free, config.cluster.nodes.min)]

    def _room_for(self, places: Sequence[tuple[NodeId, ...]]) -> int:
        """Count the processes that find a place, or will with machines that the autoscaler brings; others start later.

        Raises:
            ClusterError: these are fewer than ``nodes.min``. An endless wait for a place would say less.
        """
        cluster = self._config.cluster
        there = min(self._placement.count(len(places[0])), len(places))
        if sum(len(members) for members in places[:there]) >= cluster.nodes.min and there:
            return there
        if session.brings_machines():
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
        deadline = self._loop.now + self._config.cluster.start_timeout_s
        later: list[Happening] = []
        # The server is wanted in any case.
        extra = sum(SERVER in actor.nodes for actor in self._pool.actors)
        # Counted again and again: Ray needs seconds to learn that a machine has died.
        while True:
            alive = [actor for actor in self._pool.actors if actor.alive]
            if sum(actor.ready is not None for actor in alive) >= min(self._room_for(places) + extra, len(alive)):
                break
            happening = self._loop.next(min(deadline, self._loop.now + POLL_S))
            match happening:
                case Log() | Notice():
                    later.append(happening)
                case Reached(_, Failed(message, traceback)):
                    raise NodeFailedError(message, traceback)
                case NotUp(node, reason) | Died(node, reason):
                    later.append(self._start_again(places, node, reason))
                case _ if self._loop.now >= deadline:
                    names = listed(node for actor in alive if actor.ready is None for node in actor.nodes)
                    message = (
                        f"cluster: nodes {names} did not come up within {self._config.cluster.start_timeout_s:g} s; "
                        "is there room for them (ray status)? raise cluster.start_timeout_s if they are only slow"
                    )
                    raise ClusterError(message)
                case _:
                    pass
        self._loop.report_first(later)  # once there is somebody to take it

    def _start_again(self, places: Sequence[tuple[NodeId, ...]], node: NodeId, reason: str) -> Log:
        """Start the process of a lost node again; return what its log is to say.

        Raises:
            NodeLostError: it has been lost too often.
        """
        if self._processes.num_starts[node] >= _MAX_STARTS:
            raise NodeLostError(f"node {node} was lost while it started, {_MAX_STARTS} times: {reason}")
        # A machine that has just died is still counted among those where there is room.
        together = next((members for members in places if node in members), (node,))
        if not any(actor.alive and actor.nodes == together for actor in self._pool.actors):
            self._processes.start_actor(together)
        return Log(node, (f"node {node} was lost while it started: {reason}; it is started again",))


def _asking(count: int, what: str) -> str:
    return f"{count} nodes ask for {what} each" if count > 1 else f"1 node asks for {what}"
