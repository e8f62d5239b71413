"""The bandwidth that a run needs for a given compute utilization.

*Compute utilization* is the time of a run on an ideal network over its time on the given one. Both are virtual seconds
of dry runs in the simulator, so that every algorithm has an answer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from starling.orchestrator.analysis.dry_run import dry_run, require_memory
from starling.orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Summary

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Compute utilizations."""

MOST_ROUNDS = 8
"""Rounds of a dry run, unless more are asked for."""

_TOLERANCE = 1e-3
"""Tolerance relative to the time in which nodes wait."""


class Workload:
    """A run whose traffic and time are measured by dry runs.

    Args:
        config: of the run.
        rounds: of each dry run; default: the run's own, at most ``MOST_ROUNDS``.

    Raises:
        ConfigError: nodes take no time to compute, or too much memory.
        StarlingError: the model cannot be built.
    """

    def __init__(self, config: Config, rounds: int | None = None) -> None:
        if config.network.step_ms == 0:
            raise ConfigError("network.step_ms is 0: there is nothing to utilize; set it to the time of a step")
        self.config, self.layout = config, require_memory(config)
        self.rounds = rounds or min(config.rounds, MOST_ROUNDS)
        self._known: dict[float, float] = {}

    @functools.cached_property
    def ideal(self) -> Summary:
        """The dry run on a network that takes no time."""
        return self._run({"bandwidth_mbps": None, "latency_ms": 0.0, "links": ()})

    @property
    def seconds(self) -> float:
        """Virtual seconds of a round on the ideal network."""
        return _seconds(self.ideal) / self.rounds

    @property
    def bytes_per_round(self) -> float:
        """Payload of a round over all nodes, as the run's ledger counts it."""
        return (self.ideal.bytes["payload"] or 0) / self.rounds

    def utilization(self, gbit_s: float) -> float:
        """Return the compute utilization with links of this bandwidth."""
        return _seconds(self.ideal) / self._seconds_at(1 / gbit_s)

    def needed(self, target: float) -> float | None:
        """Return the least bandwidth in Gbit/s with which ``target`` is reached; None: latency alone costs more."""
        alone = _seconds(self.ideal)
        goal = alone / target
        if self._seconds_at(0.0) > goal:
            return None
        sent = self.ideal.bytes["payload"]
        if not sent or self.config.num_nodes == 1:
            return 0.0  # nobody waits for anybody
        low = max(at for at, seconds in self._known.items() if seconds <= goal)
        high = min((at for at, seconds in self._known.items() if seconds > goal), default=0.0)
        if not high:
            high = (goal - alone) * self.config.num_nodes / (8e-9 * sent)
            while self._seconds_at(high) < goal:
                low, high = high, 4 * high
        # Time grows with slowness along a broken line, on whose pieces the chord is exact; Illinois' rule between them.
        below, above = self._seconds_at(low) - goal, self._seconds_at(high) - goal
        side = 0
        while True:
            slowness = (low * above - high * below) / (above - below)
            found = self._seconds_at(slowness) - goal
            if abs(found) <= _TOLERANCE * (goal - alone) or high - low <= _TOLERANCE * high:
                return 1 / slowness
            if found < 0:
                low, below, above, side = slowness, found, above / 2 if side < 0 else above, -1
            else:
                high, above, below, side = slowness, found, below / 2 if side > 0 else below, 1

    def table(self) -> list[float | None]:
        """Return the Gbit/s needed for each of ``TARGETS``."""
        return [self.needed(target) for target in TARGETS]

    def _seconds_at(self, slowness: float) -> float:
        """Virtual seconds of a run whose links take ``slowness`` seconds for a Gbit; 0: no time, but latency."""
        if slowness not in self._known:
            self._known[slowness] = _seconds(self._run({"bandwidth_mbps": 1000 / slowness if slowness else None}))
        return self._known[slowness]

    def _run(self, network: dict[str, object]) -> Summary:
        network = {"network": self.config.network.model_copy(update=network)}
        return dry_run(self.config.model_copy(update=network), self.rounds)


def _seconds(summary: Summary) -> float:
    assert summary.virtual_seconds is not None
    return summary.virtual_seconds
