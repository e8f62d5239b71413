"""Collective operations: all members exchange tensors at the same place of their programs."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from starling.algorithms.aggregators import Aggregator, Mean
from starling.algorithms.aggregators.gram import refuse_hidden
from starling.algorithms.closing import ClosePolicy, Quorum
from starling.algorithms.codecs import Codec, Identity
from starling.algorithms.node import NodeId, Payload
from starling.algorithms.operations import Operation

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.algorithms.topologies import Topology

T = TypeVar("T")
TensorsT = TypeVar("TensorsT", bound="Tensor | Mapping[str, Tensor]")
PayloadT = TypeVar("PayloadT", bound=Payload)

_MEAN, _IDENTITY, _QUORUM = Mean(), Identity(), Quorum()


@dataclass(frozen=True)
class Reduced(Generic[TensorsT]):
    """The result of an ``AllReduce``, identical on all members."""

    value: TensorsT
    """Combined contributions, shaped as each of them: a tensor, or a dict of tensors."""
    members: tuple[NodeId, ...]
    """The contributors, sorted. For 1/N instead of 1/|members| scale by len(members)/len(view.members)."""
    weight: float
    """Sum of their weights."""


@dataclass(frozen=True, eq=False)
class AllReduce(Operation[Reduced[TensorsT]]):
    """Combine ``tensors`` of all members.

    A dict of tensors is closed over one set of contributors. ``None`` receives without contributing and does not count
    as a zero. ``buffers``, the node's, travel along; they are combined alike, and the result is written to them.
    Contributions are encoded by ``codec``, decoded, and combined in sorted member order in float32 (float64 if they are
    float64). The result is encoded by ``result_codec`` before anybody, also its maker, sees it. The result has the
    contributions' dtypes and shapes.

    Bytes, when S of N members contribute b bytes each to a result of r bytes, each as encoded: (S−1)·b + (N−1)·r, or
    S·(N−1)·b up to ``INLINE_LIMIT_BYTES``.
    """

    tensors: TensorsT | None
    weight: float = 1.0
    aggregator: Aggregator = _MEAN
    codec: Codec = _IDENTITY
    result_codec: Codec = _IDENTITY
    close: ClosePolicy = _QUORUM
    buffers: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse weights with which there may be no mean, hidden contributions, and names that buffers need."""
        if not 0 < self.weight < math.inf:
            message = f"AllReduce takes a weight above 0, and None instead of tensors for 0; got {self.weight}"
            raise ValueError(message)
        refuse_hidden(self.aggregator, self.codec)
        names = self.tensors if isinstance(self.tensors, Mapping) and self.buffers is not None else ()
        if "buffers" in names or "value" in names:
            raise ValueError("AllReduce with buffers= sends 'buffers' and 'value'; give its tensors other names")

    def __await__(self) -> Generator[Operation[Any], Any, Reduced[TensorsT]]:
        """Exchange tensors and buffers as one contribution, and write the combined buffers in place."""
        if self.buffers is None:
            return (yield self)
        both = None
        if self.tensors is not None:
            tensors = self.tensors if isinstance(self.tensors, Mapping) else {"value": self.tensors}
            both = {**tensors, "buffers": self.buffers}
        reduced = yield replace(self, tensors=both, buffers=None)
        combined: dict[str, Any] = dict(reduced.value)
        self.buffers.copy_(combined.pop("buffers"))
        return Reduced(combined.get("value", combined), reduced.members, reduced.weight)


@dataclass(frozen=True, eq=False)
class AllGather(Operation["dict[NodeId, PayloadT]"]):
    """Give every member every contribution: ``{node: payload}`` in sorted order, identical on all.

    Payloads may differ in shape between nodes. Bytes: (N−1)·Σ payload bytes; a number counts 8.
    """

    payload: PayloadT | None
    close: ClosePolicy = _QUORUM


@dataclass(frozen=True)
class Inbox(Generic[PayloadT]):
    """Payloads from a node's in-neighbours, and the mixing weights."""

    payloads: Mapping[NodeId, PayloadT]
    """Contributions by sender, sorted. Read-only: nodes of one process receive the same tensors."""
    weights: Mapping[NodeId, float]
    """The node's row of the mixing matrix by member, sorted, its own weight included; the weights sum to 1."""
    mixed: Callable[[object, Tensor, str | None], Tensor | None] | None = field(default=None, repr=False, compare=False)
    """A runtime's own: gives what ``mix`` would, if it has worked that out for all its nodes at once."""

    def mix(self, own: Tensor, name: str | None = None) -> Tensor:
        """Return Σ w_j x_j over the inbox and ``own`` (whose weight is the one without a payload), in sorted order.

        Args:
            own: this node's values; its dtype and shape are the result's.
            name: of the tensor to mix, where payloads are mappings.
        """
        mixed = None if self.mixed is None else self.mixed(self.payloads, own, name)
        if mixed is not None:
            return mixed
        for node, weight in self.weights.items():
            payload: Any = self.payloads.get(node, own)
            values: Tensor = payload if payload is own or name is None else payload[name]
            # Product and sum are rounded apart: so are they when many nodes' are worked out at once.
            mixed = values * weight if mixed is None else mixed.add_(values * weight)
        assert mixed is not None, "a node has a weight of its own"
        return mixed


@dataclass(frozen=True, eq=False)
class NeighborAllGather(Operation[Inbox[PayloadT]]):
    """Give ``payload`` to this round's out-neighbours and receive those of the in-neighbours.

    The weights are the topology's rule on the graph of those that are really in, so that all nodes mix with rows of
    one matrix. Bytes: Σ over edges of the sender's payload; a number counts 8.
    """

    payload: PayloadT
    topology: Topology
    close: ClosePolicy = _QUORUM


@dataclass(frozen=True)
class Handle(Generic[T]):
    """A started operation. It belongs to its round: every handle must be waited for before the round returns."""

    sequence: int
    round: int


@dataclass(frozen=True, eq=False)
class Start(Operation[Handle[T]]):
    """Begin a collective operation and return a handle without waiting.

    The contribution is taken now. It may alias ``node.parameters`` or ``node.buffers``; its other tensors must not be
    written to before the ``Wait``.
    """

    operation: Operation[T]

    def __post_init__(self) -> None:
        """Refuse an ``AllReduce`` with buffers, which would be written to behind the training's back."""
        operation: Any = self.operation
        if isinstance(operation, AllReduce) and operation.buffers is not None:
            raise ValueError("Start takes an AllReduce without buffers=; set averages_buffers to average them later")


@dataclass(frozen=True, eq=False)
class Wait(Operation[T]):
    """Return the result of a started operation; exactly once for each handle."""

    handle: Handle[T]
