"""State transfer: what a donor has committed, as plain data, becomes the committed state of a joiner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from actors.buffers import as_buffer, as_tensor
from algorithms.errors import ProgramError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from actors.replica import Replica
    from algorithms.api import State


@dataclass(frozen=True)
class StateExport:
    """A node's committed parameters, buffers, counters and shared state; local state is nobody else's.

    Views of the donor's memory where it is on the CPU: to be sent or loaded before the donor's next commit.
    """

    meta: dict[str, Any]
    """Plain JSON: the round and the step, the tree of the shared state, dtype and shape of every array."""
    arrays: list[NDArray[np.uint8]] = field(repr=False)
    """Raw bytes, contiguous: parameters, buffers, counters, then the shared state's tensors."""

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays)


def export_state(replica: Replica) -> StateExport:
    """What ``load_state`` needs, also while a round is open."""
    tensors = replica.committed_tensors()
    leaves = [tensors.parameters, tensors.buffers, *tensors.counters]
    tree = _pack(replica.shared.committed(), leaves)
    forms = [{"dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)} for leaf in leaves]
    progress = {"round": replica.committed_round, "step": replica.committed_step}
    meta = progress | {"counters": len(tensors.counters), "shared": tree, "tensors": forms}
    return StateExport(meta, [as_buffer(leaf.detach().cpu().contiguous()) for leaf in leaves])


def load_state(replica: Replica, export: StateExport, *, keep_local: bool) -> None:
    """Make a donor's state the committed state of ``replica``; the shared state has the donor's bits.

    Args:
        replica: the joiner. What it has not committed is dropped; its place in its own data stays.
        export: the donor's state. Nothing of the joiner aliases it.
        keep_local: keep the joiner's local state and its optimizer's, as a node does that has only been away; else
            both are those of a new node.

    Raises:
        ProgramError: the donor has another model.
    """
    leaves = [_read(*one) for one in zip(export.meta["tensors"], export.arrays, strict=True)]
    own = [replica.tensors.parameters, replica.tensors.buffers, *replica.tensors.counters]
    if [one.shape for one in own] != [one.shape for one in leaves[: export.meta["counters"] + 2]]:
        raise ProgramError("the donor's state is of a model with other tensors than this node's")
    replica.rollback()
    for tensor, value in zip(own, leaves[: export.meta["counters"] + 2], strict=True):
        tensor.copy_(value)
    shared = _unpack(export.meta["shared"], leaves, replica.device)
    replica.shared.replace(cast("dict[str, State]", shared))
    if not keep_local:
        replica.local.replace({})
        replica.optimizer.reset()
    replica.catch_up(export.meta["round"], export.meta["step"])


def _pack(state: State, leaves: list[Tensor]) -> dict[str, Any]:
    """A state tree as JSON; its tensors are numbered, and put behind ``leaves``."""
    if isinstance(state, Tensor):
        leaves.append(state)
        return {"tensor": len(leaves) - 1}
    if isinstance(state, dict):
        return {"dict": {key: _pack(child, leaves) for key, child in state.items()}}
    if isinstance(state, list):
        return {"list": [_pack(child, leaves) for child in state]}
    return {"value": state}


def _unpack(packed: dict[str, Any], leaves: list[Tensor], device: torch.device) -> State:
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return leaves[content].to(device, copy=True)
        case "dict":
            return {key: _unpack(child, leaves, device) for key, child in content.items()}
        case "list":
            return [_unpack(child, leaves, device) for child in content]
        case _:
            return content


def _read(form: dict[str, Any], array: NDArray[np.uint8]) -> Tensor:
    """An array as the tensor it was; not to be written to."""
    return as_tensor(array).view(getattr(torch, form["dtype"])).reshape(form["shape"])
