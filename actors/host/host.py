"""The host: the nodes of one process, and their programs of the running round.

Both runtimes use it: the simulator hosts all nodes, a Ray actor hosts one or several. A host never decides anything;
it runs programs to their next operation, computes, and (``actors.host.exchanges``) moves bytes as it is told.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, cast

from starling.actors.data.plans import NOTHING_NEW
from starling.actors.host import batched
from starling.actors.host.exchanges import Exchanges, Shared
from starling.actors.host.failures import UnfinishedExchange, failure
from starling.actors.host.programs import Program
from starling.actors.host.recorded_clock import Times
from starling.actors.replica.replica import Interrupted, NonFiniteLossError
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
    Sending,
    Sleeping,
    Stale,
    Ticket,
    Waiting,
    mean_loss,
)
from starling.algorithms.api import (
    INLINE_LIMIT_BYTES,
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
)
from starling.algorithms.errors import ProgramError
from starling.algorithms.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.actors.data import Place
    from starling.actors.replica.replica import Replica
    from starling.actors.wire.tickets import Compute
    from starling.algorithms.api import NodeId, Payload, State, View


_COMPUTE = frozenset({Train, Batch, Gradient, Step, Loss, Evaluate})
_COLLECTIVE = frozenset({AllReduce, AllGather, NeighborAllGather})


class Host(Exchanges):
    """Several nodes in one process; see the module's docstring."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        super().__init__({replica.id: replica for replica in replicas})
        self.fences = {node: threading.Event() for node in self.replicas}
        """Told to stop, a node ends its round at its next step."""
        self._digests: list[tuple[dict[str, State], str]] = []
        """Of the replicas that have staged the running round."""
        self.current = next(iter(self.replicas))
        """Whose code is running, or ran last: what it prints goes to that node's log."""
        self._logs: dict[NodeId, list[str]] = {}
        # No other incarnation of these nodes, whose letters may still be on their way, has the same names for its own.
        self._letters = itertools.count(max(replica.incarnation for replica in self.replicas.values()) << 32)
        self.times = Times()
        for replica in self.replicas.values():
            replica.clock = self.times.watched(replica.id, replica.clock)

    def log(self, node: NodeId, line: str) -> None:
        """Add a line to a node's log."""
        self._logs.setdefault(node, []).append(line)

    def drain_logs(self) -> dict[NodeId, list[str]]:
        """Take what was logged since the last call."""
        logs, self._logs = self._logs, {}
        return logs

    def init(self) -> None:
        """Make the initial state of all nodes, before round 0."""
        for replica in self.replicas.values():
            replica.spec.algorithm.init(replica)
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
        replica.clock = self.times.watched(replica.id, replica.clock)
        replica.spec.algorithm.init(replica)
        replica.commit()

    def drop(self, node: NodeId) -> None:
        """``node`` is gone. What it has contributed stays: it may be in an exchange that is not closed yet."""
        program = self.programs.get(node)
        if program is not None:
            program.over = True
            program.coroutine.close()

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(
        self,
        number: int,
        view: View,
        committed: int,
        nodes: Sequence[NodeId],
        *,
        repair: bool = False,
        joiners: Sequence[NodeId] = (),
        places: Mapping[NodeId, Place] = NOTHING_NEW,
        seen: Sequence[float] = (),
    ) -> None:
        """Apply what is committed and make the programs of a new round; ``resume`` runs them.

        With ``repair`` they begin with ``on_view_change``, those of ``joiners`` with ``join`` before it. ``places``
        says of whom there is news what it is to draw, from the last commit on; ``seen``, what the nodes' clocks have
        shown in this round before.
        """
        self.settle(dict.fromkeys(nodes, committed))
        self._digests = []
        self.forget(number, view.members)
        algorithm = self.replicas[self.current].spec.algorithm
        cohort = algorithm.participants(view, generator(self.replicas[self.current].spec.seed, number, "participants"))
        members = frozenset(cohort)
        for node in nodes:
            replica = self.replicas[node]
            fence = self.fences[node]
            if fence.is_set():
                fence.clear()
            if node in places:
                replica.replan(places[node])
            replica.begin(number, view, members)
            self.times.again(node, seen)
            if node == SERVER:
                coroutine = algorithm.server(replica)
            else:
                joins = node in joiners
                coroutine = _prepared(replica, repair, joins) if repair or joins else algorithm.round(replica)
            self.drop(node)  # one that never ran would complain
            self.programs[node] = Program(coroutine)

    def settle(self, committed: Mapping[NodeId, int]) -> None:
        """Apply the controller's commits up to the given round of each node."""
        rounds = set(committed.values())
        for number in rounds:
            due = [self.replicas[node] for node, last in committed.items() if last == number]
            self._alias(batched.settle_all(due, number))

    @staticmethod
    def _alias(replicas: Sequence[Replica]) -> None:
        """Keep one copy of the replicated state of nodes that agree, as digests show of those that commit."""
        if not replicas or not replicas[0].spec.algorithm.replicated:
            return
        for replica in replicas[1:]:
            if replica.device == replicas[0].device:
                replica.shared.adopt(replicas[0].shared)

    def is_over(self, node: NodeId) -> bool:
        """Whether the program of ``node`` has returned or was closed: ``resume`` then does nothing."""
        return self.programs[node].over

    def resume(self, node: NodeId, result: object = None) -> Ticket:
        """Run a program to its next operation, or to its end."""
        program = self.programs[node]
        if program.over:
            return Stale()
        self.current = node
        if isinstance(result, TrainReport):
            program.reports.append(result)
        elif isinstance(result, Message):
            if result.sender == SERVER:
                self.replicas[node].hear(result.round)
        elif isinstance(result, Shared):
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
            done = list(zip((node for node, _ in computing), self.compute(computing), strict=True))
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
                return self._wait(node, handle)
            case Send(to, payload):
                specs = buffers.specs_of(payload)
                if self._is_withheld(node, to, payload):
                    return self._finish(node)
                data = buffers.pack(payload).copy()
                nbytes, letter = buffers.payload_nbytes(specs), next(self._letters)
                if nbytes > INLINE_LIMIT_BYTES:
                    self.outbox[letter] = data
                return Sending(to, letter, specs, nbytes, data if nbytes <= INLINE_LIMIT_BYTES else None)
            case Receive(until_s):
                return Receiving(None if until_s is None else max(0.0, until_s - self.replicas[node].clock()))
            case Sleep(seconds):
                return Sleeping(seconds)
            case Ping(nodes, timeout_s):
                return Pinging(tuple(nodes), timeout_s)
            case _:
                message = f"the program awaits a {type(operation).__name__}; it may only await operations of the api"
                raise ProgramError(message)

    def _is_withheld(self, node: NodeId, to: NodeId, payload: Payload) -> bool:
        """Whether a message is not to be sent, and its sender's round is over without it, as ``on_nan`` says.

        Raises:
            NonFiniteLossError: it is not finite, and somebody waits for it.
        """
        replica, program = self.replicas[node], self.programs[node]
        found = trouble(payload, max(1, len(replica.view.members)))
        if found is None:
            return False
        what = f"what it sends to {'the server' if to == SERVER else f'node {to}'} {found}"
        if node == SERVER or to != SERVER:
            who = "server" if node == SERVER else f"node {node}"
            raise NonFiniteLossError(f"{who}, round {replica.round}: {what}; lower optimizer.lr, or the outer one")
        replica.give_up_round(what)
        replica.shared.rollback()
        replica.local.rollback()
        program.coroutine.close()
        return True

    def _collective(self, node: NodeId, operation: Any, *, started: bool) -> Posted:  # noqa: ANN401 - one of three
        if node == SERVER:
            message = f"the server awaits {type(operation).__name__}; it meets the others in Send and Receive alone"
            raise ProgramError(message)
        replica, program = self.replicas[node], self.programs[node]
        if not replica.spec.algorithm.synchronous:
            message = f"an asynchronous program awaits {type(operation).__name__}, for which all would have to be there"
            raise ProgramError(message)
        posted = self.post(node, operation, started=started)
        if started:
            program.handle = Handle(posted.seq, replica.round)
        return posted

    def _wait(self, node: NodeId, handle: Handle[Any]) -> Waiting:
        program = self.programs[node]
        if handle.round != self.replicas[node].round or handle.sequence >= len(program.exchanges):
            message = f"Wait(exchange {handle.sequence} of round {handle.round}): a handle belongs to its round alone"
            raise UnfinishedExchange(message)
        exchange = program.exchanges[handle.sequence]
        if not exchange.open:
            message = f"Wait(exchange {handle.sequence}): it was waited for already; keep the result"
            raise UnfinishedExchange(message)
        exchange.open = False
        exchange.check_unwritten(handle.sequence)
        return Waiting(handle.sequence)

    def _finish(self, node: NodeId) -> Returned:
        replica, program = self.replicas[node], self.programs[node]
        program.over = True
        for seq, exchange in enumerate(program.exchanges):
            if exchange.open:
                message = (
                    f"the round ends while exchange {seq} ({exchange.signature.operation}) is in flight; Wait for it"
                )
                raise UnfinishedExchange(message)
        reports = program.reports
        if not self.alone:
            for report in reports:
                done = f"{report.num_steps} steps, {report.num_samples} samples, loss {report.loss:.6g}"
                self.log(node, f"round {replica.round}: {done}, {report.seconds:.3f} s")
        num_samples = sum(report.num_samples for report in reports)
        record = replica.spec.algorithm.sealed(replica)
        return Returned(
            digest=self._digest(replica, record),
            num_collectives=len(program.exchanges),
            loss=mean_loss([(report.loss, report.num_samples) for report in reports]),
            num_samples=num_samples,
            train_seconds=sum(report.seconds for report in reports),
            record=record,
            position=replica.position if replica.position != replica.committed_position else None,
            num_drawn=replica.num_drawn - replica.num_void,
            num_void=replica.num_void,
            unsent=replica.spec.algorithm.unsent(replica),
        )

    def _digest(self, replica: Replica, record: bytes | None) -> str:
        """Stage a node's round; bits that equal those of a node staged before need not be hashed again."""
        replica.stage(record)
        if not replica.spec.algorithm.replicated or replica.id == SERVER:
            return ""
        mine = replica.shared.leaves()
        for known, digest in self._digests:
            if same_bits(mine, known):
                return digest
        digest = replica.shared.digest()
        self._digests.append((mine, digest))
        return digest

    def cancel(self, nodes: Iterable[NodeId]) -> None:
        """Close the programs of ``nodes``, drop what they staged, and go back to the last commit.

        What they have contributed stays: it may be in an exchange that is not closed yet.
        """
        for node in nodes:
            program = self.programs.get(node)
            if program is not None:
                program.over = True
                program.coroutine.close()
            self.detach(node)
            self.replicas[node].rollback()

    # --- compute -----------------------------------------------------------------------------------------------------

    def compute(self, requests: Sequence[tuple[NodeId, Compute]]) -> list[Any]:
        """Carry out compute operations of several nodes; a result is what the program gets, ``Failed`` or ``Stale``.

        ``Train``s of one process are handed on batched, so that equal ones can be batched over replicas.
        """
        results: list[Any] = [None] * len(requests)
        trains = [place for place, (_, operation) in enumerate(requests) if isinstance(operation, Train)]
        if trains:
            batch = [
                (self.replicas[node], cast("Train", operation)) for node, operation in map(requests.__getitem__, trains)
            ]
            fenced = [(replica, operation, self.fences[replica.id]) for replica, operation in batch]
            for place, outcome in zip(trains, batched.train_together(fenced, self._turn), strict=True):
                node = requests[place][0]
                is_done = isinstance(outcome, TrainReport)
                results[place] = self.times.timed(node, outcome) if is_done else self._outcome(node, outcome)
        for place, (node, operation) in enumerate(requests):
            if not isinstance(operation, Train):
                self.current = node
                try:
                    results[place] = self._carry_out(node, operation)
                except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
                    results[place] = self._outcome(node, error)
        return results

    def _turn(self, node: NodeId) -> None:
        self.current = node

    def _carry_out(self, node: NodeId, operation: Compute) -> object:
        replica = self.replicas[node]
        if self.fences[node].is_set():
            return Stale()
        match operation:
            case Batch():
                return replica.batch(operation)
            case Gradient():
                return replica.gradient(operation)
            case Step():
                return replica.step(operation)
            case Loss():
                return replica.loss(operation)
            case Evaluate():
                return replica.evaluate_at(operation)
            case Train():
                raise AssertionError

    def _outcome(self, node: NodeId, outcome: object) -> object:
        if isinstance(outcome, Interrupted):
            return Stale()
        if isinstance(outcome, Exception):
            return failure(node, self.replicas[node].round, outcome)
        return outcome


async def _prepared(replica: Replica, repair: bool, joins: bool) -> None:  # noqa: FBT001 - of this file alone
    """The round of a node that was given another's state, or whose view has changed."""
    algorithm = replica.spec.algorithm
    if joins:
        await algorithm.join(replica)
    if repair:
        await algorithm.on_view_change(replica)
    await algorithm.round(replica)
