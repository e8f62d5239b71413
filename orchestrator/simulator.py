"""The simulator: all nodes in one process, under a virtual clock and a model of the network. Deterministic.

It runs the same programs, rendezvous and reductions as a cluster. Training and reductions are carried out for real,
so the results are the cluster's to the last bit; only time is modelled: a step of ``Train`` takes
``network.step_ms / speed``, what is sent arrives when ``network.Network`` says.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from actors.host import Computing, Contributed, Failed, Host, Posted, Returned, Stale, Ticket, failure
from actors.replica import Replica, virtual
from actors.setup import load_data
from algorithms.api import TrainReport
from orchestrator.errors import NodeFailedError, StarlingError
from orchestrator.events import Advance, Cancel, Deliver, Delivered, GiveUp, Post, Return, Secure, Secured
from orchestrator.network import Cast, Network
from orchestrator.runtime import FinalModel, Finished, Happening, NodeFacts, Raised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from actors.buffers import Buffer
    from algorithms.api import NodeId, Train, View
    from orchestrator.config import Config
    from orchestrator.events import Decision


@dataclass(frozen=True)
class _Resume:
    """A program runs on: with the result of an operation, or from its beginning."""

    node: NodeId
    result: object = None


@dataclass
class _Exchange:
    """What the simulator keeps of one exchange."""

    first_at: float
    """When the first contribution was announced."""
    posted: dict[NodeId, Posted] = field(default_factory=dict)
    reduced: dict[int, Buffer] = field(default_factory=dict)


class Simulator:
    """The in-process runtime; see ``runtime.Runtime`` for its contract."""

    virtual = True
    transport_nbytes = None

    def __init__(self, config: Config) -> None:
        self._config = config
        self._spec = config.replica_spec()
        self._now = 0.0
        self._network = Network(config.network)
        self._queue: list[tuple[float, NodeId, int, _Resume | Happening]] = []
        self._arrival = 0
        self._ready: deque[Happening] = deque()
        self._exchanges: dict[int, _Exchange] = {}
        self._threads = torch.get_num_threads()

    @property
    def now(self) -> float:
        return self._now

    def start(self) -> list[NodeFacts]:
        # One thread, as a node actor has: the order of additions inside a matrix product depends on their number.
        torch.set_num_threads(1)
        nodes = range(self._config.num_nodes)
        with user_code(nodes[0], 0):
            data = load_data(self._spec.task, self._config.data, len(nodes), self._spec.seed)
            self._validation = data.validation
            self.baselines = self._spec.task.baselines(len(nodes))
            replicas = [Replica(node, self._spec, data.train, data.parts[node]) for node in nodes]
            for replica in replicas:
                replica.clock = lambda: self._now
            self._host = Host(replicas, fence=threading.Event())
            self._host.init()
        self.layout = replicas[0].layout
        return [NodeFacts(node, "simulated", "cpu", len(data.parts[node])) for node in nodes]

    # --- what the controller decides ---------------------------------------------------------------------------------

    def begin(self, epoch: int, number: int, view: View, committed: int) -> None:
        del epoch
        self._exchanges = {}
        self._host.begin(number, view, committed, view.members)
        for node in view.members:
            self._at(self._now, node, _Resume(node))

    def perform(self, decisions: Sequence[Decision]) -> None:
        secures = [one for one in decisions if isinstance(one, Secure)]
        if secures:
            self._secure(secures)
        for decision in decisions:
            match decision:
                case Deliver():
                    self._deliver(decision)
                case Advance():
                    self._advance(decision)
                case Cancel(node):
                    self._host.cancel([node])
                case Secure() | GiveUp():
                    pass  # done above; nothing to give up where every fetch succeeds
                case _:
                    pass  # the controller's own: commits, aborts and errors

    def _secure(self, secures: Sequence[Secure]) -> None:
        """One phase: each member's part to whoever reduces it."""
        phase = [
            Cast({node: self._exchanges[one.seq].posted[node].part_nbytes[one.part] for node in one.members}, [one.by])
            for one in secures
        ]
        arrivals = self._network.arrivals(self._now, phase)
        for one in secures:
            exchange = self._exchanges[one.seq]
            first = exchange.posted[one.members[0]]
            if first.signature.operation == "AllReduce":
                assert first.specs is not None
                contributions = {
                    member: (self._host.parts(member, one.seq)[one.part], exchange.posted[member].weight)
                    for member in one.members
                }
                exchange.reduced[one.part] = self._host.reduce(one.by, one.seq, one.part, first.specs, contributions)
            got = Secured(one.seq, one.part, one.by, frozenset(one.members), one.generation)
            self._at(arrivals.get(one.by, self._now), one.by, got)

    def _deliver(self, decision: Deliver) -> None:
        """One phase: each reduced part from its maker to everybody."""
        sizes = self._exchanges[decision.seq].posted[decision.closed[0]].result_nbytes
        made: Counter[NodeId] = Counter()
        for part, maker in enumerate(decision.makers):
            made[maker] += sizes[part]
        arrivals = self._network.arrivals(self._now, [Cast(made, decision.nodes)])
        for node in decision.nodes:
            self._at(arrivals.get(node, self._now), node, Delivered(decision.seq, node, decision.generation))

    def _advance(self, decision: Advance) -> None:
        arrivals: dict[NodeId, float] = {}
        if decision.inline:
            posted = self._exchanges[decision.seq].posted
            phase = [Cast({node: posted[node].nbytes for node in decision.closed}, decision.nodes)]
            arrivals = self._network.arrivals(self._now, phase)
        # Now, before anybody runs on: contributions may share memory with parameters.
        results = self._results(decision)
        for node in decision.nodes:
            self._at(arrivals.get(node, self._now), node, _Resume(node, results[node]))

    # --- what happens ------------------------------------------------------------------------------------------------

    def _at(self, when: float, node: NodeId, what: _Resume | Happening) -> None:
        """Events are ordered by (virtual time, node, arrival): the same in every run."""
        self._arrival += 1
        heapq.heappush(self._queue, (when, node, self._arrival, what))

    def next(self, until: float) -> Happening | None:
        while not self._ready:
            assert self._queue, "every program waits, and nothing is on its way"
            if self._queue[0][0] > until:
                self._now = max(self._now, until)
                return None
            self._now = self._queue[0][0]
            resumes: list[_Resume] = []
            while self._queue and self._queue[0][0] == self._now:
                what = heapq.heappop(self._queue)[3]
                if isinstance(what, _Resume):
                    resumes.append(what)
                else:
                    self._ready.append(what)
            self._run(resumes)
        return self._ready.popleft()

    def _run(self, resumes: Sequence[_Resume]) -> None:
        """Run programs that become runnable at one moment; their ``Train``s go to the handler together."""
        training: list[tuple[NodeId, Train]] = []
        for one in resumes:
            ticket = self._host.resume(one.node, one.result)
            if isinstance(ticket, Computing):
                training.append((one.node, ticket.operation))
            else:
                self._take(one.node, ticket)
        for (node, _), report in zip(training, self._host.compute(training), strict=True):
            if isinstance(report, TrainReport):
                speed = self._config.network.speeds.get(node, 1.0)
                seconds = report.num_steps * self._config.network.step_ms / 1000 / speed
                self._at(self._now + seconds, node, _Resume(node, virtual(report, seconds)))
            else:
                self._take(node, report)

    def _results(self, decision: Advance) -> Mapping[NodeId, Any]:
        """The result of a closed exchange for those that run on, decoded once for all."""
        seq, nodes = decision.seq, decision.nodes
        exchange = self._exchanges[seq]
        posted = {node: exchange.posted[node] for node in decision.closed}
        if decision.inline:
            inline = [
                Contributed(node, one.weight, one.specs, one.inline)
                for node, one in posted.items()
                if one.specs is not None and one.inline is not None
            ]
            return self._host.combine(nodes, seq, inline)
        specs = {node: one.specs for node, one in posted.items() if one.specs is not None}
        first = decision.closed[0]
        if posted[first].signature.operation == "AllGather":
            gathered = [(node, specs[node], self._host.parts(node, seq)[0]) for node in decision.closed]
            return {node: self._host.gathered(node, gathered) for node in nodes}
        weights = {node: one.weight for node, one in posted.items()}
        parts = [exchange.reduced[part] for part in sorted(exchange.reduced)]
        return self._host.reduced(nodes, seq, specs[first], weights, parts)

    def _take(self, node: NodeId, ticket: Ticket) -> None:
        match ticket:
            case Posted():
                exchange = self._exchanges.setdefault(ticket.seq, _Exchange(self._now))
                exchange.posted[node] = ticket
                self._ready.append(post_event(node, ticket, self._now - exchange.first_at))
            case Returned():
                self._ready.append(Finished(node, ticket))
                self._ready.append(Return(node, ticket.num_collectives, ticket.digest))
            case Failed(message, traceback):
                self._ready.append(Raised(node, message, traceback))
            case Computing() | Stale():
                pass

    # --- results -----------------------------------------------------------------------------------------------------

    def evaluate(self, node: NodeId, committed: int, max_batches: int | None) -> dict[str, float]:
        self._host.settle(committed)
        replica = self._host.replicas[node]
        with user_code(node, replica.round):
            return replica.evaluate(self._validation, max_batches)

    def finish(self, committed: int, node: NodeId) -> FinalModel:
        self._host.settle(committed)
        replica = self._host.replicas[node]
        return FinalModel(replica.model_digest(), save(replica.model_tensors()))

    def close(self) -> None:
        torch.set_num_threads(self._threads)


@contextlib.contextmanager
def user_code(node: NodeId, number: int) -> Iterator[None]:
    """Turn what a user's task raises outside of a program into the error that names the node."""
    try:
        yield
    except StarlingError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a user's task raises
        failed = failure(node, number, error)
        raise NodeFailedError(failed.message, failed.traceback) from None


def post_event(node: NodeId, ticket: Posted, waited_s: float = 0.0) -> Post:
    """The rendezvous' view of an announcement, ``waited_s`` after the first one to that exchange."""
    return Post(
        node,
        ticket.seq,
        ticket.signature,
        contributes=ticket.specs is not None,
        weight=ticket.weight,
        part_nbytes=ticket.part_nbytes,
        result_nbytes=ticket.result_nbytes,
        inline=ticket.inline is not None,
        close=ticket.close,
        waited_s=waited_s,
    )
