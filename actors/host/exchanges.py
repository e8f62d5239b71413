"""The nodes' side of exchanges: contributions, the reduction of a part, and the result for each node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from starling.actors.host.exchange_plans import ExchangePlans
from starling.actors.host.failures import UnfinishedExchange
from starling.actors.host.programs import Collective, CollectiveCall
from starling.actors.host.results import Concluded, Received, SharedResult, copied
from starling.actors.wire import buffers
from starling.actors.wire.batched_mixing import Mixtures
from starling.actors.wire.buffers import Cuts, Signature, TensorSpec
from starling.actors.wire.finite import trouble
from starling.actors.wire.tickets import Contributed, Posted, among
from starling.algorithms.aggregators.gram import GramAggregator
from starling.algorithms.api import INLINE_LIMIT_BYTES, AllGather, AllReduce, Inbox, NeighborAllGather, Reduced
from starling.algorithms.closing import ClosePolicy, Quorum
from starling.algorithms.codecs import Identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starling.actors.replica.replica import Replica
    from starling.actors.wire.buffers import Buffer
    from starling.actors.wire.tickets import Wants
    from starling.algorithms.api import Handle, NodeId, Payload

_HERE = np.empty(0, dtype=np.uint8)
"""Stands for a small contribution that need not travel."""


class Exchanges:
    """Contributions to the running round's exchanges, and their results, of all nodes in one process.

    Args:
        replicas: of the process's nodes; the host puts new ones into it.
        seed: the run's.
        alone: whether all nodes of the run are in this process: then nothing travels.
    """

    def __init__(self, replicas: Mapping[NodeId, Replica], seed: int, *, alone: bool = False) -> None:
        self._replicas = replicas
        self._alone = alone
        self._plans = ExchangePlans(seed)
        self._calls: dict[NodeId, list[CollectiveCall]] = {}
        self._concluded: dict[int, Concluded] = {}

    def begin(self, number: int, members: tuple[NodeId, ...]) -> None:
        """Enter round ``number`` of ``members``."""
        self._plans.begin(number, members)
        self._concluded = {}

    def reset(self, node: NodeId) -> None:
        """Forget the exchanges of a node, whose program begins anew."""
        self._calls[node] = []

    def num_posted(self, node: NodeId) -> int:
        """Return the number of exchanges that a node's program has posted to or started."""
        return len(self._calls[node])

    # --- contributions -----------------------------------------------------------------------------------------------

    def post(self, node: NodeId, operation: Collective, *, started: bool) -> Posted:
        """Take a node's contribution to the next exchange of its program.

        Raises:
            ProgramError: it contributes what cannot travel.
        """
        replica, calls = self._replicas[node], self._calls[node]
        form = self._plans.form(operation)
        signature = form.signature
        call = CollectiveCall(form.settings, signature, open=started)
        seq = len(calls)
        calls.append(call)
        wants = None
        if isinstance(operation, NeighborAllGather):
            wants = self._plans.neighborhoods(seq, operation.topology).of(node)
        payload: Any = operation.tensors if isinstance(operation, AllReduce) else operation.payload
        waits, close = not started, None if type(operation.close) is Quorum else operation.close
        if payload is not None and not replica.guard.skipping:
            _check(replica, operation, payload, seq, len(self._plans.members))
        if payload is None or replica.guard.skipping:
            return _receives(replica, call, seq, close, wants, waits=waits)
        if started:
            payload = _held(replica, call, payload)
        if not isinstance(operation, AllReduce):
            specs, nbytes = buffers.described(payload)
            call.payload = payload
            inline = None
            if nbytes <= INLINE_LIMIT_BYTES:
                inline = _HERE if self._alone else buffers.pack(payload)
            return Posted(seq, signature, specs, 1.0, (nbytes,), (), inline, close, wants, waits)
        specs = signature.tensors
        assert specs is not None
        cuts = call.cuts = self._plans.cuts(operation, signature.parts, specs)
        call.parts = cuts.encode(payload)
        # Finite values may be too large for a codec's floats, or its norms.
        if not (isinstance(operation.codec, Identity) or operation.aggregator.bears_nan or cuts.are_finite(call.parts)):
            replica.guard.give_up(f"what it gives to exchange {seq} is not finite as {operation.codec.name} has it")
            call.parts = ()
            return _receives(replica, call, seq, close, wants, waits=waits)
        sizes = cuts.part_nbytes
        # One process measures each part: two machines may round a matrix product in two ways.
        measures = isinstance(operation.aggregator, GramAggregator)
        inline = call.parts[0] if sum(sizes) <= INLINE_LIMIT_BYTES and not measures else None
        weight, results = float(operation.weight), cuts.result_nbytes
        least = operation.aggregator.least
        return Posted(seq, signature, specs, weight, sizes, results, inline, close, wants, waits, None, least, measures)

    def wait(self, node: NodeId, handle: Handle[Any]) -> int:
        """Close a handle of a node's started exchange; return the exchange's number.

        Raises:
            UnfinishedExchange: the handle is of another round, or was waited for already.
            ProgramError: a contributed tensor was written to since ``Start``.
        """
        seq, calls = handle.sequence, self._calls[node]
        if handle.round != self._replicas[node].round or seq >= len(calls):
            message = f"Wait(exchange {seq} of round {handle.round}): a handle belongs to its round alone"
            raise UnfinishedExchange(message)
        call = calls[seq]
        if not call.open:
            message = f"Wait(exchange {seq}): it was waited for already; keep the result"
            raise UnfinishedExchange(message)
        call.open = False
        call.check_unwritten(seq)
        return seq

    def check_finished(self, node: NodeId) -> None:
        """Raise ``UnfinishedExchange`` if a node's round ends with a started exchange that nobody waited for."""
        for seq, call in enumerate(self._calls[node]):
            if call.open:
                message = f"the round ends while exchange {seq} ({call.signature.operation}) is in flight; Wait for it"
                raise UnfinishedExchange(message)

    def parts(self, node: NodeId, seq: int) -> Sequence[Buffer]:
        """Return a node's encoded contribution to exchange ``seq``, one buffer per part."""
        call = self._calls[node][seq]
        if call.payload is not None and not call.parts:
            call.parts = [buffers.pack(call.payload)]
        return call.parts

    def detach(self, node: NodeId) -> None:
        """Copy a node's contributions: they may share memory with its parameters, which are about to be rolled back."""
        for call in self._calls.get(node, ()):
            call.parts = [part.copy() for part in call.parts]
            if call.payload is not None:
                call.payload = copied(call.payload, self._replicas[node].device)

    def conclude_here(self, nodes: Sequence[NodeId], seq: int) -> None:
        """Compute the result of a closed gather whose contributors, ``nodes``, are all in this process."""
        payloads = {node: self._calls[node][seq].payload for node in nodes}
        copies, stacked = buffers.copies({node: payload for node, payload in payloads.items() if payload is not None})
        self.conclude_gather(nodes[0], seq, copies, stacked=stacked)

    # --- reduction ---------------------------------------------------------------------------------------------------

    def measure(
        self, node: NodeId, seq: int, part: int, specs: tuple[TensorSpec, ...], contributions: Mapping[NodeId, Buffer]
    ) -> Buffer:
        """Measure one part of the contributions (encoded bytes), in sorted member order."""
        operation = cast("AllReduce[Any]", self._calls[node][seq].operation)
        ordered = [contributions[member] for member in sorted(contributions)]
        return self._cuts(node, seq, specs).measure(operation, part, ordered)

    def reduce(
        self,
        node: NodeId,
        seq: int,
        part: int,
        specs: tuple[TensorSpec, ...],
        contributions: Mapping[NodeId, tuple[Buffer, float]],
        measures: Sequence[Buffer] = (),
    ) -> Buffer:
        """Combine one part of the contributions (encoded bytes and weight), in sorted member order.

        ``measures`` are those of all parts of the same contributions, in order, if the aggregator needs them.
        """
        operation = cast("AllReduce[Any]", self._calls[node][seq].operation)
        cuts = self._cuts(node, seq, specs)
        ordered = [contributions[member] for member in sorted(contributions)]
        weights = [weight for _, weight in ordered]
        if measures:
            weights = buffers.coefficients(operation, measures, weights)
        return cuts.reduce(operation, part, [data for data, _ in ordered], weights)

    def _cuts(self, node: NodeId, seq: int, specs: tuple[TensorSpec, ...]) -> Cuts:
        """Return an exchange's cuts; a member that contributes nothing learns the specs from contributors."""
        call = self._calls[node][seq]
        if call.cuts is None:
            operation = cast("AllReduce[Any]", call.operation)
            call.cuts = self._plans.cuts(operation, call.signature.parts, specs)
        return call.cuts

    # --- results -----------------------------------------------------------------------------------------------------

    def conclude_inline(
        self, node: NodeId, seq: int, inline: Sequence[Contributed], closed: Iterable[NodeId] | None = None
    ) -> None:
        """Compute the result of a closed exchange of inline contributions, to the bits that parts would give.

        ``closed`` names all contributors, in this process or elsewhere (default: those of ``inline``).
        """
        ordered = sorted(inline, key=lambda one: one.node)
        if not isinstance(self._calls[node][seq].operation, AllReduce):
            device = self._replicas[node].device
            received = {one.node: buffers.unpack(one.specs, one.data, device) for one in ordered}
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
        value = self._cuts(node, seq, specs).assemble(parts, self._replicas[node].device)
        self._concluded[seq] = Concluded(Reduced(value, members, sum(weights[member] for member in members)))

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
            payloads: contributions by member.
            present: all contributors, in this process or elsewhere (default: those of ``payloads``).
            stacked: the tensors of which ``payloads`` are rows, if all nodes are here.
        """
        operation = self._calls[node][seq].operation
        concluded = self._concluded[seq] = Concluded(payloads)
        if not isinstance(operation, NeighborAllGather):
            return
        neighborhoods = concluded.neighborhoods = self._plans.neighborhoods(seq, operation.topology)
        closed = frozenset(payloads if present is None else present)
        mixing = concluded.mixing = self._plans.mixing(neighborhoods, closed)
        if stacked and mixing is neighborhoods.mixing:
            own = {member: self._calls[member][seq].payload for member in payloads}
            contributed = {member: one for member, one in own.items() if one is not None}
            concluded.mixtures = Mixtures(neighborhoods.rows, contributed, stacked)

    def release(self, seq: int) -> None:
        """Free the contributions to an exchange whose result all members have: nobody asks for them again."""
        for calls in self._calls.values():
            if len(calls) > seq:
                calls[seq].parts, calls[seq].payload = (), None

    def is_concluded(self, seq: int) -> bool:
        """Whether the result is there for ``take``."""
        return seq in self._concluded

    def take(self, node: NodeId, seq: int) -> Any:  # noqa: ANN401 - what the operation gives
        """Return a node's result of a concluded exchange, and drop it when the last node has taken its own."""
        concluded = self._concluded[seq]
        concluded.num_taken += 1
        alone = len(self._calls) == 1
        if concluded.num_taken == len(self._calls):
            del self._concluded[seq]
        neighborhoods, mixing = concluded.neighborhoods, concluded.mixing
        if neighborhoods is None or mixing is None:
            return concluded.result if alone else SharedResult(concluded.result)
        is_whole = mixing is neighborhoods.mixing
        substituted = () if is_whole else sorted(among(neighborhoods.of(node), concluded.result))
        received = Received(concluded.result, neighborhoods.ordered(node) if is_whole else tuple(substituted))
        mixed = None if concluded.mixtures is None else concluded.mixtures.of(node, received)
        return Inbox(received, mixing.weights[node], mixed)


