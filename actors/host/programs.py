"""Running programs of nodes, and the collective operations that they have called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from starling.actors.wire.buffers import Cuts, Signature
from starling.algorithms.api import (
    AllGather,
    AllReduce,
    Handle,
    NeighborAllGather,
    Operation,
    TrainReport,
)
from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from starling.actors.wire.buffers import Buffer
    from starling.algorithms.api import Payload


Collective: TypeAlias = "AllReduce[Any] | AllGather[Any] | NeighborAllGather[Any]"


@dataclass(slots=True)
class CollectiveCall:
    """A node's side of one exchange: the operation, and its contribution."""

    operation: Collective
    """Settings of the collective; for an AllReduce without the tensors, which are as large as the model."""
    signature: Signature
    cuts: Cuts | None = None
    parts: Sequence[Buffer] = ()
    payload: Payload | None = None
    """Contribution to a gather."""
    open: bool = False
    """Whether the exchange was started and not yet waited for."""
    written: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """Tensors that a started exchange contributes, with their version counters at its start."""

    def check_unwritten(self, seq: int) -> None:
        """Raise ``ProgramError`` if a tensor was written to between ``Start`` and ``Wait``."""
        if any(tensor._version != version for tensor, version in self.written):  # noqa: SLF001 - torch's counter
            message = f"what was contributed to exchange {seq} was written to between Start and Wait; Start a clone()"
            raise ProgramError(message)
        self.written = []


@dataclass(slots=True)
class Program:
    """One round of one node."""

    coroutine: Coroutine[Operation[Any], Any, None]
    reports: list[TrainReport] = field(default_factory=list)
    handle: Handle[Any] | None = None
    """The result of a ``Start``, until the program runs on with it."""
    over: bool = False
