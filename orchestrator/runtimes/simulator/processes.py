"""The processes of a simulation: started, killed, hung, told to leave, given state. Base of ``simulator.Simulator``.

Here is also the virtual clock: a queue of what happens when.
"""

from __future__ import annotations

import heapq
from collections import deque
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import torch

from starling.actors.host.build import build_replicas
from starling.actors.replica.catch_up import catch_up
from starling.actors.replica.spec import NOT_STARTED
from starling.actors.replica.state_transfer import (
    StateExport,
    donor_among,
    export_state,
    is_blank,
    load_state,
    snapshot,
    with_shared,
)
from starling.algorithms.api import SERVER
from starling.orchestrator.runtimes.events import (
    Died,
    Happening,
    Kept,
    Loaded,
    NodeFacts,
    Notice,
    NotLoaded,
    Retired,
    Up,
)
from starling.orchestrator.runtimes.network import Cast, Network
from starling.orchestrator.runtimes.simulator.state import End, read, written

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from starling.actors.data import Position
    from starling.actors.host.build import RunData
    from starling.actors.host.host import Host
    from starling.actors.replica.catch_up import Transcript
    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import Layout, NodeId
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.mailboxes import Envelope


Item: TypeAlias = "tuple[NodeId, int, End | Happening | None, int, object, int | None]"
"""What is to happen at a moment, in the order of (node, arrival).

The third is ``None`` where a program runs on, in the node's given attempt (what was meant for an earlier one is
dropped), with the given result or that of the exchange of the given number. Of what happens the fourth is the epoch to
which it belongs, or ``ALWAYS``.
"""

ALWAYS = -1


