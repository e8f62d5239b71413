"""Bytes between processes on Ray: counted, and held back as the configured network says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.orchestrator.runtimes.network import Network

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import NetworkConfig
    from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
    from starling.orchestrator.runtimes.network import Cast


class Transport:
    """Counts bytes, and throttles transfers.

    Args:
        network: bandwidths and latencies; without any, nothing is held back.
        loop: its clock.
    """

    def __init__(self, network: NetworkConfig, loop: EventLoop) -> None:
        self._network = Network(network)
        self._loop = loop
        self.nbytes = 0
        """Bytes that moved so far."""

    @property
    def is_throttled(self) -> bool:
        """Whether transfers are held back."""
        return not self._network.is_instant

    def count(self, nbytes: int) -> None:
        """Count bytes that moved."""
        self.nbytes += nbytes

    def latency_s(self, one: NodeId, other: NodeId) -> float:
        """Return the network's one-way latency between two nodes."""
        return self._network.latency_s(one, other)

    def arrivals(self, phase: Callable[[], Sequence[Cast]]) -> Mapping[NodeId, float]:
        """Return when each receiver of a phase that begins now may have it; empty without a throttle."""
        return self._network.arrivals(self._loop.now, phase()) if self.is_throttled else {}

    def arrival(self, began: float, cast: Cast) -> float | None:
        """Return when the only receiver of a transfer may have it; None without a throttle."""
        return self._network.arrivals(began, [cast]).get(cast.targets[0]) if self.is_throttled else None
