"""The host runs the programs of all nodes in one process.

Both runtimes use it: the simulator hosts all nodes, a Ray actor hosts one or several. A host never decides anything;
it runs programs to their next operation. It owns the exchanges, the computation, the outbox and the logs of its nodes,
which the runtimes call directly.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from starling.actors.host import batched
from starling.actors.host.computation import Computation
from starling.actors.host.exchanges import Exchanges
from starling.actors.host.failures import failure
from starling.actors.host.node_log import NodeLogs
from starling.actors.host.outbox import MessageOutbox
from starling.actors.host.programs import Program
from starling.actors.host.results import SharedResult
from starling.actors.replica.spec import NonFiniteLossError, node_name
from starling.actors.replica.staged_state import same_bits
from starling.actors.wire import buffers
from starling.actors.wire.finite import trouble
from starling.actors.wire.tickets import (
    Computing,
    Failed,
    Pinging,
    Posted,
    Receiving,
    Returned,
    Sleeping,
    Stale,
    Ticket,
    Waiting,
    mean_loss,
)
from starling.algorithms.api import (
    SERVER,
    AllGather,
    AllReduce,
    Batch,
    Evaluate,
    Gradient,
    Handle,
    Loss,
    Message,
    NeighborAllGather,
    Ping,
    Receive,
    Send,
    Sleep,
    Start,
    Step,
    Train,
    TrainReport,
    Wait,
    whole_round,
)
from starling.algorithms.errors import ProgramError
from starling.algorithms.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.actors.host.recorded_clock import Times
    from starling.actors.host.round_order import RoundOrder
    from starling.actors.replica.replica import Replica
    from starling.actors.wire.buffers import Buffer, TensorSpec
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import NodeId, Payload, State


_COMPUTE = frozenset({Train, Batch, Gradient, Step, Loss, Evaluate})
_COLLECTIVE = frozenset({AllReduce, AllGather, NeighborAllGather})


class Host:
    """The programs of several nodes in one process.

    Args:
        replicas: of the nodes, each once.
        times: through which the replicas see the clock.
        alone: whether all nodes of the run are in this process: then nothing travels, and nobody reads logs.
    """

    def __init__(self, replicas: Iterable[Replica], times: Times, *, alone: bool = False) -> None:
        self.replicas = {replica.id: replica for replica in replicas}
        self._programs: dict[NodeId, Program] = {}
        self._alone = alone
        first, *_ = self.replicas.values()
        self._algorithm, self._seed = first.spec.algorithm, first.spec.seed
        self.fences = {node: threading.Event() for node in self.replicas}
        """A raised fence ends a node's round at its next step."""
        self.times = times
        self.logs = NodeLogs(first.id)
        self.exchanges = Exchanges(self.replicas, self._seed, alone=alone)
        self.computation = Computation(self.replicas, self.fences, self.times, self.logs)
        # No other incarnation of these nodes, whose letters may still be on their way, has the same names for its own.
        self.outbox = MessageOutbox(max(replica.incarnation for replica in self.replicas.values()) << 32)
        self._digests: list[tuple[dict[str, State], str]] = []
        """Shared states, with their digests, that nodes have staged in the running round."""

    def init(self) -> None:
        """Make the initial state of all nodes, before round 0."""
        for replica in self.replicas.values():
            self._algorithm.init(replica)
            replica.commit()
        members = [replica for node, replica in self.replicas.items() if node != SERVER]
        # What is unequal from the start stays, and the first commit's digests tell of it, as they do across processes.
        self._alias([replica for replica in members if replica.shared.equals(members[0].shared)])

    def embody(self, replica: Replica) -> None:
        """Put a new replica in the place of one that is gone, in its initial state.

        Its program stays until a round begins: its contributions may be in an exchange that is not closed yet.
        """
        self.replicas[replica.id] = replica
        self.fences[replica.id] = threading.Event()
        self._algorithm.init(replica)
        replica.commit()

    def drop(self, node: NodeId) -> None:
        """Close the program of a node that is gone; its contributions stay for exchanges that are not closed yet."""
        program = self._programs.get(node)
        if program is not None:
            program.over = True
            program.coroutine.close()

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, order: RoundOrder, nodes: Sequence[NodeId]) -> None:
        """Apply a commit and make the programs of a new round; ``resume`` runs them.

        Args:
            order: of the round.
            nodes: those of this process whose programs begin.
        """
        number, view = order.number, order.view
        self.settle(dict.fromkeys(nodes, order.committed))
        self._digests = []
        self.exchanges.begin(number, view.members)
        algorithm = self._algorithm
        members = frozenset(algorithm.participants(view, generator(self._seed, number, "participants")))
        for node in nodes:
            replica = self.replicas[node]
            fence = self.fences[node]
            if fence.is_set():
                fence.clear()
            if node in order.places:
                replica.replan(order.places[node])
            replica.begin(number, view, members)
            self.times.again(node, order.seen)
            if node == SERVER:
                coroutine = algorithm.server(replica)
            else:
                joins = node in order.joiners
                coroutine = whole_round(algorithm, replica, joins=joins, repairs=order.repair)
            self.drop(node)  # one that never ran would complain
            self._programs[node] = Program(coroutine)
            self.exchanges.reset(node)

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        """Commit each node's staged round, if the controller has committed up to it."""
        rounds = set(committed.values())
        for number in rounds:
            due = [self.replicas[node] for node, last in committed.items() if last == number]
            self._alias(batched.settle_all(due, number))

    def _alias(self, replicas: Sequence[Replica]) -> None:
        """Keep one copy of the shared state of nodes that agree; the digests of nodes that commit do."""
        if not replicas or not self._algorithm.replicated:
            return
        for replica in replicas[1:]:
            if replica.device == replicas[0].device:
                replica.shared.adopt(replicas[0].shared)

    def is_over(self, node: NodeId) -> bool:
        """Whether the program of ``node`` has returned or was closed: ``resume`` then does nothing."""
        return self._programs[node].over

    def resume(self, node: NodeId, result: object = None) -> Ticket:
        """Run a program to its next operation, or to its end."""
        program = self._programs[node]
        if program.over:
            return Stale()
        self.logs.current = node
        if isinstance(result, TrainReport):
            program.reports.append(result)
        elif isinstance(result, Message):
            if result.sender == SERVER:
                self.replicas[node].schedule.hear(result.round)
        elif isinstance(result, SharedResult):
            result = result.own(self.replicas[node].device)
        elif program.handle is not None:
            result, program.handle = program.handle, None
        try:
            try:
                operation = program.coroutine.send(result)
            except StopIteration:
                return self._finish(node)
            kind = type(operation)
            if kind in _COMPUTE:
                return Computing(cast("Compute", operation))
            if kind in _COLLECTIVE:
                return self._collective(node, operation, started=False)
            return self._accept(node, operation)
        except Exception as error:  # noqa: BLE001 - whatever a user's program raises is data here
            return failure(node, self.replicas[node].round, error)

    def drive(self, items: Sequence[tuple[NodeId, object]]) -> list[tuple[NodeId, Ticket]]:
        """Run programs, computing on the way, until each is at an exchange or at its end."""
        tickets: list[tuple[NodeId, Ticket]] = []
        while items:
            computing: list[tuple[NodeId, Compute]] = []
            for node, result in items:
                ticket = self.resume(node, result)
                if isinstance(ticket, Computing):
                    computing.append((node, ticket.operation))
                else:
                    tickets.append((node, ticket))
            done = list(zip((node for node, _ in computing), self.computation.run(computing), strict=True))
            tickets += [(node, result) for node, result in done if isinstance(result, Failed | Stale)]
            items = [(node, result) for node, result in done if not isinstance(result, Failed | Stale)]
        return tickets

    def _accept(self, node: NodeId, operation: object) -> Ticket:
        """Take an operation that neither computes nor is collective."""
        match operation:
            case Start(operation=AllReduce() | AllGather() | NeighborAllGather() as inner):
                return self._collective(node, inner, started=True)
            case Start(operation=inner):
                message = f"Start takes an AllReduce, AllGather or NeighborAllGather, not a {type(inner).__name__}"
                raise ProgramError(message)
            case Wait(handle):
                return Waiting(self.exchanges.wait(node, handle))
            case Send(to, payload):
                return self._finish(node) if self._is_withheld(node, to, payload) else self.outbox.send(to, payload)
            case Receive(until_s):
                return Receiving(None if until_s is None else max(0.0, until_s - self.replicas[node].now))
            case Sleep(seconds):
                return Sleeping(seconds)
            case Ping(nodes, timeout_s):
                return Pinging(tuple(nodes), timeout_s)
            case _:
                message = f"the program awaits a {type(operation).__name__}; it may only await operations of the api"
                raise ProgramError(message)

    def _is_withheld(self, node: NodeId, to: NodeId, payload: Payload) -> bool:
        """Whether a message is not finite and its sender's round ends without it, as ``on_nan`` says.

        Raises:
            NonFiniteLossError: it is not finite, and somebody waits for it.
        """
        replica, program = self.replicas[node], self._programs[node]
        found = trouble(payload, max(1, len(replica.view.members)))
        if found is None:
            return False
        what = f"what it sends to {'the server' if to == SERVER else node_name(to)} {found}"
        if node == SERVER or to != SERVER:
            where = f"{node_name(node)}, round {replica.round}"
            raise NonFiniteLossError(f"{where}: {what}; lower optimizer.lr, or the outer one")
        replica.guard.give_up(what)
        replica.shared.rollback()
        replica.local.rollback()
        program.coroutine.close()
        return True

    def _collective(self, node: NodeId, operation: Any, *, started: bool) -> Posted:  # noqa: ANN401 - one of three
        if node == SERVER:
            message = f"the server awaits {type(operation).__name__}; it meets the others in Send and Receive alone"
            raise ProgramError(message)
        if not self._algorithm.synchronous:
            message = f"an asynchronous program awaits {type(operation).__name__}, for which all would have to be there"
            raise ProgramError(message)
        posted = self.exchanges.post(node, operation, started=started)
        if started:
            self._programs[node].handle = Handle(posted.seq, self.replicas[node].round)
        return posted

    def _finish(self, node: NodeId) -> Returned:
        replica, program = self.replicas[node], self._programs[node]
        program.over = True
        self.exchanges.check_finished(node)
        reports = program.reports
        if not self._alone:
            for report in reports:
                done = f"{report.num_steps} steps, {report.num_samples} samples, loss {report.loss:.6g}"
                self.logs.add(node, f"round {replica.round}: {done}, {report.seconds:.3f} s")
        position = replica.data.position
        num_samples = sum(report.num_samples for report in reports)
        record = self._algorithm.sealed(replica)
        return Returned(
            digest=self._digest(replica, record),
            num_collectives=self.exchanges.num_posted(node),
            loss=mean_loss([(report.loss, report.num_samples) for report in reports]),
            num_samples=num_samples,
            train_seconds=sum(report.seconds for report in reports),
            record=record,
            position=position if position != replica.committed_progress.position else None,
            num_drawn=replica.data.num_drawn - replica.data.num_void,
            num_void=replica.data.num_void,
            unsent=self._algorithm.unsent(replica),
            metrics=replica.reported or None,
        )

    def _digest(self, replica: Replica, record: bytes | None) -> str:
        """Stage a node's round; return the digest of its shared state, or "" if the state is not replicated."""
        replica.stage(record)
        if not self._algorithm.replicated or replica.id == SERVER:
            return ""
        mine = replica.shared.leaves()
        # Bits that equal those of a node staged before need not be hashed again.
        for known, digest in self._digests:
            if same_bits(mine, known):
                return digest
        digest = replica.shared.digest()
        self._digests.append((mine, digest))
        return digest

    def cancel(self, nodes: Iterable[NodeId]) -> None:
        """Close the programs of ``nodes`` and roll the nodes back to their last commit.

        Their contributions stay: they may be in exchanges that are not closed yet.
        """
        for node in nodes:
            self.drop(node)
            self.exchanges.detach(node)
            self.replicas[node].rollback()

    def unpack(self, node: NodeId, specs: tuple[TensorSpec, ...], data: Buffer) -> Payload:
        """Decode a payload for ``node``."""
        return buffers.unpack(specs, data, self.replicas[node].device)
