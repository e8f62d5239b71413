"""The nodes' side of exchanges: what they contribute, how a part is reduced, and what comes out for each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from starling.actors.host.programs import Collective, Exchange
from starling.actors.wire import buffers
from starling.actors.wire.batched_mixing import Mixtures, Rows
from starling.actors.wire.buffers import Cuts, Signature, TensorSpec
from starling.actors.wire.finite import trouble
from starling.actors.wire.tickets import Contributed, Posted, among
from starling.algorithms.api import INLINE_LIMIT_BYTES, AllGather, AllReduce, Inbox, NeighborAllGather, Reduced
from starling.algorithms.closing import ClosePolicy, Quorum
from starling.algorithms.codecs import Identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from starling.actors.host.programs import Program
    from starling.actors.replica.replica import Replica
    from starling.actors.wire.buffers import Buffer
    from starling.actors.wire.tickets import Wants
    from starling.algorithms.api import NodeId, Payload
    from starling.algorithms.topologies import Mixing, Topology


_MAX_CUTS = 64

_HERE = np.empty(0, dtype=np.uint8)
"""Stands for a small contribution that need not travel."""


@dataclass(frozen=True)
class Shared:
    """A result for several nodes of the process. Each gets a copy when it runs on: none aliases another's."""

    result: Any

    def own(self, device: torch.device) -> Any:  # noqa: ANN401 - what the operation gives
        """A copy on ``device``."""
        if isinstance(self.result, Reduced):
            return Reduced(_copy(self.result.value, device), self.result.members, self.result.weight)
        return {member: _copy(payload, device) for member, payload in self.result.items()}


def _copy(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - a payload
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: _copy(one, device) for name, one in cast("dict[str, Any]", value).items()}
    return value


class Received(Mapping["NodeId", "Payload"]):
    """The payloads of those of some senders that are in; looked up when they are asked for, as most never are."""

    __slots__ = ("_all", "_senders")

    def __init__(self, everybody: Mapping[NodeId, Payload], senders: tuple[NodeId, ...]) -> None:
        self._all = everybody
        self._senders = senders

    def __getitem__(self, node: NodeId) -> Payload:
        if node not in self._senders:
            raise KeyError(node)
        return self._all[node]

    def __iter__(self) -> Iterator[NodeId]:
        return (sender for sender in self._senders if sender in self._all)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass
class _Concluded:
    """A closed exchange's result in this process."""

    result: Any
    """``Reduced``, or payloads by member."""
    weights: Mapping[NodeId, Mapping[NodeId, float]] | None = None
    """The mixing matrix of a neighbour gather."""
    mixtures: Mixtures | None = None
    num_taken: int = 0


@dataclass(frozen=True)
class _Form:
    """An operation without what it contributes."""

    parts: tuple[object, ...]
    signature: Signature
    settings: Collective


class _Neighborhoods:
    """Who receives from whom under one mixing matrix, in the forms that are asked for in each round."""

    def __init__(self, topology: Topology, mixing: Mixing) -> None:
        self.topology = topology
        self.mixing = mixing
        self._ordered: dict[NodeId, tuple[NodeId, ...]] = {}
        self._sets: dict[NodeId, Wants] = {}

    @functools.cached_property
    def rows(self) -> Rows:
        """The matrix, to be multiplied with all nodes' values."""
        return Rows(self.mixing.weights)

    def ordered(self, node: NodeId) -> tuple[NodeId, ...]:
        """In-neighbours, sorted."""
        if node not in self._ordered:
            self._ordered[node] = self.mixing.in_neighbors(node)
        return self._ordered[node]

    def of(self, node: NodeId) -> Wants:
        """In-neighbours, as a set, and who takes their places."""
        if node not in self._sets:
            self._sets[node] = frozenset(self.mixing.substitutes.get(node, self.ordered(node)))
        return self._sets[node]


