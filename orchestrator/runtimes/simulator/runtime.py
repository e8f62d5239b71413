"""The simulator: all nodes in one process, under a virtual clock and a model of the network. Deterministic.

It runs the same programs, rendezvous and reductions as a cluster. Training and reductions are carried out for real, so
the results are the cluster's to the last bit. Only time is modelled: a step of ``Train`` takes ``network.step_ms /
speed``, and payloads arrive when ``network.Network`` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from starling.algorithms.api import SERVER
from starling.orchestrator.runtimes.network import Network
from starling.orchestrator.runtimes.simulator.clock import ALWAYS, VirtualClock
from starling.orchestrator.runtimes.simulator.exchanges import SimulatedExchanges
from starling.orchestrator.runtimes.simulator.messages import SimulatedMessages
from starling.orchestrator.runtimes.simulator.models import SimulatedModels
from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes
from starling.orchestrator.runtimes.simulator.processes import SimulatedProcesses
from starling.orchestrator.runtimes.simulator.programs import SimulatedPrograms
from starling.orchestrator.runtimes.simulator.standing import SimulatedStanding
from starling.orchestrator.runtimes.simulator.states import SimulatedStates

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.host.host import Host
    from starling.algorithms.api import Layout, NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.events import Happening, NodeFacts
    from starling.orchestrator.runtimes.simulator.programs import Resume


class Simulator:
    """Composes the parts of the in-process runtime; ``interface.Runtime`` is its contract.

    Args:
        config: of the run.
    """

    virtual = True
    transport_nbytes = None
    layout: Layout
    baselines: dict[str, float]
    part_sizes: tuple[int, ...] | None = None

    def __init__(self, config: Config) -> None:
        self._config = config
        self.num_parts: int | None = None
        self.fingerprint: Fingerprint = {}
        self._threads = torch.get_num_threads()
        self.clock = clock = VirtualClock()
        self._nodes = nodes = SimulatedNodes(config, clock)
        network = Network(config.network)
        self.states = SimulatedStates(clock, nodes, network)
        self.processes = SimulatedProcesses(config, clock, nodes, self.states)
        self.standing = SimulatedStanding(clock, network, self.processes, self.states)
        self.exchanges = SimulatedExchanges(clock, nodes, network)
        self.messages = SimulatedMessages(clock, nodes, network, keeps=not config.algorithm.synchronous)
        self.programs = SimulatedPrograms(config, clock, nodes, self.exchanges, self.messages, self.processes, network)
        self.models = SimulatedModels(nodes)

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def host(self) -> Host:
        """The host of all nodes; there once ``start`` has returned."""
        return self._nodes.host

    def start(self) -> list[NodeFacts]:
        # One thread, as a node actor has: the order of additions inside a matrix product depends on their number.
        torch.set_num_threads(1)
        server = [SERVER] if self._config.algorithm.has_server else []
        self.num_parts = self.num_parts or self._config.num_nodes
        nodes = [*(self.standing.initial or self._config.initial_nodes), *server]
        facts = self._nodes.start(nodes, self.num_parts)
        self.baselines, self.part_sizes = self._nodes.baselines, self._nodes.data.part_sizes
        self.fingerprint = self._nodes.fingerprint
        self.layout = self.host.replicas[nodes[0]].layout
        return facts

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        del transport_nbytes
        self.clock.now = seconds

    def next(self, until: float) -> Happening | None:
        clock = self.clock
        while not clock.ready:
            due = clock.advance(until)
            if due is None:
                return None
            resumes: list[Resume] = []
            for node, _, what, attempt, result, seq in due:
                if what is not None:
                    # A step of an exchange is no news once its attempt was given up.
                    if attempt in (ALWAYS, clock.epoch):
                        self.processes.happens(what)
                elif attempt == clock.attempts[node]:
                    resumes.append((node, result, seq))
            self.programs.run(resumes)
        return clock.ready.popleft()

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        self.processes.retire(nodes, empty)

    def check(self) -> None:
        pass  # there is nothing else that could have failed

    def close(self) -> None:
        self._nodes.close()
        torch.set_num_threads(self._threads)
