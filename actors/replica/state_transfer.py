"""State transfer: a donor's committed state, as plain data, becomes the committed state of a joiner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from starling.actors.data import Place, Position
from starling.actors.replica.pace import Milestone
from starling.actors.replica.spec import NOT_STARTED, NonFiniteLossError, node_name
from starling.actors.wire.buffers import as_buffer, as_tensor
from starling.actors.wire.finite import is_finite
from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from starling.actors.replica.replica import Replica
    from starling.algorithms.api import NodeId, State


@dataclass(frozen=True)
class StateExport:
    """A node's committed state, for a joiner, or all of it for the node's successor.

    Views of the donor's memory where it is on the CPU: to be sent or loaded before the donor's next commit.
    """

    meta: dict[str, Any]
    """Plain JSON: round, step and data position, the trees of shared and local state and of the optimizer's, dtype and
    shape of every array, and what the run is."""
    arrays: list[NDArray[np.uint8]] = field(repr=False)
    """Raw bytes, contiguous: parameters, buffers, counters, then the trees' tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays)


def export_state(replica: Replica, *, everything: bool = False, shared: bool = True) -> StateExport:
    """Export a replica's committed state for ``load_state``, also while a round is open.

    Args:
        replica: the donor.
        everything: also its local state, its optimizer's and its place in its data, for whoever takes its place; else
            the optimizer's state only if ``optimizer.on_join`` says that a joiner has the donor's.
        shared: with the shared state; else it is to be had of another (``with_shared``).
    """
    tensors, progress = replica.committed_tensors(), replica.committed_progress
    leaves = [tensors.parameters, tensors.buffers, *tensors.counters]
    with_optimizer = everything or replica.spec.optimizer.on_join == "donor"
    meta: dict[str, Any] = {
        "run": replica.spec.fingerprint,
        "round": replica.committed_round,
        "step": progress.step,
        "milestone": list(progress.milestone),
        "counters": len(tensors.counters),
        "shared": _pack(replica.shared.committed(), leaves) if shared else None,
        "local": _pack(replica.local.committed(), leaves) if everything else None,
        "optimizer": _pack(replica.optimizer.state(), leaves) if with_optimizer else None,
        "position": list(progress.position) if everything else None,
        "extras": [list(one) for one in replica.data.extras] if everything else [],
        "num_void": replica.data.num_drawn if everything and replica.staged_round is None else 0,
    }
    meta["tensors"] = [{"dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)} for leaf in leaves]
    return StateExport(meta, [as_buffer(leaf.detach().cpu().contiguous()) for leaf in leaves])


def snapshot(replica: Replica, *, shared: bool = True) -> StateExport:
    """Copy everything that a node has committed, incarnation included, for a checkpoint.

    It stays as it is, whatever the node does.
    """
    export = export_state(replica, everything=True, shared=shared)
    if not is_finite(replica.committed_tensors().parameters):
        name, number = node_name(replica.id), replica.committed_round
        raise NonFiniteLossError(f"{name}, round {number}: its parameters are not finite, and are not saved")
    # What is in the trees is replaced and not written to, and of the optimizer's state it has a copy already.
    own = export.meta["counters"] + 2
    arrays = [array.copy() for array in export.arrays[:own]] + export.arrays[own:]
    return StateExport(export.meta | {"incarnation": replica.incarnation}, arrays)


def copied(export: StateExport) -> StateExport:
    """Copy an export into memory of its own."""
    return StateExport(export.meta, [array.copy() for array in export.arrays])


def with_shared(export: StateExport, donor: StateExport) -> StateExport:
    """Return ``export`` with the shared state of ``donor``; both were made at one commit."""
    if export.meta["shared"] is not None:
        return export
    forms, arrays = list(export.meta["tensors"]), list(export.arrays)

    def moved(packed: dict[str, Any]) -> dict[str, Any]:
        ((kind, content),) = packed.items()
        match kind:
            case "tensor":
                forms.append(donor.meta["tensors"][content])
                arrays.append(donor.arrays[content])
                return {"tensor": len(arrays) - 1}
            case "dict":
                return {"dict": {key: moved(child) for key, child in content.items()}}
            case "list":
                return {"list": [moved(child) for child in content]}
            case _:
                return packed

    return StateExport(export.meta | {"shared": moved(donor.meta["shared"]), "tensors": forms}, arrays)


def donor_among(saved: Mapping[NodeId, StateExport]) -> StateExport:
    """Return the export with the latest shared state."""
    # Of a node that had been away at the last commit it is older.
    return max((one for one in saved.values() if one.meta["shared"] is not None), key=lambda one: one.meta["round"])


def is_blank(export: StateExport) -> bool:
    """Whether nothing had been committed: in a donor's place is another already, which has nothing to give."""
    return export.meta["round"] == NOT_STARTED


def load_state(replica: Replica, export: StateExport, position: Position | None = None) -> None:
    """Make a donor's state the committed state of ``replica``; the shared state has the donor's bits.

    Local state stays as it is, what ``init`` made of it or what was committed, unless the export has it. Of the
    optimizer's state, if the export has it, only a node that has never committed a round takes a donor's: one that has
    only been away keeps its own.

    Args:
        replica: the joiner. What it has not committed is dropped.
        export: the donor's state. Nothing of the joiner aliases it.
        position: where the joiner's data go on, if the export does not say; default: where they were.

    Raises:
        ProgramError: the donor belongs to another run, or has another model.
    """
    meta = export.meta
    leaves = [_read(*one) for one in zip(meta["tensors"], export.arrays, strict=True)]
    own = [replica.tensors.parameters, replica.tensors.buffers, *replica.tensors.counters]
    if meta["run"] != replica.spec.fingerprint:
        raise ProgramError("the donor's state is of a run with another configuration than this node's")
    if [one.shape for one in own] != [one.shape for one in leaves[: meta["counters"] + 2]]:
        raise ProgramError("the donor's state is of a model with other tensors than this node's")
    replica.rollback()
    for tensor, value in zip(own, leaves[: meta["counters"] + 2], strict=True):
        tensor.copy_(value)
    replica.shared.replace(cast("dict[str, State]", _unpack(meta["shared"], leaves, replica.device)))
    if meta["local"] is not None:
        replica.local.replace(cast("dict[str, State]", _unpack(meta["local"], leaves, replica.device)))
    is_new = replica.committed_round == NOT_STARTED
    if meta["optimizer"] is not None and (is_new or meta["local"] is not None):
        replica.optimizer.load(_unpack(meta["optimizer"], leaves, replica.device))
    if meta["position"] is not None:
        position = Position(*meta["position"])
        if meta["extras"]:
            replica.replan(Place.of(meta["extras"], position))
    replica.incarnation = meta.get("incarnation", replica.incarnation)
    replica.catch_up(meta["round"], meta["step"], position, Milestone(*meta.get("milestone", (0, 0))))
    replica.data.num_drawn += meta["num_void"]


def _pack(state: State, leaves: list[Tensor]) -> dict[str, Any]:
    """Return a state tree as JSON; its tensors are numbered, and appended to ``leaves``."""
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
    """View an array as the tensor that it was; not to be written to."""
    return as_tensor(array).view(getattr(torch, form["dtype"])).reshape(form["shape"])