class Exchanges:
    """Mixed into the host: contributions and results of its nodes' exchanges in the running round."""

    def __init__(self, replicas: dict[NodeId, Replica]) -> None:
        self.replicas = replicas
        self.programs: dict[NodeId, Program] = {}
        self.alone = False
        """All nodes of the run are here: nothing travels, and nobody reads logs."""
        self.outbox: dict[int, Buffer] = {}
        """Large messages that nobody has fetched yet."""
        self._cuts_of: dict[tuple[str, tuple[TensorSpec, ...], int], Cuts] = {}
        self._mixings: dict[int, _Neighborhoods] = {}
        self._known: _Neighborhoods | None = None
        """The last ones: most graphs stay."""
        self._forms: dict[tuple[object, ...], _Form] = {}
        self._last_form: _Form | None = None
        """If the last operation was a neighbour gather: in a gossip round a thousand come one after the other."""
        self._concluded: dict[int, _Concluded] = {}
        self._number = 0
        self._members: tuple[NodeId, ...] = ()

    def forget(self, number: int, members: tuple[NodeId, ...]) -> None:
        """Round ``number`` of ``members`` begins."""
        # Not to be read off a replica: who takes a dead node's place in mid-round is in no round, and has no view.
        self._number, self._members = number, members
        self._mixings, self._concluded = {}, {}

    # --- contributions -----------------------------------------------------------------------------------------------

    def post(self, node: NodeId, operation: Collective, *, started: bool) -> Posted:
        """Take a node's contribution to the next exchange of its program.

        Raises:
            ProgramError: it contributes what cannot travel.
        """
        replica, program = self.replicas[node], self.programs[node]
        form = self._form(operation)
        signature = form.signature
        exchange = Exchange(form.settings, signature, open=started)
        seq = len(program.exchanges)
        program.exchanges.append(exchange)
        wants = None
        if isinstance(operation, NeighborAllGather):
            wants = self._neighborhoods(node, seq, operation.topology).of(node)
        payload: Any = operation.tensors if isinstance(operation, AllReduce) else operation.payload
        waits, close = not started, None if type(operation.close) is Quorum else operation.close
        if payload is not None and not replica.skipping:
            self._check(replica, operation, payload, seq)
        if payload is None or replica.skipping:
            return self._receives(replica, exchange, seq, close, wants, waits=waits)
        if started:
            payload = self._held(replica, exchange, payload)
        if not isinstance(operation, AllReduce):
            specs, nbytes = buffers.described(payload)
            exchange.payload = payload
            inline = None
            if nbytes <= INLINE_LIMIT_BYTES:
                inline = _HERE if self.alone else buffers.pack(payload)
            return Posted(seq, signature, specs, 1.0, (nbytes,), (), inline, close, wants, waits)
        specs = signature.tensors
        assert specs is not None
        cuts = exchange.cuts = self._cut(operation, signature.parts, specs, len(self._members))
        exchange.parts = cuts.encode(payload)
        # Finite values may be too large for a codec's floats, or its norms.
        if not (
            isinstance(operation.codec, Identity) or operation.aggregator.bears_nan or cuts.are_finite(exchange.parts)
        ):
            replica.give_up_round(f"what it gives to exchange {seq} is not finite as {operation.codec.name} has it")
            exchange.parts = ()
            return self._receives(replica, exchange, seq, close, wants, waits=waits)
        sizes = cuts.part_nbytes
        inline = exchange.parts[0] if sum(sizes) <= INLINE_LIMIT_BYTES else None
        weight, results = float(operation.weight), cuts.result_nbytes
        least = operation.aggregator.least
        return Posted(seq, signature, specs, weight, sizes, results, inline, close, wants, waits, None, least)

    @staticmethod
    def _receives(
        replica: Replica,
        exchange: Exchange,
        seq: int,
        close: ClosePolicy | None,
        wants: Wants | None,
        *,
        waits: bool,
    ) -> Posted:
        """What is said of a node that has nothing to contribute."""
        if isinstance(exchange.operation, AllReduce):
            exchange.signature = Signature(exchange.signature.operation, exchange.signature.parts, None)
        skipped = replica.skipped if replica.skipping else None
        least = exchange.operation.aggregator.least if isinstance(exchange.operation, AllReduce) else 1
        return Posted(seq, exchange.signature, None, 0.0, (), (), None, close, wants, waits, skipped, least)

    @staticmethod
    def _check(replica: Replica, operation: Collective, payload: Payload, seq: int) -> None:
        """Keep from others what is not finite: the node stops, or skips the round, as ``on_nan`` says."""
        weight, least = 1.0, 1
        if isinstance(operation, AllReduce):
            if operation.aggregator.bears_nan:
                return
            weight = operation.weight
        elif isinstance(operation, AllGather):
            least = max(1, replica.layout.num_values)
        found = trouble(payload, len(replica.view.members), weight=weight, least=least)
        if found is not None:
            replica.give_up_round(f"what it gives to exchange {seq} ({type(operation).__name__}) {found}")

    @staticmethod
    def _held(replica: Replica, exchange: Exchange, payload: Payload) -> Payload:
        """What a started exchange contributes: copied if it is trained on, watched if not."""
        trained = {one.untyped_storage().data_ptr() for one in (replica.parameters, replica.buffers) if one.numel()}

        def hold(value: torch.Tensor | float) -> torch.Tensor | float:
            if not isinstance(value, torch.Tensor):
                return value
            if value.untyped_storage().data_ptr() in trained:
                return value.detach().clone()
            exchange.written.append((value, value._version))  # noqa: SLF001 - torch's counter
            return value

        if isinstance(payload, torch.Tensor | int | float):
            return hold(payload)
        return {name: hold(value) for name, value in payload.items()}

    def _form(self, operation: Collective) -> _Form:
        """What does not change from round to round of an operation, and is alike for all nodes of the process."""
        last = self._last_form
        if last is not None and isinstance(operation, NeighborAllGather):
            parts = last.parts
            if parts[0] is operation.topology and parts[1] is operation.close:
                return last
        match operation:
            case AllReduce(tensors, _, aggregator, codec, result_codec, close):
                parts = aggregator, codec, result_codec, close
                specs = None if tensors is None else buffers.described(tensors)[0]
            case AllGather(_, close):
                parts, specs = (close,), None
            case NeighborAllGather(_, topology, close):
                parts, specs = (topology, close), None
        key = type(operation), specs, *map(id, parts)
        known = self._forms.get(key)
        # An id is another's once its object is gone.
        if known is None or any(one is not other for one, other in zip(known.parts, parts, strict=True)):
            if len(self._forms) >= _MAX_CUTS:
                self._forms.clear()
            # Of an AllReduce the settings are needed to the end, the tensors until they are delivered.
            nothing = {"tensors": None} if isinstance(operation, AllReduce) else {"payload": None}
            settings = replace(operation, **nothing)
            known = self._forms[key] = _Form(parts, buffers.signature_of(operation), settings)
        self._last_form = known if isinstance(operation, NeighborAllGather) else None
        return known

    def _neighborhoods(self, node: NodeId, seq: int, topology: Topology) -> _Neighborhoods:
        """Who is whose neighbour in this round's view; found once for all nodes of the process."""
        known = self._mixings.get(seq)
        if known is None or known.topology is not topology:
            mixing = topology.mixing(self._members, self._number, self.replicas[node].spec.seed)
            last = self._known
            known = last if last is not None and last.mixing is mixing else _Neighborhoods(topology, mixing)
            self._mixings[seq] = self._known = known
        return known

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

    def parts(self, node: NodeId, seq: int) -> Sequence[Buffer]:
        """A node's encoded contribution to exchange ``seq``, one buffer per part."""
        exchange = self.programs[node].exchanges[seq]
        if exchange.payload is not None and not exchange.parts:
            exchange.parts = [buffers.pack(exchange.payload)]
        return exchange.parts

    def detach(self, node: NodeId) -> None:
        """Let nothing that a node has contributed share memory with its parameters, which are about to go back."""
        program = self.programs.get(node)
        for exchange in () if program is None else program.exchanges:
            exchange.parts = [part.copy() for part in exchange.parts]
            if exchange.payload is not None:
                exchange.payload = _copy(exchange.payload, self.replicas[node].device)

    def conclude_here(self, nodes: Sequence[NodeId], seq: int) -> None:
        """Work out the result of a closed gather whose contributions, those of ``nodes``, are all in this process."""
        payloads = {node: self.programs[node].exchanges[seq].payload for node in nodes}
        copies, stacked = buffers.copies({node: payload for node, payload in payloads.items() if payload is not None})
        self.conclude_gather(nodes[0], seq, copies, stacked=stacked)

    # --- reduction ---------------------------------------------------------------------------------------------------

    def reduce(
        self,
        node: NodeId,
        seq: int,
        part: int,
        specs: tuple[TensorSpec, ...],
        contributions: Mapping[NodeId, tuple[Buffer, float]],
    ) -> Buffer:
        """Combine one part of the contributions (encoded bytes and weight), in sorted member order."""
        operation = cast("AllReduce[Any]", self.programs[node].exchanges[seq].operation)
        cuts = self._cuts(node, seq, specs)
        ordered = [contributions[member] for member in sorted(contributions)]
        return cuts.reduce(operation, part, [data for data, _ in ordered], [weight for _, weight in ordered])

    def _cuts(self, node: NodeId, seq: int, specs: tuple[TensorSpec, ...]) -> Cuts:
        """The cuts of an exchange; a member that contributes nothing learns the specs from those that do."""
        exchange = self.programs[node].exchanges[seq]
        if exchange.cuts is None:
            operation = cast("AllReduce[Any]", exchange.operation)
            exchange.cuts = self._cut(operation, exchange.signature.parts, specs, len(self._members))
        return exchange.cuts

    # --- results -----------------------------------------------------------------------------------------------------

    def conclude_inline(
        self, node: NodeId, seq: int, inline: Sequence[Contributed], closed: Iterable[NodeId] | None = None
    ) -> None:
        """Work out the result of a closed exchange of inline contributions; the same bits as through parts.

        ``closed`` are all whose contributions are in (default: those of ``inline``).
        """
        ordered = sorted(inline, key=lambda one: one.node)
        if not isinstance(self.programs[node].exchanges[seq].operation, AllReduce):
            received = {one.node: self.unpack(node, one.specs, one.data) for one in ordered}
            self.conclude_gather(node, seq, received, closed)
            return
        contributions = {one.node: (one.data, one.weight) for one in ordered}
        part = self.reduce(node, seq, 0, ordered[0].specs, contributions)
        self.conclude_reduce(node, seq, ordered[0].specs, {one.node: one.weight for one in ordered}, [part])

    def conclude_reduce(
        self,
        node: NodeId,
        seq: int,
        specs: tuple[TensorSpec, ...],
        weights: Mapping[NodeId, float],
        parts: Sequence[Buffer],
    ) -> None:
        """Decode the result of a closed ``AllReduce``, once for all nodes of the process."""
        members = tuple(sorted(weights))
        value = self._cuts(node, seq, specs).assemble(parts, self.replicas[node].device)
        self._conclude(seq, _Concluded(Reduced(value, members, sum(weights[member] for member in members))))

    def conclude_gather(
        self,
        node: NodeId,
        seq: int,
        payloads: Mapping[NodeId, Payload],
        present: Iterable[NodeId] | None = None,
        stacked: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Keep the contributions to a closed gather that this process received.

        Args:
            node: one of this process.
            seq: of the exchange.
            payloads: what was received.
            present: all whose contributions are in, here or elsewhere (default: those of ``payloads``).
            stacked: the tensors of which ``payloads`` are rows, if all nodes are here.
        """
        operation = self.programs[node].exchanges[seq].operation
        weights, mixtures = None, None
        if isinstance(operation, NeighborAllGather):
            known = self._neighborhoods(node, seq, operation.topology)
            seed, closed = self.replicas[node].spec.seed, frozenset(payloads if present is None else present)
            mixing = known.mixing
            if len(closed) < len(self._members):
                mixing = operation.topology.mixing(self._members, self._number, seed, closed)
            weights = mixing.weights
            if stacked and mixing is known.mixing:
                own = {member: self.programs[member].exchanges[seq].payload for member in payloads}
                mixtures = Mixtures(
                    known.rows, {member: one for member, one in own.items() if one is not None}, stacked
                )
        self._conclude(seq, _Concluded(payloads, weights, mixtures))

    def _conclude(self, seq: int, concluded: _Concluded) -> None:
        self._concluded[seq] = concluded

    def release(self, seq: int) -> None:
        """The exchange is closed, its result delivered to all: nobody asks for contributions to it again."""
        for program in self.programs.values():
            if len(program.exchanges) > seq:
                exchange = program.exchanges[seq]
                exchange.parts, exchange.payload = (), None

    def is_concluded(self, seq: int) -> bool:
        """Whether the result is there for ``take``."""
        return seq in self._concluded

    def take(self, node: NodeId, seq: int) -> Any:  # noqa: ANN401 - what the operation gives
        """A node's result of a concluded exchange; the last node to come takes it along."""
        concluded = self._concluded[seq]
        concluded.num_taken += 1
        alone = len(self.programs) == 1
        if concluded.num_taken == len(self.programs):
            del self._concluded[seq]
        if concluded.weights is None:
            return concluded.result if alone else Shared(concluded.result)
        known = self._mixings[seq]
        whole = concluded.weights is known.mixing.weights
        senders = known.ordered(node) if whole else tuple(sorted(among(known.of(node), concluded.result)))
        received = Received(concluded.result, senders)
        mixed = None if concluded.mixtures is None else concluded.mixtures.of(node, received)
        return Inbox(received, concluded.weights[node], mixed)

    def unpack(self, node: NodeId, specs: tuple[TensorSpec, ...], data: Buffer) -> Payload:
        """A message's payload, as ``node`` receives it."""
        return buffers.unpack(specs, data, self.replicas[node].device)
