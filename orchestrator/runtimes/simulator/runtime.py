"""The simulator: all nodes in one process, under a virtual clock and a model of the network. Deterministic.

It runs the same programs, rendezvous and reductions as a cluster. Training and reductions are carried out for real,
so the results are the cluster's to the last bit; only time is modelled: a step of ``Train`` takes
``network.step_ms / speed``, what is sent arrives when ``network.Network`` says.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors.torch import save

from starling.actors.data.plans import NOTHING_NEW
from starling.actors.host.build import build_replicas, load_data
from starling.actors.host.host import Host
from starling.actors.replica.mean_model import mean_model
from starling.actors.replica.message_export import packed, unpacked
from starling.actors.replica.replica import virtual
from starling.actors.replica.state_transfer import StateExport, copied
from starling.actors.wire.tickets import (
    Computing,
    Contributed,
    Failed,
    Pinging,
    Posted,
    Receiving,
    Returned,
    Sending,
    Sleeping,
    Stale,
    Ticket,
    Waiting,
)
from starling.algorithms.api import INLINE_LIMIT_BYTES, SERVER, Evaluate, Gradient, Loss, Message, TrainReport
from starling.orchestrator.protocol.events import (
    Advance,
    Cancel,
    Close,
    Deliver,
    Delivered,
    Posts,
    Secure,
    Secured,
    Waits,
)
from starling.orchestrator.protocol.mailboxes import Delivery
from starling.orchestrator.runtimes import traffic
from starling.orchestrator.runtimes.events import (
    AllFinished,
    Arrived,
    FinalModel,
    Finished,
    Halted,
    Happening,
    NodeFacts,
    Raised,
    Receives,
    Sent,
    Sleeps,
)
from starling.orchestrator.runtimes.network import Cast
from starling.orchestrator.runtimes.simulator.processes import ALWAYS, End, SimulatedProcesses
from starling.orchestrator.runtimes.tickets import post_event
from starling.orchestrator.runtimes.user_code import user_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from starling.actors.data import Place
    from starling.actors.data.fingerprint import Fingerprint
    from starling.actors.wire.buffers import Buffer
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import NodeId, View
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.protocol.events import Decision
    from starling.orchestrator.protocol.mailboxes import Envelope, Handover

_FORWARD_FRACTION = 1 / 3
"""Of a step's time: a forward pass alone. A backward pass takes about twice as long."""


_Resume: TypeAlias = "tuple[NodeId, object, int | None]"
"""A program runs on: its node, and the result or the exchange as above."""


@dataclass
class _Exchange:
    """What the simulator keeps of one exchange."""

    posted: dict[NodeId, Posted] = field(default_factory=dict)
    reduced: dict[int, Buffer] = field(default_factory=dict)
    arrivals: dict[NodeId, float] = field(default_factory=dict)
    """When each member has what travels inline, also those that are not there yet to take it."""


