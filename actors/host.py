"""The host: the nodes of one process, their programs of the running round, and their side of each exchange.

Both runtimes use it: the simulator hosts all nodes, a Ray actor hosts one or several. A host never decides anything;
it runs programs to their next operation and moves bytes as it is told.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from actors import buffers
from actors.buffers import Cuts, Signature, TensorSpec
from actors.replica import Interrupted
from actors.state import same_bits
from algorithms.api import (
    INLINE_LIMIT_BYTES,
    AllGather,
    AllReduce,
    Operation,
    Reduced,
    Train,
    TrainReport,
)
from algorithms.errors import ProgramError, StarlingError, UnsupportedOperation
from algorithms.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

    from actors.buffers import Buffer
    from actors.replica import Fence, Replica
    from algorithms.api import NodeId, Payload, State, View
    from algorithms.closing import ClosePolicy

Collective: TypeAlias = "AllReduce[Any] | AllGather[Any]"


_MAX_CUTS = 64

# --- tickets: what a program did last, for the rendezvous -------------------------------------------------------------


@dataclass(frozen=True)
class Posted:
    """The program awaits a collective operation and contributes to it (or only receives)."""

    seq: int
    signature: Signature
    specs: tuple[TensorSpec, ...] | None
    """What is contributed; ``None`` contributes nothing."""
    weight: float
    part_nbytes: tuple[int, ...]
    """Booked bytes of each part."""
    result_nbytes: tuple[int, ...]
    """Booked bytes of each part of the result; empty for a gather."""
    inline: Buffer | None
    """The contribution itself, if it is small."""
    close: ClosePolicy

    @property
    def nbytes(self) -> int:
        """Booked bytes of all parts."""
        return sum(self.part_nbytes)


@dataclass(frozen=True)
class Returned:
    """The program is done; its state is staged."""

    digest: str
    num_collectives: int
    loss: float | None
    """Mean training loss of the round; ``None`` without training."""
    num_samples: int
    train_seconds: float


@dataclass(frozen=True)
class Failed:
    """The program, or the task that it trains, raised."""

    message: str
    traceback: str | None
    """``None`` if the message says all there is to say."""


@dataclass(frozen=True)
class Computing:
    """The program awaits compute; never leaves the host's process."""

    operation: Train


@dataclass(frozen=True)
class Stale:
    """The program was cancelled."""


Ticket: TypeAlias = Posted | Returned | Failed | Computing | Stale


@dataclass(frozen=True)
class Contributed:
    """One member's inline contribution, as the rendezvous passes it on to all members."""

    node: NodeId
    weight: float
    specs: tuple[TensorSpec, ...]
    data: Buffer


@dataclass(frozen=True)
class Shared:
    """A result for several nodes of the process. Each gets a copy when it runs on: none aliases another's."""

    result: Reduced[Any]

    def own(self, device: torch.device) -> Reduced[Any]:
        """A copy on ``device``."""
        value = self.result.value
        if isinstance(value, torch.Tensor):
            own: Any = value.to(device, copy=True)
        else:
            own = {name: one.to(device, copy=True) for name, one in value.items()}
        return Reduced(own, self.result.members, self.result.weight)


# --- the programs -----------------------------------------------------------------------------------------------------


@dataclass
class _Exchange:
    """A node's side of one collective operation."""

    operation: Collective
    cuts: Cuts | None = None
    parts: list[Buffer] = field(default_factory=list)


@dataclass
class _Program:
    """One round of one node."""

    coroutine: Coroutine[Operation[Any], Any, None]
    exchanges: list[_Exchange] = field(default_factory=list)
    reports: list[TrainReport] = field(default_factory=list)


