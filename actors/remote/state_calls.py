"""The node actor's calls about state: copied for checkpoints, and handed over to other nodes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from starling.actors.host.failures import failure
from starling.actors.remote.remote_calls import remote_call
from starling.actors.replica.catch_up import Transcript, catch_up
from starling.actors.replica.state_transfer import (
    StateExport,
    export_state,
    is_blank,
    load_state,
    snapshot,
    with_shared,
)
from starling.algorithms.errors import StarlingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray import ObjectRef

    from starling.actors.data import Position
    from starling.actors.host.host import Host
    from starling.actors.remote.store_calls import StoreCalls
    from starling.actors.wire.tickets import Failed
    from starling.algorithms.api import NodeId


class StateCalls:
    """Exports and loads the committed state of the process's nodes.

    Args:
        host: of the nodes.
        store: fetches other nodes' states.
    """

    def __init__(self, host: Host, store: StoreCalls) -> None:
        self._host, self._store = host, store
        self._has_kept = threading.Condition()
        """Guards what is kept for a checkpoint: its number, and the nodes' state."""
        self._kept_number = 0
        self._kept: dict[NodeId, StateExport] = {}

    @remote_call("compute")
    def export(self, node: NodeId, everything: bool) -> list[Any]:  # noqa: FBT001 - a remote call's arguments
        """Export a node's committed state: its size in bytes, then the state itself."""
        export = export_state(self._host.replicas[node], everything=everything)
        return [export.nbytes, export]

    @remote_call("compute")
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

    @remote_call("state")
    def kept(self, node: NodeId, number: int) -> StateExport:
        """Hand over a node's copied state while the node trains."""
        with self._has_kept:
            if not self._has_kept.wait_for(lambda: self._kept_number >= number, self._store.timeout_s):
                raise TimeoutError
            if self._kept_number > number:
                raise LookupError
            return self._kept.pop(node)

    @remote_call("compute")
    def load(
        self, node: NodeId, source: NodeId, refs: Sequence[ObjectRef[Any]], position: Position | None
    ) -> int | Failed | None:
        """Take over the committed state of ``source``; return its size, or ``None`` if it cannot be had any more.

        With two references its shared state is in the second.
        """
        self._store.expect(source)
        fetched: dict[int, Any] = self._store.fetch(dict(enumerate(refs)), dict.fromkeys(range(len(refs)), source))
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

    @remote_call("compute")
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
            return cast("bytes", self._store.get(base[0])) if base else None

        try:
            return catch_up(self._host.replicas[node], Transcript(first, tuple(records)), fetch, position)
        except StarlingError as error:
            return failure(node, self._host.replicas[node].round, error)
