"""Simulated processes: started, killed, hung, given notice, and replaced, on a virtual clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.replica.spec import NOT_STARTED
from starling.algorithms.api import SERVER
from starling.orchestrator.runtimes.events import Died, Loaded, Notice, Retired, Up
from starling.orchestrator.runtimes.simulator.state import End

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.runtimes.events import NodeFacts
    from starling.orchestrator.runtimes.simulator.clock import VirtualClock
    from starling.orchestrator.runtimes.simulator.nodes import SimulatedNodes
    from starling.orchestrator.runtimes.simulator.state import Coming
    from starling.orchestrator.runtimes.simulator.states import SimulatedStates


class SimulatedProcesses:
    """Lets nodes come and go as processes would.

    Args:
        config: how long starts, notices and grace periods are.
        clock: schedules what happens to processes.
        nodes: the replicas, and who is present.
        states: what is kept of nodes that leave.
    """

    def __init__(self, config: Config, clock: VirtualClock, nodes: SimulatedNodes, states: SimulatedStates) -> None:
        self._config = config
        self._clock = clock
        self._nodes = nodes
        self._states = states
        self.spares: list[float] = []
        """Time from which each spare process stands by."""
        self._incarnations: dict[NodeId, int] = {}
        self._coming: dict[NodeId, Replica] = {}
        """Replicas of nodes that are being started."""
        self._up: set[NodeId] = set()
        """Coming nodes that are ready, and take their places when their predecessors are gone."""

    # --- starts ------------------------------------------------------------------------------------------------------

    @property
    def num_spares(self) -> int:
        return len(self.spares)

    def stand_by(self, count: int) -> None:
        self.spares += [self._clock.now + self._config.network.start_s] * count

    def launch(self, nodes: Sequence[NodeId]) -> None:
        network, now = self._config.network, self._clock.now
        for node in nodes:
            # A spare that is still being started is sooner there than one that is not.
            ready = min(self.spares, default=None) if node != SERVER else None
            if ready is not None:
                self.spares.remove(ready)
            seconds = network.start_s if ready is None else max(ready - now, 0.0) + network.adopt_s
            self._clock.at(now + seconds, node, Up(self._prepare_next(node)))

    def _prepare_next(self, node: NodeId) -> NodeFacts:
        """Build the next incarnation of ``node``, which is not there yet."""
        self._incarnations[node] = self._incarnations.get(node, -1 + (node in self._clock.attempts)) + 1
        return self._prepare(node)

    def _prepare(self, node: NodeId) -> NodeFacts:
        replica = self._coming[node] = self._nodes.build(node, self._incarnations[node])
        return self._nodes.facts_of(replica)

    def _embody(self, node: NodeId) -> None:
        """Put a node that is ready in the place of the one before, if that is gone."""
        if node in self._up and node not in self._nodes.present:
            self._up.discard(node)
            self._clock.interrupt(node)  # what was on its way to the one before is not for this one
            self._nodes.host.embody(self._coming.pop(node))
            self._nodes.present.add(node)

    def embody_again(self, node: NodeId) -> NodeFacts:
        """Put a new incarnation in the place of ``node`` at once, as a log says."""
        facts = self._prepare_next(node)
        if node in self._nodes.present:
            self._nodes.stop(node)
            self._nodes.present.discard(node)
        self._up.add(node)
        self._embody(node)
        return facts

    # --- ends --------------------------------------------------------------------------------------------------------

    def kill(self, node: NodeId) -> None:
        self.give_up(node, "its process died (faults.events)")

    def give_up(self, node: NodeId, reason: str) -> None:
        if node in self._nodes.present:  # else its death is on its way already
            self._nodes.stop(node)
            self._died(node, reason)

    def hang(self, node: NodeId) -> None:
        if node in self._nodes.present:
            self._nodes.stop(node)
            self._nodes.hung.add(node)

    def preempt(self, node: NodeId) -> None:
        if node not in self._nodes.present:
            return  # its death is on its way already
        deadline = self._clock.now + self._config.cluster.drain_s
        self._clock.at(self._clock.now, node, Notice(node, deadline, "it was preempted (faults.events)"))
        self._clock.at(deadline, node, End(node, self._nodes.host.replicas[node].incarnation))

    def probe(self, nodes: Sequence[NodeId]) -> None:
        for node in self._nodes.hung.intersection(nodes):
            self.end_hung(node)

    def end_hung(self, node: NodeId) -> None:
        """End a process that hangs when its grace period is over."""
        self._clock.at(self._clock.now + self._config.cluster.cancel_grace_s, node, End(node, None))

    def retire(self, nodes: Sequence[NodeId], empty: Collection[NodeId]) -> None:
        """Keep the state of ``nodes`` but those in ``empty``, and let them leave."""
        for node in nodes:
            if node not in self._nodes.present:
                continue  # its death is on its way already
            if node in self._nodes.hung:
                self.end_hung(node)
                continue
            nbytes = 0 if node in empty else self._states.hold(node)
            self._nodes.stop(node)
            self._leave(node)
            self._clock.at(self._clock.now, node, Retired(node, nbytes))

    def _died(self, node: NodeId, reason: str) -> None:
        # One that has been given nothing yet leaves what is kept of the one before.
        if node == SERVER and self._nodes.host.replicas[node].committed_round != NOT_STARTED:
            self._states.hold(node)
        self._leave(node)
        self._clock.at(self._clock.now, node, Died(node, reason))

    def _leave(self, node: NodeId) -> None:
        self._nodes.present.discard(node)
        self._nodes.hung.discard(node)
        self._states.gone(node)

    # --- what happens ------------------------------------------------------------------------------------------------

    def happens(self, what: Coming) -> None:
        """Apply a due event to the processes, and report it unless it is void."""
        match what:
            case End(node, None):
                if node in self._nodes.hung:
                    grace = self._config.cluster.cancel_grace_s
                    self._died(node, f"it did not stop within {grace:g} s (cluster.cancel_grace_s)")
                return
            case End(node, incarnation):
                if node in self._nodes.present and self._nodes.host.replicas[node].incarnation == incarnation:
                    self._nodes.stop(node)
                    self._died(node, "its time to leave was over")
                return
            case Loaded():
                if not self._states.loaded(what):
                    return
            case Up(facts):
                self._up.add(facts.node)
                self._embody(facts.node)
            case Died(node) | Retired(node):
                # Not before: what is asked of it until then is not asked of who takes its place.
                self._embody(node)
            case _:
                pass
        self._clock.ready.append(what)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return which processes there are, as plain data."""
        nodes = self._nodes
        return {
            "present": {str(node): nodes.host.replicas[node].incarnation for node in sorted(nodes.present)},
            "hung": sorted(nodes.hung),
            "incarnations": {str(node): count for node, count in sorted(self._incarnations.items())},
            "coming": sorted(self._coming),
            "up": sorted(self._up),
            "spares": list(self.spares),
        }

    def bring_back(self, state: Mapping[str, Any], present: Collection[NodeId]) -> None:
        """Restore the processes that ``to_json`` described."""
        self._nodes.present, self._nodes.hung = set(present), set(state["hung"])
        self._incarnations = {int(node): count for node, count in state["incarnations"].items()}
        for node in state["coming"]:
            self._prepare(node)
        self._up, self.spares = set(state["up"]), list(state["spares"])
