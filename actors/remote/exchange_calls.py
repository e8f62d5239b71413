"""The node actor's calls of an exchange: contributions are posted, parts are reduced, results are fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.remote.messages import DeliveredResult, Inline, SecureJob
from starling.actors.remote.remote_calls import remote_call
from starling.actors.wire.tickets import Measured, Secured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray import ObjectRef

    from starling.actors.host.host import Host
    from starling.actors.remote.running_epoch import RunningEpoch
    from starling.actors.remote.store_calls import StoreCalls
    from starling.actors.wire.buffers import Buffer
    from starling.algorithms.api import NodeId


class ExchangeCalls:
    """Moves and reduces the bytes of exchanges, while programs train.

    Args:
        host: of the process's nodes.
        epoch: the running attempt.
        store: fetches other processes' contributions and results.
    """

    def __init__(self, host: Host, epoch: RunningEpoch, store: StoreCalls) -> None:
        self._host, self._epoch, self._store = host, epoch, store
        self._reduced: dict[tuple[int, int], Buffer] = {}
        """Parts that this process has reduced, by exchange and part."""
        self._measured: dict[tuple[int, int], dict[NodeId, Buffer]] = {}
        """Other processes' contributions that were measured and are yet to be reduced, by exchange and part."""
        self._results: dict[int, list[Buffer]] = {}
        """All parts of each exchange's result."""
        self._gathered: dict[int, dict[NodeId, Buffer]] = {}
        """Payloads of each gather, by node."""

    def begin(self) -> None:
        """Enter an attempt: forget the exchanges of the last one."""
        self._reduced, self._measured, self._results, self._gathered = {}, {}, {}, {}

    # --- on the way --------------------------------------------------------------------------------------------------

    @remote_call("exchange")
    def post(self, epoch: int, seq: int, nodes: Sequence[NodeId], parts: Sequence[int]) -> list[Any]:
        """Put ``parts`` of contributions into the store: an acknowledgement, then each part of each node as a value."""
        if epoch != self._epoch.number:
            return [False, *([None] * (len(parts) * len(nodes)))]
        return [True, *self.contributions(seq, nodes, parts)]

    def contributions(self, seq: int, nodes: Sequence[NodeId], parts: Sequence[int]) -> list[Buffer]:
        """Return ``parts`` of the contribution of each node."""
        contributions = [self._host.exchanges.parts(node, seq) for node in nodes]
        return [contribution[part] for contribution in contributions for part in parts]

    @remote_call("control")
    def post_late(self, epoch: int, seq: int, node: NodeId, part: int) -> Buffer | None:
        """Put one part into the store that was not expected to be needed outside this process.

        Not in the exchange group: two processes that fetch such parts from one another would wait for each other.
        """
        return self._host.exchanges.parts(node, seq)[part] if epoch == self._epoch.number else None

    @remote_call("exchange")
    def measure(self, epoch: int, jobs: Sequence[SecureJob]) -> tuple[list[Measured], int]:
        """Fetch and measure, and keep what was fetched: what each job got and measured, and the bytes fetched."""
        if epoch != self._epoch.number:
            return [], 0
        measured: list[Measured] = []
        total = 0
        for job in jobs:
            assert job.specs is not None
            contributions, nbytes = self._fetch(job)
            total += nbytes
            kept = {member: part for member, part in contributions.items() if member in job.refs}
            self._measured.setdefault((job.seq, job.part), {}).update(kept)
            values = self._host.exchanges.measure(job.by, job.seq, job.part, job.specs, contributions)
            measured.append(Measured(job.seq, job.part, job.by, frozenset(contributions), job.generation, values))
        return measured, total

    def _fetch(self, job: SecureJob) -> tuple[dict[NodeId, Buffer], int]:
        """Return one part of the contributions that can be had, and the bytes that were fetched for it."""
        kept = self._measured.get((job.seq, job.part), {})
        fetched = self._store.fetch({member: ref for member, ref in job.refs.items() if member not in kept})
        nbytes = sum(part.nbytes for part in fetched.values())
        fetched.update({member: kept[member] for member in job.refs if member in kept})
        for member in job.weights.keys() - job.refs.keys():
            fetched[member] = self._host.exchanges.parts(member, job.seq)[job.part]
        return fetched, nbytes

    @remote_call("exchange")
    def secure(self, epoch: int, jobs: Sequence[SecureJob]) -> list[Any]:
        """Fetch and reduce: what each job got and the bytes fetched, then each reduced part as a value of its own."""
        if epoch != self._epoch.number:
            return [([], 0), *([None] * len(jobs))]
        secured: list[Secured] = []
        parts: list[Buffer | None] = []
        total = 0
        for job in jobs:
            fetched, nbytes = self._fetch(job)
            total += nbytes
            if job.specs is None:
                self._gathered[job.seq] = fetched
                parts.append(None)
            else:
                contributions = {member: (part, job.weights[member]) for member, part in fetched.items()}
                measures = () if job.measured is None else (job.measured,)
                reduced = self._host.exchanges.reduce(job.by, job.seq, job.part, job.specs, contributions, measures)
                self._reduced[job.seq, job.part] = reduced
                parts.append(reduced)
            secured.append(Secured(job.seq, job.part, job.by, frozenset(fetched), job.generation))
        return [(secured, total), *parts]

    @remote_call("exchange")
    def deliver(
        self,
        epoch: int,
        seq: int,
        refs: Mapping[int, ObjectRef[Any]],
        makers: Sequence[NodeId],
        ahead: tuple[NodeId, DeliveredResult] | None,
    ) -> tuple[frozenset[int], int]:
        """Fetch the parts of a result that were made elsewhere; return the missing ones and the bytes fetched.

        With ``ahead``, a node of this process and what is known of the result, that is worked out here and now, while
        the programs that started the exchange train.
        """
        if epoch != self._epoch.number:
            return frozenset(), 0
        by_part = {part: makers[part] for part in refs}
        fetched = self._store.fetch(refs, sources=by_part)
        missing = frozenset(refs.keys() - fetched.keys())
        if not missing:
            self._results[seq] = [
                fetched[part] if part in fetched else self._reduced[seq, part] for part in range(len(makers))
            ]
            if ahead is not None:
                self._conclude(ahead[0], seq, ahead[1])
        return missing, sum(part.nbytes for part in fetched.values())

    # --- closed ------------------------------------------------------------------------------------------------------

    def close(self, node: NodeId, seq: int, result: Inline | DeliveredResult) -> None:
        """Work out a closed exchange's result, unless that was done ahead, and free its buffers."""
        if not self._host.exchanges.is_concluded(seq):
            self._conclude(node, seq, result)
        self._host.exchanges.release(seq)
        self._results.pop(seq, None)
        self._gathered.pop(seq, None)
        # The store's memory is free again as soon as nothing here refers to it.
        self._reduced = {key: part for key, part in self._reduced.items() if key[0] != seq}
        self._measured = {key: parts for key, parts in self._measured.items() if key[0] != seq}

    def _conclude(self, node: NodeId, seq: int, result: Inline | DeliveredResult) -> None:
        if isinstance(result, Inline):
            self._host.exchanges.conclude_inline(node, seq, result.contributions, result.closed)
        elif result.specs is not None:
            self._host.exchanges.conclude_reduce(node, seq, result.specs, result.weights, self._results[seq])
        else:
            kept = self._gathered[seq]
            specs = sorted(result.gathered.items())
            received = {one: self._host.unpack(node, form, kept[one]) for one, form in specs if one in kept}
            self._host.exchanges.conclude_gather(node, seq, received, result.weights)
