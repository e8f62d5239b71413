"""The node actor's calls to Ray's object store: values are fetched within a bound, and not from nodes that are gone."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from starling.actors.remote.remote_calls import remote_call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from ray import ObjectRef

    from starling.actors.remote.running_epoch import RunningEpoch
    from starling.algorithms.api import NodeId

_SLICE_S = 0.2
"""Seconds that a fetch waits between two checks for cancellation."""


class StoreCalls:
    """Fetches values that other processes made.

    Args:
        epoch: the running attempt.
    """

    def __init__(self, epoch: RunningEpoch) -> None:
        self.timeout_s = 0.0
        """Bound on each fetch."""
        self._epoch = epoch
        self._gone: set[NodeId] = set()
        """Nodes whose values are not waited for any more."""

    def begin(self) -> None:
        """Enter an attempt: wait for values of all nodes again."""
        self._gone = set()

    def expect(self, node: NodeId) -> None:
        """Wait for values of ``node`` again."""
        self._gone.discard(node)

    @remote_call("control")
    def give_up(self, epoch: int | None, node: NodeId) -> None:
        """Let fetches of what ``node`` held fail now instead of at their time limit; ``None``: of its state."""
        if epoch is None or epoch == self._epoch.number:
            self._gone.add(node)

    @remote_call("exchange")
    def hold(self, ref: Sequence[ObjectRef[Any]]) -> list[Any]:
        """Fetch another machine's value, and give it back as one that lies on this machine: whether, and the value."""
        fetched: dict[int, Any] = self.fetch(dict(enumerate(ref)))
        return [bool(fetched), fetched.get(0)]

    def get(self, ref: ObjectRef[Any]) -> Any:  # noqa: ANN401 - of what type, the caller knows
        """Fetch one value.

        Raises:
            RayError: it cannot be had within the bound.
        """
        return ray.get(ref, timeout=self.timeout_s)

    def fetch(
        self, refs: Mapping[int, ObjectRef[Any]], sources: Mapping[int, NodeId] | None = None
    ) -> dict[int, np.ndarray[Any, Any]]:
        """Fetch what can be had, in short slices, bounded; ``sources`` says who holds what (default: the keys)."""
        with contextlib.suppress(ray.exceptions.RayError):
            # The usual case, everything is there: one call to the store.
            return dict(zip(refs, ray.get(list(refs.values()), timeout=_SLICE_S), strict=True))
        deadline = time.monotonic() + self.timeout_s
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
