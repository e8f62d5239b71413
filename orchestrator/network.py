"""The simulator's network: how long it takes until everybody has what is sent to them.

Each node has an access link with the same bandwidth each way; single pairs may be slower. A *phase* is a set of flows
that begin together (all contributions to a reduction, say). A receiver is done when its own link, the links of those
that send to it, and the pairs in between have carried what the phase put on them, plus the longest latency. A link
that still carries an earlier phase delays the next one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from algorithms.api import NodeId
    from orchestrator.config import NetworkConfig

_BYTES_PER_MEGABIT = 1_000_000 / 8


@dataclass(frozen=True)
class Flow:
    """Bytes from one node to another."""

    source: NodeId
    target: NodeId
    nbytes: int


class Network:
    """Turns phases of flows into times of arrival, in seconds of the virtual clock."""

    def __init__(self, config: NetworkConfig) -> None:
        self._rate = (config.bandwidth_mbps or 0) * _BYTES_PER_MEGABIT
        self._latency_s = config.latency_ms / 1000
        self._links = {frozenset(link.between): link for link in config.links}
        self._free_at: defaultdict[tuple[NodeId, str], float] = defaultdict(float)

    def arrivals(self, now: float, flows: Iterable[Flow]) -> dict[NodeId, float]:
        """When each receiver of a phase that begins ``now`` has all that is sent to it."""
        flows = [flow for flow in flows if flow.source != flow.target]
        load: defaultdict[tuple[NodeId, str], int] = defaultdict(int)
        for flow in flows:
            load[flow.source, "up"] += flow.nbytes
            load[flow.target, "down"] += flow.nbytes
        done: dict[tuple[NodeId, str], float] = {}
        for link, nbytes in load.items():
            start = max(now, self._free_at[link])
            done[link] = start + (nbytes / self._rate if self._rate else 0.0)
        self._free_at.update(done)
        arrivals: dict[NodeId, float] = {}
        for flow in flows:
            carried = max(done[flow.source, "up"], done[flow.target, "down"])
            latency = self._latency_s
            link = self._links.get(frozenset((flow.source, flow.target))) if self._links else None
            if link is not None:
                latency = link.latency_ms / 1000
                if link.bandwidth_mbps:
                    carried = max(carried, now + flow.nbytes / (link.bandwidth_mbps * _BYTES_PER_MEGABIT))
            arrivals[flow.target] = max(arrivals.get(flow.target, now), carried + latency)
        return arrivals