class Simulator(SimulatedProcesses):
    """The in-process runtime; see ``runtime.Runtime`` for its contract."""

    virtual = True
    transport_nbytes = None
    part_sizes: tuple[int, ...] | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_parts: int | None = None
        self.fingerprint: Fingerprint = {}
        self._step_ms = config.network.step_ms
        self._speeds = config.network.speeds
        self._exchanges: dict[int, _Exchange] = {}
        self._letters: dict[int, Sending] = {}
        self._large: dict[int, Buffer] = {}
        self._threads = torch.get_num_threads()
        self._is_synchronous = config.algorithm.synchronous
        self.keeps_delivered = False

    def start(self) -> list[NodeFacts]:
        # One thread, as a node actor has: the order of additions inside a matrix product depends on their number.
        torch.set_num_threads(1)
        num_nodes = self._config.num_nodes
        server = [SERVER] if self._config.algorithm.has_server else []
        nodes = [*(self.initial or self._config.initial_nodes), *server]
        with user_code(0, 0):
            self.num_parts = self.num_parts or num_nodes
            data = load_data(self._spec.task, self._config.data, self.num_parts, self._spec.seed)
            self._data, self._validation, self.part_sizes = data, data.validation, data.part_sizes
            self.fingerprint = data.fingerprint()
            self.baselines = self._spec.task.baselines(num_nodes)
            cpu = torch.device("cpu")
            replicas = build_replicas(nodes, self._spec, data, [cpu] * len(nodes), clock=lambda: self._now)
            self.host = Host(replicas, alone=True)
            self.host.init()
        self._attempts = dict.fromkeys(nodes, 0)
        self._present = set(nodes)
        self.layout = replicas[0].layout
        return [NodeFacts(one.id, "simulated", "cpu", one.num_samples) for one in replicas]

    # --- what the controller decides ---------------------------------------------------------------------------------

    def begin(
        self,
        epoch: int,
        number: int,
        view: View,
        committed: int,
        nodes: Sequence[NodeId],
        *,
        repair: bool,
        joiners: Sequence[NodeId] = (),
        places: Mapping[NodeId, Place] = NOTHING_NEW,
        seen: Sequence[float] = (),
    ) -> None:
        self._epoch = epoch
        self._exchanges = {}
        nodes = [node for node in nodes if node in self._present and node not in self._hung]
        if nodes:
            self.host.begin(number, view, committed, nodes, repair=repair, joiners=joiners, places=places, seen=seen)
        for node in nodes:
            self._attempts[node] += 1
            self._resume_at(self._now, node)

    def perform(self, decisions: Sequence[Decision]) -> None:
        secures = [one for one in decisions if isinstance(one, Secure)]
        if secures:
            self._secure(secures)
        for decision in decisions:
            match decision:
                case Deliver():
                    self._deliver(decision)
                case Close():
                    self._conclude(decision)
                case Advance():
                    self._advance(decision)
                case Cancel(node):
                    self.halt([node])
                case _:
                    pass  # done above, or the controller's own; nothing to give up where every fetch succeeds

    def halt(self, nodes: Sequence[NodeId]) -> None:
        for node in nodes:
            if node in self._hung:
                self._at(self._now + self._config.cluster.cancel_grace_s, node, End(node, None))
                continue
            self.host.cancel([node])
            self._attempts[node] += 1
            self._ready.append(Halted(node))

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        self.host.settle(committed)

    # --- exchanges ---------------------------------------------------------------------------------------------------

    def _secure(self, secures: Sequence[Secure]) -> None:
        """One phase: each member's part to whoever reduces it."""
        phase = traffic.securing(secures, lambda seq: self._exchanges[seq].posted)
        arrivals = self._network.arrivals(self._now, phase)
        for one in secures:
            exchange = self._exchanges[one.seq]
            first = exchange.posted[one.members[0]] if one.members else None
            if first is not None and first.signature.operation == "AllReduce":
                assert first.specs is not None
                contributions = {
                    member: (self.host.exchanges.parts(member, one.seq)[one.part], exchange.posted[member].weight)
                    for member in one.members
                }
                reduced = self.host.exchanges.reduce(one.by, one.seq, one.part, first.specs, contributions)
                exchange.reduced[one.part] = reduced
            got = Secured(one.seq, one.part, one.by, frozenset(one.members), one.generation)
            self._at(arrivals.get(one.by, self._now), one.by, got, self._epoch)

    def _deliver(self, decision: Deliver) -> None:
        """One phase: each reduced part from its maker to everybody."""
        phase = traffic.delivering(decision, self._exchanges[decision.seq].posted)
        arrivals = self._network.arrivals(self._now, phase)
        for node in decision.nodes:
            delivered = Delivered(decision.seq, node, decision.generation)
            self._at(arrivals.get(node, self._now), node, delivered, self._epoch)

    def _conclude(self, decision: Close) -> None:
        """Work out the result now, before anybody runs on: contributions may share memory with parameters."""
        seq = decision.seq
        exchange = self._exchanges[seq]
        first = decision.closed[0]
        if decision.inline and not self._network.is_instant:
            exchange.arrivals = self._network.arrivals(self._now, traffic.inline(decision.closed, exchange.posted))
        if exchange.posted[first].signature.operation != "AllReduce":
            self.host.exchanges.conclude_here(decision.closed, seq)
            self.host.exchanges.release(seq)
            return
        posted = {node: exchange.posted[node] for node in decision.closed}
        if decision.inline:
            inline = [
                Contributed(node, one.weight, one.specs, one.inline)
                for node, one in posted.items()
                if one.specs is not None and one.inline is not None
            ]
            self.host.exchanges.conclude_inline(first, seq, inline)
        else:
            weights = {node: one.weight for node, one in posted.items()}
            parts = [exchange.reduced.pop(part) for part in sorted(exchange.reduced)]
            specs = posted[first].specs
            assert specs is not None
            self.host.exchanges.conclude_reduce(first, seq, specs, weights, parts)
        self.host.exchanges.release(seq)

    def _advance(self, decision: Advance) -> None:
        now, arrivals = self._now, self._exchanges[decision.seq].arrivals
        for node in decision.nodes:
            self._resume_at(max(now, arrivals.get(node, now)) if arrivals else now, node, None, decision.seq)

    # --- messages ----------------------------------------------------------------------------------------------------

    def dispatch(self, envelope: Envelope) -> None:
        phase = [Cast({envelope.sender: envelope.nbytes}, [envelope.to])]
        when = self._network.arrivals(self._now, phase).get(envelope.to, self._now)
        self._at(when, envelope.to, Arrived(envelope))

    def discard(self, node: NodeId, letter: int) -> None:
        del node
        sending = self._letters.pop(letter)
        if sending.inline is None:
            self.host.outbox.discard(letter)

    def hand_over(self, handover: Handover) -> None:
        outcome = handover.outcome
        result: object = outcome
        if isinstance(outcome, Delivery):
            envelope = outcome.envelope
            sending = self._letters[envelope.letter]
            data = self.host.outbox.read(envelope.letter) if sending.inline is None else sending.inline
            if handover.node != SERVER and not self.keeps_delivered:  # else it may have to be handed over again
                self.discard(envelope.sender, envelope.letter)
            payload = self.host.unpack(handover.node, sending.specs, data)
            result = Message(envelope.sender, payload, outcome.staleness, envelope.round)
        self._resume_at(self._now, handover.node, result)

    def export(self, envelopes: Sequence[Envelope]) -> Iterator[StateExport]:
        sendings = [self._letters[one.letter] for one in envelopes]
        data = [
            self.host.outbox.read(one.letter) if sending.inline is None else sending.inline
            for one, sending in zip(envelopes, sendings, strict=True)
        ]
        return iter([copied(packed([one.specs for one in sendings], data))])

    def put_back(self, envelopes: Sequence[Envelope], letters: StateExport) -> None:
        payloads = list(unpacked(letters))
        for one in envelopes:
            specs, data = payloads[-1 - one.letter]
            is_inline = one.nbytes <= INLINE_LIMIT_BYTES
            self._letters[one.letter] = Sending(one.to, one.letter, specs, one.nbytes, data if is_inline else None)
            if not is_inline:
                self.host.outbox.put(one.letter, data)

    # --- what happens ------------------------------------------------------------------------------------------------

    def next(self, until: float) -> Happening | None:
        while not self._ready:
            if not self._times or self._times[0] > until:
                assert until < float("inf"), "every program waits, and nothing is on its way"
                self._now = max(self._now, until)
                return None
            self._now = heapq.heappop(self._times)
            resumes: list[_Resume] = []
            attempts = self._attempts
            for node, _, what, attempt, result, seq in sorted(self._queue.pop(self._now)):
                if what is not None:
                    # A step of an exchange is no news once its attempt was given up.
                    if attempt in (ALWAYS, self._epoch):
                        self._happens(what)
                elif attempt == attempts[node]:
                    resumes.append((node, result, seq))
            self._run(resumes)
        return self._ready.popleft()

    def _run(self, resumes: Sequence[_Resume]) -> None:
        """Run programs that become runnable at one moment; what they compute goes to the handler together."""
        host = self.host
        computing: list[tuple[NodeId, Compute]] = []
        tickets: list[tuple[NodeId, Ticket]] = []
        for node, result, seq in resumes:
            if host.is_over(node):  # it has died, and what comes for it is told to nobody
                continue
            ticket = host.resume(node, result if seq is None else host.exchanges.take(node, seq))
            if isinstance(ticket, Computing):
                computing.append((node, ticket.operation))
            else:
                tickets.append((node, ticket))
        self._take_all(tickets)
        is_replay = host.times.is_replay
        for (node, operation), result in zip(computing, host.computation.run(computing), strict=True):
            if isinstance(result, TrainReport):
                seconds = result.num_steps * self._step_ms / 1000 / self._speeds.get(node, 1.0)
                self._resume_at(self._now + seconds, node, result if is_replay else virtual(result, seconds))
            elif isinstance(result, Failed | Stale):
                self._take(node, result)
            else:
                self._resume_at(self._now + self._seconds(node, operation), node, result)

    def _seconds(self, node: NodeId, operation: Compute) -> float:
        """How long an operation other than ``Train`` takes on the virtual clock."""
        steps = 0.0
        if isinstance(operation, Gradient):
            steps = 1.0
        elif isinstance(operation, Loss | Evaluate):
            steps = _FORWARD_FRACTION
        return steps * self._step_ms / 1000 / self._speeds.get(node, 1.0)

    def _take_all(self, tickets: Sequence[tuple[NodeId, Ticket]]) -> None:
        """Take what programs say; where many say alike, one after the other, the controller is told once."""
        posts: tuple[Posted, Posts] | None = None
        reports: AllFinished | None = None
        for node, ticket in tickets:
            if isinstance(ticket, Posted) and self._is_synchronous and ticket.close is None:
                self._keep(node, ticket)
                if posts is None or not _alike(ticket, posts[0]):
                    posts = ticket, Posts(post_event(node, ticket), {})
                    self._ready.append(posts[1])
                posts[1].wants[node] = ticket.wants
                reports = None
            elif isinstance(ticket, Returned) and self._is_synchronous:
                if reports is None or not _alike_ends(ticket, next(iter(reports.reports.values()))):
                    reports = AllFinished({})
                    self._ready.append(reports)
                reports.reports[node] = ticket
                posts = None
            else:
                self._take(node, ticket)
                posts, reports = None, None

    def _keep(self, node: NodeId, ticket: Posted) -> None:
        exchange = self._exchanges.get(ticket.seq)
        if exchange is None:
            exchange = self._exchanges[ticket.seq] = _Exchange()
        exchange.posted[node] = ticket
        if not ticket.waits:
            self._resume_at(self._now, node)

    def _take(self, node: NodeId, ticket: Ticket) -> None:
        match ticket:
            case Posted():
                self._keep(node, ticket)
                self._ready.append(post_event(node, ticket))
            case Waiting(seq):
                self._ready.append(Waits(node, seq))
            case Returned():
                self._ready.append(Finished(node, ticket))
            case Sending(to, letter, _, nbytes):
                self._letters[letter] = ticket
                self._ready.append(Sent(node, to, nbytes, letter))
                self._resume_at(self._now, node)
            case Receiving(timeout_s):
                self._ready.append(Receives(node, timeout_s))
            case Sleeping(seconds):
                self._ready.append(Sleeps(node, self._now + seconds))
                self._resume_at(self._now + seconds, node)
            case Pinging():
                self._ping(node, ticket)
            case Failed(message, traceback):
                self._ready.append(Raised(node, message, traceback))
            case Computing() | Stale():
                pass

    def _ping(self, node: NodeId, ticket: Pinging) -> None:
        """There and back again: those answer that are there, and near enough."""
        there = {other: 2 * self._network.latency_s(node, other) for other in ticket.nodes if other in self._present}
        answers = {other: seconds for other, seconds in there.items() if seconds <= ticket.timeout_s}
        complete = len(answers) == len(set(ticket.nodes))
        seconds = max(answers.values(), default=0.0) if complete else ticket.timeout_s
        self._resume_at(self._now + seconds, node, frozenset(answers))

    # --- results -----------------------------------------------------------------------------------------------------

    def evaluate(self, nodes: Sequence[NodeId], max_batches: int | None) -> dict[str, float]:
        replica = self.host.replicas[nodes[0]]
        with user_code(replica.id, replica.round):
            return replica.evaluate(self._validation, max_batches, *self._mean(nodes))

    def _mean(self, nodes: Sequence[NodeId]) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if len(nodes) == 1:
            return None, None
        return mean_model(self.host.replicas[node].committed_model() for node in nodes)

    def fetch(self, nodes: Sequence[NodeId]) -> FinalModel:
        replica = self.host.replicas[nodes[0]]
        mean = self._mean(nodes)
        return FinalModel(replica.model_digest(*mean), save(replica.model_tensors(*mean)))

    def check(self) -> None:
        pass  # there is nothing else that could have failed

    def close(self) -> None:
        for node in self._attempts:  # a program that never ran would complain
            self.host.drop(node)
        torch.set_num_threads(self._threads)


def _alike(one: Posted, other: Posted) -> bool:
    """Whether two announcements differ in nothing that the rendezvous is told but ``wants``."""
    return (
        one.seq == other.seq
        and one.signature is other.signature
        and one.part_nbytes == other.part_nbytes
        and one.result_nbytes == other.result_nbytes
        and one.weight == other.weight
        and one.waits is other.waits
        and (one.specs is None) is (other.specs is None)
        and (one.inline is None) is (other.inline is None)
        and one.skipped == other.skipped
    )


def _alike_ends(one: Returned, other: Returned) -> bool:
    return one.num_collectives == other.num_collectives and one.digest == other.digest