class SimulatedProcesses:
    """What nodes live in; see ``runtime.Runtime`` for what is asked of it."""

    host: Host
    layout: Layout
    _data: RunData

    def __init__(self, config: Config) -> None:
        self._config = config
        self.initial: tuple[NodeId, ...] = ()
        """The nodes to begin with, if a log or a checkpoint says so."""
        self._spec = config.replica_spec()
        self._now = 0.0
        self._epoch = ALWAYS
        self._network = Network(config.network)
        self._times: list[float] = []
        """A heap of the moments at which something is to happen."""
        self._queue: dict[float, list[Item]] = {}
        self._arrival = 0
        self._ready: deque[Happening] = deque()
        self._attempts: dict[NodeId, int] = {}
        self._present: set[NodeId] = set()
        """Whose replicas are in the host, and alive."""
        self._hung: set[NodeId] = set()
        self._incarnations: dict[NodeId, int] = {}
        self._coming: dict[NodeId, Replica] = {}
        """Of nodes that are being started."""
        self._up: set[NodeId] = set()
        """Of those, who is ready, and takes the place when the one before is gone."""
        self._spares: list[float] = []
        """From when on each stands by."""
        self._kept: dict[NodeId, StateExport] = {}
        """Of nodes that have left."""
        self._loading: dict[NodeId, NodeId] = {}
        """Who is being given state, and whose."""

    @property
    def standing(self) -> Self:
        """Itself: its clock can be set."""
        return self

    processes = programs = messages = states = models = standing

    @property
    def now(self) -> float:
        return self._now

    # --- the virtual clock --------------------------------------------------------------------------------------------

    def _at(self, when: float, node: NodeId, what: End | Happening, epoch: int = ALWAYS) -> None:
        self._arrival += 1
        self._moment(when).append((node, self._arrival, what, epoch, None, None))

    def _resume_at(self, when: float, node: NodeId, result: object = None, seq: int | None = None) -> None:
        self._arrival += 1
        self._moment(when).append((node, self._arrival, None, self._attempts[node], result, seq))

    def _moment(self, when: float) -> list[Item]:
        """Events are ordered by (virtual time, node, arrival): the same in every run."""
        moment = self._queue.get(when)
        if moment is None:
            moment = self._queue[when] = []
            heapq.heappush(self._times, when)
        return moment

    def _happens(self, what: End | Happening) -> None:
        match what:
            case End(node, None):
                if node in self._hung:
                    grace = self._config.cluster.cancel_grace_s
                    self._died(node, f"it did not stop within {grace:g} s (cluster.cancel_grace_s)")
            case End(node, incarnation):
                if node in self._present and self.host.replicas[node].incarnation == incarnation:
                    self._stop(node)
                    self._died(node, "its time to leave was over")
            case Loaded(node, source) if self._loading.get(node) != source:
                pass  # one of them is gone
            case Loaded(node):
                del self._loading[node]
                self._ready.append(what)
            case Up(facts):
                self._up.add(facts.node)
                self._embody(facts.node)
                self._ready.append(what)
            case Died(node) | Retired(node):
                # Not before: what is asked of it until then is not asked of who takes its place.
                self._embody(node)
                self._ready.append(what)
            case _:
                self._ready.append(what)

    # --- nodes that come and go --------------------------------------------------------------------------------------

    @property
    def num_spares(self) -> int:
        return len(self._spares)

    def stand_by(self, count: int) -> None:
        self._spares += [self._now + self._config.network.start_s] * count

    def launch(self, nodes: Sequence[NodeId]) -> None:
        network = self._config.network
        for node in nodes:
            # A spare that is still being started is sooner there than one that is not.
            ready = min(self._spares, default=None) if node != SERVER else None
            if ready is not None:
                self._spares.remove(ready)
            seconds = network.start_s if ready is None else max(ready - self._now, 0.0) + network.adopt_s
            self._at(self._now + seconds, node, Up(self._build(node)))

    def _build(self, node: NodeId) -> NodeFacts:
        """A new incarnation of ``node``, which is not there yet."""
        self._incarnations[node] = self._incarnations.get(node, -1 + (node in self._attempts)) + 1
        return self._prepare(node)

    def _prepare(self, node: NodeId) -> NodeFacts:
        """Have the latest incarnation of ``node`` ready to take its place."""
        (replica,) = build_replicas([node], self._spec, self._data, [torch.device("cpu")], clock=lambda: self._now)
        replica.incarnation = self._incarnations[node]
        self._coming[node] = replica
        return NodeFacts(node, "simulated", "cpu", replica.num_samples)

    def _embody(self, node: NodeId) -> None:
        """Put a node that is ready in the place of the one before, if that is gone."""
        if node in self._up and node not in self._present:
            self._up.discard(node)
            # What was on its way to the one before is not for this one.
            self._attempts[node] = self._attempts.get(node, 0) + 1
            self.host.embody(self._coming.pop(node))
            self._present.add(node)

    def embody_again(self, node: NodeId) -> NodeFacts:
        """Put a new incarnation in the place of ``node`` at once, as a log says."""
        facts = self._build(node)
        if node in self._present:
            self._stop(node)
            self._present.discard(node)
        self._up.add(node)
        self._embody(node)
        return facts

    def kill(self, node: NodeId) -> None:
        if node in self._present:  # else its death is on its way already
            self._stop(node)
            self._died(node, "its process died (faults.events)")

    def hang(self, node: NodeId) -> None:
        if node in self._present:
            self._stop(node)
            self._hung.add(node)

    def preempt(self, node: NodeId) -> None:
        if node not in self._present:
            return  # its death is on its way already
        deadline = self._now + self._config.cluster.drain_s
        self._at(self._now, node, Notice(node, deadline, "it was preempted (faults.events)"))
        self._at(deadline, node, End(node, self.host.replicas[node].incarnation))

    def probe(self, nodes: Sequence[NodeId]) -> None:
        for node in self._hung.intersection(nodes):
            self._at(self._now + self._config.cluster.cancel_grace_s, node, End(node, None))

    def retire(self, nodes: Sequence[NodeId], *, empty: Collection[NodeId] = ()) -> None:
        for node in nodes:
            if node not in self._present:
                continue  # its death is on its way already
            if node in self._hung:
                self._at(self._now + self._config.cluster.cancel_grace_s, node, End(node, None))
                continue
            if node not in empty:
                self._kept[node] = export_state(self.host.replicas[node], everything=True)
            self._stop(node)
            self._leave(node)
            self._at(self._now, node, Retired(node, 0 if node in empty else self._kept[node].nbytes))

    def _stop(self, node: NodeId) -> None:
        self.host.drop(node)
        self._attempts[node] += 1

    def _died(self, node: NodeId, reason: str) -> None:
        # One that has been given nothing yet leaves what is kept of the one before.
        if node == SERVER and self.host.replicas[node].committed_round != NOT_STARTED:
            self._kept[node] = export_state(self.host.replicas[node], everything=True)
        self._leave(node)
        self._at(self._now, node, Died(node, reason))

    def _leave(self, node: NodeId) -> None:
        self._present.discard(node)
        self._hung.discard(node)
        self._loading.pop(node, None)
        for joiner in [joiner for joiner, source in self._loading.items() if source == node]:
            del self._loading[joiner]
            self._at(self._now, joiner, NotLoaded(joiner, node))

    def transfer(self, joiner: NodeId, donor: NodeId, position: Position | None = None) -> None:
        self._load(joiner, donor, donor, export_state(self.host.replicas[donor]), position)

    def replay(
        self,
        joiner: NodeId,
        donor: NodeId,
        transcript: Transcript,
        base: bytes | None,
        position: Position | None = None,
    ) -> None:
        nbytes = catch_up(self.host.replicas[joiner], transcript, lambda: base, position)
        self._loading[joiner] = donor
        if nbytes is None:
            self._at(self._now, joiner, NotLoaded(joiner, donor))
        else:
            when = self._network.arrivals(self._now, [Cast({donor: nbytes}, [joiner])]).get(joiner, self._now)
            self._at(when, joiner, Loaded(joiner, donor, nbytes))

    def keep(self, node: NodeId, number: int) -> None:
        # What a replica has committed is still there when its node has died: nothing need be copied before.
        self._ready.append(Kept(node, number, self.layout.nbytes))

    def release(self, node: NodeId) -> None:
        self._kept.pop(node, None)

    def restore(self, node: NodeId) -> bool:
        export = self._kept.get(node)
        if export is not None:
            holder = min(self._present - {node}, default=node)
            self._load(node, node, holder, export, None)
        return export is not None

    def snapshot(
        self, nodes: Sequence[NodeId], shared: NodeId | None, kept: Collection[NodeId] = ()
    ) -> Iterator[tuple[NodeId, StateExport]]:
        replicas = self.host.replicas
        taken: list[tuple[NodeId, StateExport]] = []
        for node in nodes:
            # Who hangs is ended, and followed by what was kept.
            is_kept = node in kept or (node in self._hung and node in self._kept)
            if node in self._present and not is_kept:
                taken.append((node, snapshot(replicas[node], shared=shared in (None, node))))
            elif node in self._kept:
                taken.append((node, self._kept[node]))
        return iter(taken)

    def adopt(self, saved: Mapping[NodeId, StateExport]) -> None:
        donor = donor_among(saved)
        self._kept |= {node: with_shared(export, donor) for node, export in saved.items()}

    def set_forward(self, seconds: float, transport_nbytes: int | None) -> None:
        del transport_nbytes
        self._now = seconds

    def to_json(self) -> Mapping[str, Any]:
        items = (
            (arrival, when, node, what) for when, those in self._queue.items() for node, arrival, what, *_ in those
        )
        coming = [(when, node, what) for _, when, node, what in sorted(items, key=itemgetter(0)) if what is not None]
        queue = [[when, node, form] for when, node, what in coming if (form := written(what)) is not None]
        return {
            "present": {str(node): self.host.replicas[node].incarnation for node in sorted(self._present)},
            "hung": sorted(self._hung),
            "incarnations": {str(node): count for node, count in sorted(self._incarnations.items())},
            "coming": sorted(self._coming),
            "up": sorted(self._up),
            "spares": list(self._spares),
            "ready": [form for what in self._ready if (form := written(what)) is not None],
            "queue": queue,
            "network": self._network.to_json(),
        }

    def bring_back(
        self,
        processes: Mapping[str, Any],
        saved: Mapping[NodeId, StateExport],
        kept: Collection[NodeId],
        new: Collection[NodeId],
        in_flight: Sequence[Envelope],
    ) -> None:
        self.adopt(saved)
        present = {int(node): incarnation for node, incarnation in processes["present"].items()}
        for node, incarnation in present.items():
            self.host.replicas[node].incarnation = incarnation
            if node in self._kept and node not in new:
                load_state(self.host.replicas[node], self._kept[node])
        self._kept = {node: export for node, export in self._kept.items() if node in kept or node not in present}
        self._present, self._hung = set(present), set(processes["hung"])
        self._incarnations = {int(node): count for node, count in processes["incarnations"].items()}
        for node in processes["coming"]:
            self._prepare(node)
        self._up, self._spares = set(processes["up"]), list(processes["spares"])
        flying = {(*one.key, one.attempt): one for one in in_flight}
        self._ready.extend(cast("Happening", read(form, flying)) for form in processes["ready"])
        for when, node, form in processes["queue"]:
            self._at(when, node, read(form, flying))
        self._network.revive(processes["network"])

    def _load(
        self, node: NodeId, source: NodeId, holder: NodeId, export: StateExport, position: Position | None
    ) -> None:
        self._loading[node] = source
        if source != node and is_blank(export):
            self._at(self._now, node, NotLoaded(node, source))
            return
        load_state(self.host.replicas[node], export, position)
        when = self._network.arrivals(self._now, [Cast({holder: export.nbytes}, [node])]).get(node, self._now)
        self._at(when, node, Loaded(node, source, export.nbytes))
