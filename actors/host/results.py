"""Results of exchanges as each node of the process receives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from starling.algorithms.api import Reduced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.actors.host.exchange_plans import Neighborhoods
    from starling.actors.wire.batched_mixing import Mixtures
    from starling.algorithms.api import NodeId, Payload
    from starling.algorithms.topologies import Mixing


@dataclass(frozen=True)
class SharedResult:
    """A result for several nodes of the process. Each gets a copy when it runs on: none aliases another's."""

    result: Any

    def own(self, device: torch.device) -> Any:  # noqa: ANN401 - what the operation gives
        """Copy the result to ``device``."""
        if isinstance(self.result, Reduced):
            return Reduced(copied(self.result.value, device), self.result.members, self.result.weight)
        return {member: copied(payload, device) for member, payload in self.result.items()}


def copied(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - a payload
    """Copy a payload to ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: copied(one, device) for name, one in cast("dict[str, Any]", value).items()}
    return value


class Received(Mapping["NodeId", "Payload"]):
    """The payloads of one node's in-neighbours; looked up when they are asked for, as most never are."""

    __slots__ = ("_all", "_senders")

    def __init__(self, everybody: Mapping[NodeId, Payload], senders: tuple[NodeId, ...]) -> None:
        self._all = everybody
        self._senders = senders

    def __getitem__(self, node: NodeId) -> Payload:
        if node not in self._senders:
            raise KeyError(node)
        return self._all[node]

    def __iter__(self) -> Iterator[NodeId]:
        return (sender for sender in self._senders if sender in self._all)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass
class Concluded:
    """A closed exchange's result in this process."""

    result: Any
    """``Reduced``, or payloads by member."""
    neighborhoods: Neighborhoods | None = None
    """Neighbourhoods of a neighbour gather if all members contribute."""
    mixing: Mixing | None = None
    """Mixing weights of a neighbour gather among the members that have contributed."""
    mixtures: Mixtures | None = None
    num_taken: int = 0
    """Nodes that have taken the result."""
