"""The node actor's calls about state: results, transfer to other nodes, checkpoints."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.exceptions
from safetensors.torch import save

from starling.actors.host.failures import failure
from starling.actors.replica.catch_up import Transcript, catch_up
from starling.actors.replica.mean_model import mean_model
from starling.actors.replica.state_transfer import (
    StateExport,
    export_state,
    is_blank,
    load_state,
    snapshot,
    with_shared,
)
from starling.actors.wire.buffers import as_buffer, as_tensor
from starling.algorithms.errors import StarlingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import torch
    from ray import ObjectRef

    from starling.actors.data import Position
    from starling.actors.host.build import RunData
    from starling.actors.host.host import Host
    from starling.actors.wire.tickets import Failed
    from starling.algorithms.api import NodeId

_SLICE_S = 0.2
"""How long a fetch waits before it looks whether it was told to give up."""


class StateCalls:
    """The calls of ``NodeActor`` that export and load nodes' state."""

    _host: Host
    _data: RunData
    _fetch_timeout_s: float

    def __init__(self) -> None:
        self._gone: set[NodeId] = set()
        """Whose values are not waited for any more."""
        self._has_kept = threading.Condition()
        """Guards what is kept for a checkpoint: its number, and the nodes' state."""
        self._kept_number = 0
        self._kept: dict[NodeId, StateExport] = {}

    @ray.method(concurrency_group="compute")
    def evaluate(
        self, node: NodeId, others: Sequence[ObjectRef[Any]], max_batches: int | None
    ) -> dict[str, float] | Failed:
        """Evaluate the mean of a node's model and ``others`` on held-out data."""
        replica = self._host.replicas[node]
        try:
            return replica.evaluate(self._data.validation, max_batches, *self._mean(node, others))
        except Exception as error:  # noqa: BLE001 - a user's metrics
            return failure(node, replica.round, error)

    @ray.method(concurrency_group="compute")
    def model(self, node: NodeId, others: Sequence[ObjectRef[Any]]) -> tuple[str, bytes]:
        """Return digest and safetensors bytes of the mean of a node's model and ``others``."""
        replica = self._host.replicas[node]
        mean = self._mean(node, others)
        tensors = replica.model_tensors(*mean)
        return replica.model_digest(*mean), save({name: one.cpu() for name, one in tensors.items()})

    @ray.method(concurrency_group="compute")
    def committed_model(self, node: NodeId) -> list[Any]:
        """Return an acknowledgement, then parameters and buffers of a node's committed model, as bytes."""
        parameters, buffers = self._host.replicas[node].committed_model()
        return [True, (as_buffer(parameters.cpu()), as_buffer(buffers.cpu()))]

    def _mean(
        self, node: NodeId, others: Sequence[ObjectRef[Any]]
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if not others:
            return None, None
        own = self._host.replicas[node].committed_model()

        def models() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield own
            for ref in others:
                pair = ray.get(ref, timeout=self._fetch_timeout_s)
                parameters, buffers = (as_tensor(one).view(mine.dtype) for one, mine in zip(pair, own, strict=True))
                yield parameters.to(own[0].device), buffers.to(own[0].device)

        return mean_model(models())

    @ray.method(concurrency_group="compute")
    def export(self, node: NodeId, everything: bool) -> list[Any]:  # noqa: FBT001 - a remote call's arguments
        """Export a node's committed state: its size in bytes, then the state itself."""
        export = export_state(self._host.replicas[node], everything=everything)
        return [export.nbytes, export]

    @ray.method(concurrency_group="compute")
    def keep(self, nodes: Sequence[NodeId], shared: NodeId | None, number: int) -> None:
        """Copy the committed state of ``nodes`` for a checkpoint; an earlier copy is dropped."""
        kept: dict[NodeId, StateExport] = {}
        with self._has_kept:
            self._kept = {}
        try:
            for node in nodes:
                kept[node] = snapshot(self._host.replicas[node], shared=shared in (None, node))
        finally:
            with self._has_kept:
                self._kept_number, self._kept = number, kept
                self._has_kept.notify_all()

    @ray.method(concurrency_group="state")
    def kept(self, node: NodeId, number: int) -> StateExport:
        """Hand over a node's copied state while the node trains."""
        with self._has_kept:
            if not self._has_kept.wait_for(lambda: self._kept_number >= number, self._fetch_timeout_s):
                raise TimeoutError
            if self._kept_number > number:
                raise LookupError
            return self._kept.pop(node)

    @ray.method(concurrency_group="compute")
    def load(
        self, node: NodeId, source: NodeId, refs: Sequence[ObjectRef[Any]], position: Position | None
    ) -> int | Failed | None:
        """Take over the committed state of ``source``; return its size, or ``None`` if it cannot be had any more.

        With two references its shared state is in the second.
        """
        self._gone.discard(source)
        fetched: dict[int, Any] = self._fetch(dict(enumerate(refs)), dict.fromkeys(range(len(refs)), source))
        if len(fetched) < len(refs):
            return None
        export = with_shared(fetched[0], fetched[len(refs) - 1])
        if source != node and is_blank(export):
            return None
        try:
            load_state(self._host.replicas[node], export, position)
        except StarlingError as error:
            return failure(node, self._host.replicas[node].round, error)
        return export.nbytes

    @ray.method(concurrency_group="compute")
    def replay(
        self,
        node: NodeId,
        first: int,
        records: Sequence[bytes],
        base: Sequence[ObjectRef[Any]],
        position: Position | None,
    ) -> int | Failed | None:
        """Catch up by the records of rounds; return what that took, or ``None`` if the model before them is missing."""

        def fetch() -> bytes | None:
            return cast("bytes", ray.get(base[0], timeout=self._fetch_timeout_s)) if base else None

        try:
            return catch_up(self._host.replicas[node], Transcript(first, tuple(records)), fetch, position)
        except StarlingError as error:
            return failure(node, self._host.replicas[node].round, error)

    @ray.method(concurrency_group="exchange")
    def hold(self, ref: Sequence[ObjectRef[Any]]) -> list[Any]:
        """Fetch another machine's value, and give it back as one that lies on this machine: whether, and the value."""
        fetched: dict[int, Any] = self._fetch(dict(enumerate(ref)))
        return [bool(fetched), fetched.get(0)]

    def _fetch(
        self, refs: Mapping[int, ObjectRef[Any]], sources: Mapping[int, NodeId] | None = None
    ) -> dict[int, np.ndarray[Any, Any]]:
        """Fetch what can be had, in short slices, bounded; ``sources`` says who holds what (default: the keys)."""
        with contextlib.suppress(ray.exceptions.RayError):
            # The usual case, everything is there: one call to the store.
            return dict(zip(refs, ray.get(list(refs.values()), timeout=_SLICE_S), strict=True))
        deadline = time.monotonic() + self._fetch_timeout_s
        keys = {ref: key for key, ref in refs.items()}
        pending = list(keys)
        fetched: dict[int, np.ndarray[Any, Any]] = {}
        while pending and time.monotonic() < deadline:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=_SLICE_S)
            for ref in ready:
                # A dead producer is one missing contribution, not a failed call.
                with contextlib.suppress(ray.exceptions.RayError):
                    fetched[keys[ref]] = ray.get(ref, timeout=_SLICE_S)
            pending = [ref for ref in pending if (sources or {}).get(keys[ref], keys[ref]) not in self._gone]
        return fetched