class Host:
    """Several nodes in one process; see the module's docstring."""

    def __init__(self, replicas: Iterable[Replica], fence: Fence) -> None:
        self.replicas: dict[NodeId, Replica] = {replica.id: replica for replica in replicas}
        first, *others = self.replicas.values()
        for replica in others:
            replica.share_scratch(first)
        self._fence = fence
        self._programs: dict[NodeId, _Program] = {}
        self._committed = -1
        self._digests: list[tuple[dict[str, State], str]] = []
        """Of the replicas that have staged the running round."""
        self._cuts_of: dict[tuple[str, tuple[TensorSpec, ...], int], Cuts] = {}
        self.current = next(iter(self.replicas))
        """Whose code is running, or ran last: what it prints goes to that node's log."""
        self._logs: dict[NodeId, list[str]] = {}

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
        first, *others = self.replicas.values()
        # What is unequal from the start stays, and the first commit's digests tell of it, as they do across processes.
        self._alias([first, *(replica for replica in others if replica.shared.equals(first.shared))])

    # --- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, number: int, view: View, committed: int, nodes: Sequence[NodeId]) -> None:
        """Apply what is committed and make the programs of a new round; ``resume`` runs them."""
        self.settle(committed)
        self._digests = []
        spec = self.replicas[self.current].spec
        cohort = spec.algorithm.participants(view, generator(spec.seed, number, "participants"))
        for node in nodes:
            replica = self.replicas[node]
            replica.begin(number, view, cohort)
            self._programs[node] = _Program(replica.spec.algorithm.round(replica))

    def settle(self, committed: int) -> None:
        """Apply the controller's commits up to round ``committed``."""
        if committed > self._committed:
            self._committed = committed
            self._alias([replica for replica in self.replicas.values() if replica.settle(committed)])

    @staticmethod
    def _alias(replicas: Sequence[Replica]) -> None:
        """Keep one copy of the replicated state of nodes that agree, as digests show of those that commit."""
        for replica in replicas[1:]:
            if replica.spec.algorithm.replicated and replica.device == replicas[0].device:
                replica.shared.adopt(replicas[0].shared)

    def resume(self, node: NodeId, result: object = None) -> Ticket:
        """Run a program to its next operation, or to its end."""
        program = self._programs[node]
        self.current = node
        if isinstance(result, TrainReport):
            program.reports.append(result)
        elif isinstance(result, Shared):
            result = result.own(self.replicas[node].device)
        try:
            operation = program.coroutine.send(result)
        except StopIteration:
            return self._guard(node, self._finish, node)
        except Exception as error:  # noqa: BLE001 - whatever a user's program raises is data here
            return failure(node, self.replicas[node].round, error)
        return self._guard(node, self._accept, node, operation)

    def drive(self, items: Sequence[tuple[NodeId, object]]) -> list[tuple[NodeId, Ticket]]:
        """Run programs, computing on the way, until each is at an exchange or at its end."""
        tickets: list[tuple[NodeId, Ticket]] = []
        while items:
            training: list[tuple[NodeId, Train]] = []
            for node, result in items:
                ticket = self.resume(node, result)
                if isinstance(ticket, Computing):
                    training.append((node, ticket.operation))
                else:
                    tickets.append((node, ticket))
            done = list(zip((node for node, _ in training), self.compute(training), strict=True))
            tickets += [(node, report) for node, report in done if not isinstance(report, TrainReport)]
            items = [(node, report) for node, report in done if isinstance(report, TrainReport)]
        return tickets

    def _guard(self, node: NodeId, function: Any, *arguments: Any) -> Ticket:  # noqa: ANN401 - one of two methods
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 - as above: a payload of the wrong kind, say
            return failure(node, self.replicas[node].round, error)

    def _accept(self, node: NodeId, operation: object) -> Ticket:
        match operation:
            case Train(rule=None):
                return Computing(operation)
            case AllReduce() | AllGather():
                return self._post(node, cast("Collective", operation))
            case Train():
                message = "Train(rule=…) is not supported by this runtime yet"
                raise UnsupportedOperation(message)
            case Operation():
                message = f"{type(operation).__name__} is not supported by this runtime yet"
                raise UnsupportedOperation(message)
            case _:
                message = f"the program awaits a {type(operation).__name__}; it may only await operations of the api"
                raise ProgramError(message)

    def _post(self, node: NodeId, operation: Collective) -> Posted:
        replica, program = self.replicas[node], self._programs[node]
        exchange = _Exchange(operation)
        program.exchanges.append(exchange)
        seq = len(program.exchanges) - 1
        signature = buffers.signature_of(operation)
        payload = cast("Payload | None", operation.payload if isinstance(operation, AllGather) else operation.tensors)
        if payload is None or replica.skipping:
            if isinstance(operation, AllReduce) and operation.tensors is not None:
                signature = Signature(signature.operation, signature.parts, None)
            return Posted(seq, signature, None, 0.0, (), (), None, operation.close)
        if isinstance(operation, AllGather):
            specs = buffers.specs_of(payload)
            nbytes = buffers.payload_nbytes(specs)
            exchange.parts = [buffers.pack(payload)]
            inline = exchange.parts[0] if nbytes <= INLINE_LIMIT_BYTES else None
            return Posted(seq, signature, specs, 1.0, (nbytes,), (), inline, operation.close)
        specs = signature.tensors
        assert specs is not None
        # Its settings are needed to the end, its tensors until they are delivered: they are as large as the model.
        exchange.operation = replace(operation, tensors=None)
        cuts = exchange.cuts = self._cut(operation, signature.parts, specs, len(replica.view.members))
        exchange.parts = cuts.encode(payload)
        sizes = cuts.part_nbytes
        inline = exchange.parts[0] if sum(sizes) <= INLINE_LIMIT_BYTES else None
        weight, results = float(operation.weight), cuts.result_nbytes
        return Posted(seq, signature, specs, weight, sizes, results, inline, operation.close)

    def _cut(self, operation: AllReduce[Any], parts: str, specs: tuple[TensorSpec, ...], num_members: int) -> Cuts:
        """Where contributions are cut; found once for all rounds and nodes of the process."""
        known = self._cuts_of.get((parts, specs, num_members))
        if known is None:
            whole = Cuts(specs, operation.codec, operation.result_codec, 1)
            parted = buffers.num_parts(sum(whole.part_nbytes), num_members)
            known = whole if parted == 1 else Cuts(specs, operation.codec, operation.result_codec, parted)
            if len(self._cuts_of) >= _MAX_CUTS:
                self._cuts_of.clear()
            self._cuts_of[parts, specs, num_members] = known
        return known

    def _finish(self, node: NodeId) -> Returned:
        replica, program = self.replicas[node], self._programs.pop(node)
        reports = program.reports
        losses = [report.loss for report in reports]
        for report in reports:
            done = f"{report.num_steps} steps, {report.num_samples} samples, loss {report.loss:.6g}"
            self.log(node, f"round {replica.round}: {done}, {report.seconds:.3f} s")
        return Returned(
            digest=self._digest(replica) if replica.spec.algorithm.replicated else "",
            num_collectives=len(program.exchanges),
            loss=sum(losses) / len(losses) if losses else None,
            num_samples=sum(report.num_samples for report in reports),
            train_seconds=sum(report.seconds for report in reports),
        )

    def _digest(self, replica: Replica) -> str:
        """Stage a node's round; bits that equal those of a node staged before need not be hashed again."""
        replica.stage()
        mine = replica.shared.leaves()
        for known, digest in self._digests:
            if same_bits(mine, known):
                return digest
        digest = replica.shared.digest()
        self._digests.append((mine, digest))
        return digest

    def cancel(self, nodes: Iterable[NodeId]) -> None:
        """Close the programs of ``nodes``, drop what they staged, and go back to the last commit."""
        for node in nodes:
            program = self._programs.pop(node, None)
            if program is not None:
                program.coroutine.close()
            self.replicas[node].rollback()

    # --- compute -----------------------------------------------------------------------------------------------------

    def compute(self, requests: Sequence[tuple[NodeId, Train]]) -> list[TrainReport | Failed | Stale]:
        """Carry out compute operations of several nodes.

        Equal ones of one process arrive together, so that a handler which batches them over replicas can take them.
        """
        results: list[TrainReport | Failed | Stale] = []
        for node, operation in requests:
            replica = self.replicas[node]
            self.current = node
            try:
                results.append(replica.train(operation, self._fence))
            except Interrupted:
                results.append(Stale())
            except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
                results.append(failure(node, replica.round, error))
        return results

    # --- exchanges ---------------------------------------------------------------------------------------------------

    def parts(self, node: NodeId, seq: int) -> list[Buffer]:
        """A node's encoded contribution to exchange ``seq``, one buffer per part."""
        return self._programs[node].exchanges[seq].parts

    def reduce(
        self,
        node: NodeId,
        seq: int,
        part: int,
        specs: tuple[TensorSpec, ...],
        contributions: Mapping[NodeId, tuple[Buffer, float]],
    ) -> Buffer:
        """Combine one part of the contributions (encoded bytes and weight), in sorted member order."""
        operation = cast("AllReduce[Any]", self._programs[node].exchanges[seq].operation)
        cuts = self._cuts(node, seq, specs)
        ordered = [contributions[member] for member in sorted(contributions)]
        return cuts.reduce(operation, part, [data for data, _ in ordered], [weight for _, weight in ordered])

    def _cuts(self, node: NodeId, seq: int, specs: tuple[TensorSpec, ...]) -> Cuts:
        """The cuts of an exchange; a member that contributes nothing learns the specs from those that do."""
        exchange = self._programs[node].exchanges[seq]
        if exchange.cuts is None:
            operation = cast("AllReduce[Any]", exchange.operation)
            parts = buffers.signature_of(operation).parts
            exchange.cuts = self._cut(operation, parts, specs, len(self.replicas[node].view.members))
        return exchange.cuts

    def reduced(
        self,
        nodes: Sequence[NodeId],
        seq: int,
        specs: tuple[TensorSpec, ...],
        weights: Mapping[NodeId, float],
        parts: Sequence[Buffer],
    ) -> dict[NodeId, Reduced[Any] | Shared]:
        """The result of an ``AllReduce`` for several nodes, decoded once."""
        members = tuple(sorted(weights))
        total = sum(weights[member] for member in members)
        first = nodes[0]
        value = self._cuts(first, seq, specs).assemble(parts, self.replicas[first].device)
        result = Reduced(value, members, total)
        for node in nodes:
            self._programs[node].exchanges[seq].parts = []  # delivered to all: nobody asks for them again
        return {node: result if len(nodes) == 1 else Shared(result) for node in nodes}

    def combine(
        self, nodes: Sequence[NodeId], seq: int, inline: Sequence[Contributed]
    ) -> dict[NodeId, Reduced[Any] | Shared] | dict[NodeId, dict[NodeId, Payload]]:
        """The result of an exchange of inline contributions for several nodes; the same bits as through parts."""
        first = nodes[0]
        operation = self._programs[first].exchanges[seq].operation
        ordered = sorted(inline, key=lambda one: one.node)
        if isinstance(operation, AllGather):
            gathered = [(one.node, one.specs, one.data) for one in ordered]
            return {node: self.gathered(node, gathered) for node in nodes}
        contributions = {one.node: (one.data, one.weight) for one in ordered}
        part = self.reduce(first, seq, 0, ordered[0].specs, contributions)
        weights = {one.node: one.weight for one in ordered}
        return self.reduced(nodes, seq, ordered[0].specs, weights, [part])

    def gathered(
        self, node: NodeId, contributions: Iterable[tuple[NodeId, tuple[TensorSpec, ...], Buffer]]
    ) -> dict[NodeId, Payload]:
        """The result of an ``AllGather``."""
        device = self.replicas[node].device
        return {member: buffers.unpack(specs, data, device) for member, specs, data in contributions}


def failure(node: NodeId, number: int, error: Exception) -> Failed:
    """What a program's exception looks like to the person who wrote it."""
    if isinstance(error, StarlingError):
        message = str(error)
        return Failed(message if message.startswith("node ") else f"node {node}, round {number}: {message}", None)
    text = "".join(traceback.format_exception(error))
    return Failed(f"node {node}, round {number}: {type(error).__name__}: {error}", text)
