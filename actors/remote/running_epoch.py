"""The attempt that a process takes part in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunningEpoch:
    """Number of the running attempt; whatever belongs to an older one is answered with nothing done."""

    number: int = -1
    """−1 before the first."""
