"""The byte ledger: logical deliveries between distinct nodes, by kind, booked by the controller alone.

The ledger books the deliveries that the rendezvous saw: also those between nodes that share a machine or a process, and
those of aborted attempts. An algorithm can neither forget nor flatter.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind: TypeAlias = Literal["peer", "server", "recovery", "evaluation"]


class Ledger:
    """Bytes so far, by kind."""

    def __init__(self) -> None:
        self._booked: Counter[Kind] = Counter()

    def book(self, kind: Kind, nbytes: int) -> None:
        """Add a delivery."""
        self._booked[kind] += nbytes

    def __getitem__(self, kind: Kind) -> int:
        return self._booked[kind]

    @property
    def payload(self) -> int:
        """Bytes that the algorithm sent, between peers and with a server."""
        return self["peer"] + self["server"]

    def to_json(self) -> dict[Kind, int]:
        """Plain data, for ``restore``."""
        return dict(self._booked)

    def restore(self, booked: Mapping[Kind, int]) -> None:
        """Go on from what was booked before."""
        self._booked = Counter(booked)