def _receives(
    replica: Replica,
    call: CollectiveCall,
    seq: int,
    close: ClosePolicy | None,
    wants: Wants | None,
    *,
    waits: bool,
) -> Posted:
    """Post to an exchange without a contribution."""
    if isinstance(call.operation, AllReduce):
        call.signature = Signature(call.signature.operation, call.signature.parts, None)
    skipped = replica.guard.reason if replica.guard.skipping else None
    least, measures = 1, False
    if isinstance(call.operation, AllReduce):
        aggregator = call.operation.aggregator
        least, measures = aggregator.least, isinstance(aggregator, GramAggregator)
    return Posted(seq, call.signature, None, 0.0, (), (), None, close, wants, waits, skipped, least, measures)


def _check(replica: Replica, operation: Collective, payload: Payload, seq: int, num_members: int) -> None:
    """Keep values that are not finite from others: the node stops, or skips the round, as ``on_nan`` says."""
    weight, least = 1.0, 1
    if isinstance(operation, AllReduce):
        if operation.aggregator.bears_nan:
            return
        weight = operation.weight
    elif isinstance(operation, AllGather):
        least = max(1, replica.layout.num_values)
    found = trouble(payload, num_members, weight=weight, least=least)
    if found is not None:
        replica.guard.give_up(f"what it gives to exchange {seq} ({type(operation).__name__}) {found}")


def _held(replica: Replica, call: CollectiveCall, payload: Payload) -> Payload:
    """Return a started exchange's contribution: a copy of tensors in training, and others watched for writes."""
    trained = {one.untyped_storage().data_ptr() for one in (replica.parameters, replica.buffers) if one.numel()}

    def hold(value: torch.Tensor | float) -> torch.Tensor | float:
        if not isinstance(value, torch.Tensor):
            return value
        if value.untyped_storage().data_ptr() in trained:
            return value.detach().clone()
        call.written.append((value, value._version))  # noqa: SLF001 - torch's counter
        return value

    if isinstance(payload, torch.Tensor | int | float):
        return hold(payload)
    return {name: hold(value) for name, value in payload.items()}
