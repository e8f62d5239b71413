"""Snapshots of a simulation's processes, clock and network: a resumed run goes on at the same moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope
    from starling.orchestrator.runtimes.network import Network
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.processes import SimulatedProcesses
    from starling.orchestrator.runtimes.simulator.states import SimulatedStates


class SimulatedStanding:
    """Saves and restores everything of a simulation that outlives a round, but the nodes' committed state.

    Args:
        clock: scheduled events.
        network: transfers under way.
        processes: who is present, hangs, comes, or stands by.
        states: takes the saved states.
    """

    def __init__(
        self, clock: VirtualClock, network: Network, processes: SimulatedProcesses, states: SimulatedStates
    ) -> None:
        self._clock = clock
        self._network = network
        self._processes = processes
        self._states = states
        self.initial: tuple[NodeId, ...] = ()

    def to_json(self) -> Mapping[str, Any]:
        return {**self._processes.to_json(), **self._clock.to_json(), "network": self._network.to_json()}

    def bring_back(
        self,
        processes: Mapping[str, Any],
        saved: Mapping[NodeId, StateExport],
        kept: Collection[NodeId],
        new: Collection[NodeId],
        in_flight: Sequence[Envelope],
    ) -> None:
        present = {int(node): incarnation for node, incarnation in processes["present"].items()}
        self._states.bring_back(saved, present, kept, new)
        self._processes.bring_back(processes, present)
        self._clock.bring_back(processes, {(*one.key, one.attempt): one for one in in_flight})
        self._network.restore(processes["network"])
