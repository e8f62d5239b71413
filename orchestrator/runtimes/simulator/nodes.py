"""Simulated nodes: their replicas, all in one host, and which of them are present."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.host import Host
from starling.actors.host.recorded_clock import Times
from starling.orchestrator.runtimes.events import NodeFacts
from starling.orchestrator.runtimes.user_code import user_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.host.build import RunData
    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock


class SimulatedNodes:
    """Builds replicas, and knows which nodes are present and which hang.

    Args:
        config: of the run.
        clock: shown to programs.
    """

    host: Host
    data: RunData
    fingerprint: Fingerprint
    baselines: dict[str, float]

    def __init__(self, config: Config, clock: VirtualClock) -> None:
        self._config = config
        self._clock = clock
        self._times = Times(lambda: clock.now)
        self._spec = config.replica_spec()
        self.present: set[NodeId] = set()
        """Nodes whose replicas are in the host, and alive."""
        self.hung: set[NodeId] = set()

    def start(self, nodes: Sequence[NodeId], num_parts: int) -> list[NodeFacts]:
        """Build the first nodes, in the initial state; the data are divided into ``num_parts``."""
        with user_code(0, 0):
            self.data = load_data(self._spec.task, self._config.data, num_parts, self._spec.seed)
            self.fingerprint = self.data.fingerprint()
            self.baselines = self._spec.task.baselines(self._config.num_nodes)
            replicas = self._build(nodes)
            self.host = Host(replicas, self._times, alone=True)
            self.host.init()
        self._clock.attempts = dict.fromkeys(nodes, 0)
        self.present = set(nodes)
        return [self.facts_of(one) for one in replicas]

    def build(self, node: NodeId, incarnation: int) -> Replica:
        """Build a replica that is to take a node's place."""
        (replica,) = self._build([node], incarnation)
        return replica

    def _build(self, nodes: Sequence[NodeId], incarnation: int = 0) -> list[Replica]:
        cpu = torch.device("cpu")
        return build_replicas(nodes, self._spec, self.data, [cpu] * len(nodes), self._times, incarnation)

    @staticmethod
    def facts_of(replica: Replica) -> NodeFacts:
        """Return the facts that are reported of a node."""
        return NodeFacts(replica.id, "simulated", "cpu", replica.num_samples)

    def stop(self, node: NodeId) -> None:
        """Stop a node's program for good."""
        self.host.drop(node)
        self._clock.interrupt(node)

    def close(self) -> None:
        """Close all programs: one that never ran would complain."""
        for node in self._clock.attempts:
            self.host.drop(node)
