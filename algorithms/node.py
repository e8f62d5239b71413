"""The node as its program sees it: replica, data and state, and the view of the round."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from starling.algorithms.layout import Layout

NodeId: TypeAlias = int
"""Identifies a logical participant for the whole run; a replacement process keeps the id."""

SERVER: NodeId = -1
"""The node that runs an algorithm's ``server`` program. It owns no data, and is no member of a view."""

State: TypeAlias = "Tensor | bool | int | float | str | Mapping[str, State] | Sequence[State] | None"
"""Values in ``node.shared`` and ``node.local``: they can be digested, stored without pickle, and handed over.

Mappings are ``dict``s and sequences ``list``s, no others; only so does a type checker take a ``list[int]``.
"""

Payload: TypeAlias = "Tensor | float | Mapping[str, Tensor | float]"
"""Contents of a message: a tensor, a number, or a flat mapping of them, sent as raw buffers."""


@dataclass(frozen=True)
class View:
    """The numbered set of members of a round."""

    number: int
    members: tuple[NodeId, ...]
    """Sorted."""
    joined: tuple[NodeId, ...] = ()
    """Members that were not in the committed set of the last committed round."""
    left: tuple[NodeId, ...] = ()
    """Members of the last committed round's view that are not in this one."""

    @property
    def changed(self) -> bool:
        """Say whether a member joined or left since the last committed round."""
        return bool(self.joined or self.left)


class Node(Protocol):
    """One logical participant, as its program sees it: replica, data and optimizer."""

    id: NodeId
    seed: int
    """The run's, the same on all nodes."""
    incarnation: int
    """Counts the processes that have embodied this node, from 0."""
    round: int
    num_rounds: int
    """Rounds that the run is to do."""
    view: View
    participates: bool
    """Whether this node is in the round's cohort. One that is not awaits no ``Train`` and contributes ``None``."""
    num_samples: int
    """Training samples that this node owns; of one without a part of its own, those that it is handed, at least 1."""
    layout: Layout
    parameters: Tensor
    """The trainable values, flat and contiguous, shape (P,); the module's parameters are views into it."""
    buffers: Tensor
    """Floating-point buffers (batch-norm statistics), flat, shape (B,), often B = 0. Local unless averaged."""

    @property
    def committed(self) -> Tensor:
        """Return the parameters of the last commit, shape (P,), read-only and valid until the next commit."""
        ...

    @property
    def shared(self) -> MutableMapping[str, State]:
        """Return the state that is bit-identical on all members."""
        ...

    @property
    def local(self) -> MutableMapping[str, State]:
        """Return the state of this node alone."""
        ...

    @property
    def now(self) -> float:
        """Return the runtime's clock in seconds; it is virtual in the simulator."""
        ...

    def rng(self, purpose: str) -> torch.Generator:
        """Return a CPU generator that is a pure function of (run seed, round, node, purpose)."""
        ...

    def report(self, **metrics: float) -> None:
        """Report metrics of this round by name; a name that was reported before in the round gets the new value.

        Committed rounds record their mean, minimum and maximum over nodes: in ``metrics.jsonl``, on the screen, among
        the curves, and in a tracker as ``algorithm/<name>``. With ``evaluation.per_node`` each node's value is kept.

        Raises:
            ProgramError: a value is not a number.
        """
        ...

    def module(self, at: Tensor | None = None) -> Callable[..., Any]:
        """Return the model as a function of its inputs, at parameters ``at``, shape (P,), or at the current ones."""
        ...
