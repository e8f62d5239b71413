"""The Ray runtime: nodes in actors, tensors through the object store, directly between the nodes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starling.algorithms.api import SERVER
from starling.orchestrator.errors import ClusterError
from starling.orchestrator.runtimes.cluster.actors import ActorPool
from starling.orchestrator.runtimes.cluster.attempt import RunningAttempt
from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
from starling.orchestrator.runtimes.cluster.exchanges import ObjectExchange
from starling.orchestrator.runtimes.cluster.messages import ClusterMessages, SentLetters
from starling.orchestrator.runtimes.cluster.models import ClusterModels
from starling.orchestrator.runtimes.cluster.monitors import Monitors
from starling.orchestrator.runtimes.cluster.placement import Placement
from starling.orchestrator.runtimes.cluster.processes import ClusterProcesses
from starling.orchestrator.runtimes.cluster.programs import ProgramDriver
from starling.orchestrator.runtimes.cluster.start_up import StartUp
from starling.orchestrator.runtimes.cluster.states import StateStore
from starling.orchestrator.runtimes.cluster.store import StoreRoom
from starling.orchestrator.runtimes.cluster.transport import Transport
from starling.orchestrator.runtimes.traffic import contribution_bytes, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from starling.actors.data.fingerprint import Fingerprint
    from starling.algorithms.api import Layout, NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.events import Happening, NodeFacts

_LOG = logging.getLogger("starling")


class Cluster:
    """Composes the parts of the Ray runtime; ``interface.Runtime`` is its contract.

    Args:
        config: of the run.
        placement: where actors go; by default they are spread over the configured Ray.
        loop: of the controller's thread; tests set its clock.
    """

    virtual = False
    standing = None
    layout: Layout
    baselines: dict[str, float]

    def __init__(self, config: Config, placement: Placement | None = None, loop: EventLoop | None = None) -> None:
        self._config = config
        self.num_parts: int | None = None
        self.part_sizes: tuple[int, ...] | None = None
        cluster = config.cluster
        self._placement = placement or Placement(config)
        self._loop = loop = loop or EventLoop()
        self.pool = pool = ActorPool(loop, self._gone, self._placement.output_of)
        self.processes = ClusterProcesses(config, loop, pool, self._placement)
        self._monitors = Monitors(config, loop, pool, self._placement, self.processes)
        self.attempt = attempt = RunningAttempt(loop)
        self._transport = transport = Transport(config.network, loop)
        self._room = room = StoreRoom(pool, attempt, self._placement)
        self.exchanges = ObjectExchange(loop, pool, attempt, transport, room)
        self._letters = letters = SentLetters(transport, room)
        grace_s = cluster.cancel_grace_s
        self.programs = ProgramDriver(loop, pool, attempt, self.exchanges, letters, transport, grace_s)
        keeps = not config.algorithm.synchronous
        self.messages = ClusterMessages(loop, pool, attempt, letters, self.programs, transport, keeps=keeps)
        self.states = StateStore(loop, pool, transport, cluster.round_deadline_s)
        self.models = ClusterModels(pool)

    def _gone(self, node: NodeId) -> None:
        self.states.gone(node)

    @property
    def now(self) -> float:
        return self._loop.now

    @property
    def fingerprint(self) -> Fingerprint:
        return self.processes.same_data.fingerprint

    @property
    def transport_nbytes(self) -> int:
        return self._transport.nbytes

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> list[NodeFacts]:
        try:
            return self._start()
        except Exception:
            self._placement.check()  # what failed is a consequence, of which nobody can make anything
            raise

    def _start(self) -> list[NodeFacts]:
        config, cluster = self._config, self._config.cluster
        # Our own Ray has room for spares, and for one more process, in which a node goes on whose own is to end.
        extra = (cluster.warm_spares + 1) * cluster.nodes_per_actor + config.algorithm.has_server
        self._placement.connect(cluster.num_cpus * (config.num_nodes + extra))
        self._monitors.watch_ray()
        up = StartUp(config, self._loop, self.pool, self._placement, self.processes).run(self.num_parts)
        self.num_parts = self.processes.num_parts
        first = up[0].facts
        self.layout, self.baselines, self.part_sizes = first.layout, first.baselines, first.part_sizes
        self._warn_of_stores([node for actor in up for node in actor.nodes if node != SERVER])
        self._monitors.watch_run()
        return [self.pool.home[node].facts_of(node) for actor in up for node in actor.nodes]

    def _warn_of_stores(self, nodes: Sequence[NodeId]) -> None:
        """Warn before the first round, which may be long, that its exchanges will hardly fit."""
        each = contribution_bytes(self._config.algorithm, self.layout, len(nodes))
        try:
            self._room.check(stored_bytes(each, sorted(nodes), self.pool.place_of), "an exchange")
        except ClusterError as error:
            _LOG.warning("%s", error)

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        del seconds
        self._transport.nbytes = transport_nbytes or 0

    def check(self) -> None:
        self._monitors.check()

    def close(self) -> None:
        self.exchanges.release()
        self.states.close()
        self._letters.payloads.clear()
        self._monitors.hasten()
        # On a Ray of our own, its end takes the processes along.
        self.pool.close(wait=self._placement.is_shared)
        self._placement.close()
        self._monitors.stop()

    # --- the controller's decisions ----------------------------------------------------------------------------------

    def next(self, until: float) -> Happening | None:
        return self._loop.next(until)

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        self.states.retire(nodes, empty)
