"""D-SGD: local steps, then a weighted mean with the neighbours' models.

Node i has its own model x_i and its own optimizer, of which nothing is exchanged. With T for ``steps`` (K) optimizer
steps on its own data, from x to T(x), and the mixing matrix W of ``topology``, ``order`` says which comes first:

    atc, adapt then combine      x_i ← Σ_j w_ij T_j(x_j)
    cta, combine then adapt      x_i ← Σ_j w_ij x_j + T_i(x_i) - x_i

With one step of plain gradient descent (η = ``optimizer.lr``) T(x) = x - η g(x), so cta is Σ_j w_ij x_j - η g_i(x_i).
The gradient is taken at the node's own x_i, not at the mean, so its exchange goes on while the node trains. With a
constant η neither ends in the optimum where the nodes' data differ, but beside it, the further the sparser the graph.

Deviations: floating-point buffers are mixed alike. With several steps cta adds the whole move of the K steps.
Elasticity: W is made anew for the members of each view; a joiner begins with the model of one of them, and a leaver
takes its model along. A node missing from one exchange is left out at both ends of its edges, so that the mean of the
others is kept. It goes on from its own last model, also if its contribution is already in the others'.
Cost: one model (b·P bytes, b = 4 for float32) for each directed edge of the round's graph; 2·N·b·P on a ring. State: P
values (x_i), with cta P more while a round runs.
Reference: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized
Parallel Stochastic Gradient Descent", NeurIPS 2017, arXiv:1705.09056, which is cta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from starling.algorithms.api import NeighborAllGather, Start, Train, Wait
from starling.algorithms.gossip.base import Gossip, mix, tensors_of

if TYPE_CHECKING:
    from starling.algorithms.api import Layout, Node


class DSGD(Gossip, name="dsgd"):
    """Decentralized stochastic gradient descent; see the module's docstring."""

    order: Literal["atc", "cta"] = "atc"  # train, then mix; or mix what was there before

    async def round(self, node: Node) -> None:
        if self.order == "atc":
            await self._adapt_then_combine(node)
        else:
            await self._combine_then_adapt(node)

    async def _adapt_then_combine(self, node: Node) -> None:
        await Train(steps=self.steps)
        tensors = tensors_of(node)
        inbox = await NeighborAllGather(tensors, self.topology)
        mix(tensors, inbox)

    async def _combine_then_adapt(self, node: Node) -> None:
        before = {name: own.clone() for name, own in tensors_of(node).items()}
        handle = await Start(NeighborAllGather(before, self.topology))
        await Train(steps=self.steps)
        inbox = await Wait(handle)
        for name, own in tensors_of(node).items():
            own.add_(inbox.mix(before[name], name).sub_(before[name]))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return self.topology.num_messages(num_nodes) * (layout.nbytes + layout.buffer_nbytes)
