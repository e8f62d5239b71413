"""The compressor interface."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from starling.algorithms.registry import Part

if TYPE_CHECKING:
    from torch import Tensor

    from starling.algorithms.api import Layout, Node, Reduced


class Compressor(Part, family="compressor", catalog="starling.algorithms.compressors"):
    """Averages a gradient over all members by exchanges of its own, where a codec would only change one's bytes.

    A compressor keeps its state in ``node.shared`` and ``node.local`` under its own name.
    """

    @abstractmethod
    def init(self, node: Node) -> None:
        """Make the initial state; part of the algorithm's ``init``."""

    @abstractmethod
    async def all_reduce(self, node: Node, gradient: Tensor) -> Reduced[Tensor]:
        """Return about the mean of all members' ``gradient``, shape (P,), identical on all members."""

    def unsent(self, node: Node) -> float:
        """Return the norm of the residuals that ``node`` still has to send."""
        del node
        return 0.0

    @abstractmethod
    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        """Return the payload bytes of one ``all_reduce`` over all nodes."""
