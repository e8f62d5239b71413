"""Committed state in the simulator: copied between replicas, kept of nodes that have left, and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.replica.catch_up import catch_up
from starling.actors.replica.state_transfer import (
    StateExport,
    donor_among,
    export_state,
    is_blank,
    load_state,
    snapshot,
    with_shared,
)
from starling.orchestrator.runtimes.events import Kept, Loaded, NotLoaded
from starling.orchestrator.runtimes.network import Cast

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from starling.actors.data import Position
    from starling.actors.replica.catch_up import Transcript
    from starling.algorithms.api import NodeId
    from starling.orchestrator.runtimes.network import Network
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes


class SimulatedStates:
    """Copies state at once, and reports it when the network would have brought it.

    Args:
        clock: reports transfers.
        nodes: the replicas.
        network: how long transfers take.
    """

    def __init__(self, clock: VirtualClock, nodes: SimulatedNodes, network: Network) -> None:
        self._clock = clock
        self._nodes = nodes
        self._network = network
        self._kept: dict[NodeId, StateExport] = {}
        self._loading: dict[NodeId, NodeId] = {}
        """Nodes that are being given state, and whose."""

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        self._nodes.host.settle(committed)

    # --- transfers ---------------------------------------------------------------------------------------------------

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        self._load(joiner, donor, donor, export_state(self._nodes.host.replicas[donor]), position)

    def replay(
        self,
        joiner: NodeId,
        donor: NodeId,
        transcript: Transcript,
        base: bytes | None,
        position: Position | None = None,
    ) -> None:
        nbytes = catch_up(self._nodes.host.replicas[joiner], transcript, lambda: base, position)
        self._loading[joiner] = donor
        if nbytes is None:
            self._clock.at(self._clock.now, joiner, NotLoaded(joiner, donor))
        else:
            self._arrive(joiner, donor, donor, nbytes)

    def restore(self, node: NodeId) -> bool:
        export = self._kept.get(node)
        if export is not None:
            holder = min(self._nodes.present - {node}, default=node)
            self._load(node, node, holder, export, None)
        return export is not None

    def _load(
        self, node: NodeId, source: NodeId, holder: NodeId, export: StateExport, position: Position | None
    ) -> None:
        self._loading[node] = source
        if source != node and is_blank(export):
            self._clock.at(self._clock.now, node, NotLoaded(node, source))
            return
        load_state(self._nodes.host.replicas[node], export, position)
        self._arrive(node, source, holder, export.nbytes)

    def _arrive(self, node: NodeId, source: NodeId, holder: NodeId, nbytes: int) -> None:
        now = self._clock.now
        when = self._network.arrivals(now, [Cast({holder: nbytes}, [node])]).get(node, now)
        self._clock.at(when, node, Loaded(node, source, nbytes))

    def loaded(self, happening: Loaded) -> bool:
        """End a transfer; return False if one of its nodes is gone meanwhile."""
        if self._loading.get(happening.node) != happening.source:
            return False
        del self._loading[happening.node]
        return True

    def gone(self, node: NodeId) -> None:
        """A node is gone: it is given nothing, and ``NotLoaded`` is reported for those that it gave state to."""
        self._loading.pop(node, None)
        for joiner in [joiner for joiner, source in self._loading.items() if source == node]:
            del self._loading[joiner]
            self._clock.at(self._clock.now, joiner, NotLoaded(joiner, node))

    # --- kept --------------------------------------------------------------------------------------------------------

    def hold(self, node: NodeId) -> int:
        """Keep all that a node has committed; return its bytes."""
        export = self._kept[node] = export_state(self._nodes.host.replicas[node], everything=True)
        return export.nbytes

    def keep(self, node: NodeId, number: int) -> None:
        # What a replica has committed is still there when its node has died: nothing need be copied before.
        self._clock.ready.append(Kept(node, number, self._nodes.host.replicas[node].layout.nbytes))

    def release(self, node: NodeId) -> None:
        self._kept.pop(node, None)

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        replicas, present, hung = self._nodes.host.replicas, self._nodes.present, self._nodes.hung
        taken: list[tuple[NodeId, StateExport]] = []
        for node in nodes:
            # Who hangs is ended, and followed by what was kept.
            is_kept = node in kept or (node in hung and node in self._kept)
            if node in present and not is_kept:
                taken.append((node, snapshot(replicas[node], shared=shared in (None, node))))
            elif node in self._kept:
                taken.append((node, self._kept[node]))
        return iter(taken)

    def adopt(self, saved: Mapping[NodeId, StateExport]) -> None:
        donor = donor_among(saved)
        self._kept |= {node: with_shared(export, donor) for node, export in saved.items()}

    def bring_back(
        self,
        saved: Mapping[NodeId, StateExport],
        present: Mapping[NodeId, int],
        kept: Collection[NodeId],
        new: Collection[NodeId],
    ) -> None:
        """Load saved states into present nodes, which are in the given incarnations, and keep those of others.

        Args:
            saved: states by node.
            present: incarnations of present nodes.
            kept: nodes whose saved state is kept even so.
            new: present nodes that stay in the initial state.
        """
        self.adopt(saved)
        for node, incarnation in present.items():
            replica = self._nodes.host.replicas[node]
            replica.incarnation = incarnation
            if node in self._kept and node not in new:
                load_state(replica, self._kept[node])
        self._kept = {node: export for node, export in self._kept.items() if node in kept or node not in present}
