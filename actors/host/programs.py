"""Programs of nodes under way, and the exchanges that they take part in."""

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
class Exchange:
    """A node's side of one collective operation."""

    operation: Collective
    """Its settings; of an AllReduce without the tensors, which are as large as the model."""
    signature: Signature
    cuts: Cuts | None = None
    parts: Sequence[Buffer] = ()
    payload: Payload | None = None
    """Of a gather."""
    open: bool = False
    """It was started, and has not been waited for."""
    written: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """What a started exchange contributes, and the version counters at its start."""

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
    exchanges: list[Exchange] = field(default_factory=list)
    reports: list[TrainReport] = field(default_factory=list)
    handle: Handle[Any] | None = None
    """What a ``Start`` returns when the program runs on."""
    over: bool = False
