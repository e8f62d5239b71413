"""Model of a run's network: computes when transfers arrive.

Each node has an access link with the same bandwidth each way; single pairs may be slower. A *phase* is a set of casts
that begin together (all contributions to a reduction, say). A receiver is done when its own link, its senders' links
and the pairs in between have carried what the phase put on them, plus the longest latency. A link that still carries an
earlier phase delays the next one.

The simulator's clock follows it. On a cluster, a throttle holds back what arrives earlier than it says.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starling.algorithms.api import NodeId
    from starling.orchestrator.config.sections import NetworkConfig

_BYTES_PER_MEGABIT = 1_000_000 / 8

_Link: TypeAlias = "tuple[NodeId, NodeId | str]"
"""One direction of an access link (``(node, "up")``), or of a pair (``(source, target)``)."""


@dataclass(frozen=True)
class Cast:
    """Each source sends its bytes to each target but itself. One cast stands for up to N² flows."""

    sources: Mapping[NodeId, int]
    targets: Sequence[NodeId]


class Network:
    """Computes arrival times of phases, in seconds of the runtime's clock."""

    def __init__(self, config: NetworkConfig) -> None:
        self._rate = (config.bandwidth_mbps or 0) * _BYTES_PER_MEGABIT
        self._latency_s = config.latency_ms / 1000
        self._pair_rates: dict[_Link, float] = {}
        self._pair_latencies: dict[tuple[NodeId, NodeId], float] = {}
        for link in config.links:
            one, other = link.between
            for pair in ((one, other), (other, one)):
                self._pair_rates[pair] = (link.bandwidth_mbps or 0) * _BYTES_PER_MEGABIT
                latency_ms = config.latency_ms if link.latency_ms is None else link.latency_ms
                self._pair_latencies[pair] = latency_ms / 1000
        self._free_at: defaultdict[_Link, float] = defaultdict(float)

    @property
    def is_instant(self) -> bool:
        """Whether transfers take no time."""
        return not (self._rate or self._latency_s or self._pair_latencies)

    def to_json(self) -> list[Any]:
        """Return until when each link is busy, as plain data."""
        return [[*link, until] for link, until in self._free_at.items()]

    def restore(self, state: Sequence[Any]) -> None:
        """Restore what ``to_json`` returned."""
        self._free_at.update({(source, target): until for source, target, until in state})

    def latency_s(self, one: NodeId, other: NodeId) -> float:
        """Return the one-way latency between two nodes."""
        return 0.0 if one == other else self._pair_latencies.get((one, other), self._latency_s)

    def arrivals(self, now: float, phase: Sequence[Cast]) -> dict[NodeId, float]:
        """Return when each receiver of a phase that begins ``now`` has everything that is sent to it."""
        if not self._rate and not self._pair_latencies:
            receivers = (node for cast in phase for node in cast.targets if len(cast.sources) > (node in cast.sources))
            return dict.fromkeys(receivers, now + self._latency_s)
        done: dict[_Link, float] = {}
        for link, nbytes in self._load(phase).items():
            rate = self._rate if isinstance(link[1], str) else self._pair_rates[link]
            done[link] = max(now, self._free_at[link]) + (nbytes / rate if rate else 0.0)
        self._free_at.update(done)
        paired = {target for _, target in self._pair_latencies}
        arrivals: dict[NodeId, float] = {}
        for cast in phase:
            # Of equal latency the two slowest sources tell all: a target may be one of them itself.
            slowest = heapq.nlargest(2, cast.sources, key=lambda source: done[source, "up"])
            for target in cast.targets:
                for source in cast.sources if target in paired else slowest:
                    if source != target:
                        carried = max(done[source, "up"], done.get((source, target), now), done[target, "down"])
                        arrival = carried + self._pair_latencies.get((source, target), self._latency_s)
                        arrivals[target] = max(arrivals.get(target, now), arrival)
        return arrivals

    def _load(self, phase: Sequence[Cast]) -> dict[_Link, int]:
        """Return the bytes that a phase puts on each link."""
        load: defaultdict[_Link, int] = defaultdict(int)
        for cast in phase:
            targets = frozenset(cast.targets)
            total = sum(cast.sources.values())
            for source, nbytes in cast.sources.items():
                load[source, "up"] += nbytes * (len(targets) - (source in targets))
            for target in targets:
                load[target, "down"] += total - cast.sources.get(target, 0)
            for source, target in self._pair_latencies:
                if target in targets and source in cast.sources:
                    load[source, target] += cast.sources[source]
        return load
