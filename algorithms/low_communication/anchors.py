"""Shared state of fragments: the anchor of each, and its outer optimizer's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from starling.algorithms.low_communication.fragments import gather, scatter, to_device, to_host
from starling.algorithms.state import NodeState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from starling.algorithms.api import Node
    from starling.algorithms.low_communication.fragments import Ranges
    from starling.algorithms.outer import OuterOptimizer, OuterState


class Fragment(TypedDict):
    """Shared state of one fragment, on the CPU."""

    anchor: Tensor
    """θ_p, shape (n,)."""
    outer: OuterState


class Shared(NodeState):
    fragments: list[Fragment]


def begin(node: Node, fragments: Sequence[Ranges], outer: OuterOptimizer) -> None:
    """Set the anchors of all fragments to the node's parameters, with fresh outer optimizers."""
    anchors = [to_host(gather(node.parameters, ranges)) for ranges in fragments]
    keep(node, [{"anchor": anchor, "outer": outer.init(anchor)} for anchor in anchors])


def known(node: Node) -> list[Fragment]:
    """Return the shared state of all fragments, as a list that may be changed and kept."""
    # A joiner on a GPU is given what it is given on its device.
    return [{"anchor": one["anchor"].cpu(), "outer": one["outer"]} for one in Shared(node.shared).fragments]


def keep(node: Node, fragments: list[Fragment]) -> None:
    """Replace the shared state of all fragments."""
    Shared(node.shared).fragments = fragments


def stepped(fragment: Fragment, gradient: Tensor, outer: OuterOptimizer) -> Fragment:
    """Return the fragment after an outer step along ``gradient``, shape (n,)."""
    step, state = outer.update(gradient, fragment["outer"])
    return {"anchor": fragment["anchor"] + step, "outer": state}


def in_place(node: Node, fragments: Sequence[Ranges]) -> Tensor:
    """Return the anchors of all fragments as flat parameters, shape (P,)."""
    model = torch.empty_like(node.parameters)
    for one, ranges in zip(known(node), fragments, strict=True):
        scatter(to_device(one["anchor"], model.device), model, ranges)
    return model
