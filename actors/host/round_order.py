"""The order to begin a round, from the controller through either runtime to the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.actors.data import Place
    from starling.algorithms.api import NodeId, View


@dataclass(frozen=True)
class RoundOrder:
    """Order to begin a round."""

    epoch: int
    """Counts attempts; whatever belongs to an earlier one is dropped."""
    number: int
    """Number of the round."""
    view: View
    """Members of the round."""
    committed: int
    """The last committed round, which nodes apply first."""
    repair: bool = False
    """Whether programs begin with ``on_view_change``."""
    joiners: tuple[NodeId, ...] = ()
    """Nodes with another node's state, whose programs begin with ``join``."""
    places: Mapping[NodeId, Place] = field(default_factory=dict["NodeId", "Place"])
    """Sampling plans and positions that have changed, valid from the last commit on."""
    seen: tuple[float, ...] = ()
    """Clock readings of an earlier attempt at this round, which the programs see again."""
