"""Random walk: one model walks over the graph, learns where it is, and prefers nodes visited less often.

A token carries the model θ and the share x_j of its visits that node j has had. The node i that holds it in step n
counts the visit, takes a step along its own gradient, and passes the token on along the walk K[x]. P is the mixing
matrix of ``topology``, a walk that comes to all nodes equally often in the long run; x_j is 1/N at first:

    x ← x + γ_n (δ_i - x)          γ_n = (n + 1)^-a          a = ``visits_exponent``
    θ ← θ - β_n ∇f_i(θ)            β_n = ``lr`` · (n + 1)^-b          b = ``step_exponent``
    K_ij[x] = P_ij x_j^-α / Σ_k P_ik x_k^-α          α = ``repulsion``

With α = 0 the walk is P's own. With a < b, as by default, the variance of θ falls with α like 1/α².
Deviations: floating-point buffers travel along. The defaults of α, a, b and ``lr`` are ours: with b near 1 the steps
of a run of any length add up to little, and θ stays where it began. A node that skips a step (``on_nan``) passes θ on
as it came.
Elasticity: there is one token. The first node that is present at the start begins with it. The token is lost with its
holder, or with the first node before its first step; the run then ends with an error. When another node is gone the
graph is made anew over the others; a new node counts as the least visited.
Cost: b·P + 8·N + 8 bytes for each hop to another node, b = 4 for float32, and none where the token stays. A round of a
run is N steps, in which the token stays Σ_i P_ii times in the long run. State: P values.
Reference: Hu, Doshi and Eun, "Accelerating Distributed Stochastic Optimization via Self-Repellent Random Walks", ICLR
2024, arXiv:2401.09665. The walk: Doshi, Hu and Eun, "Self-Repellent Random Walks on General Graphs", ICML 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from starling.algorithms.api import Algorithm, Gradient, Layout, Left, Message, Node, NodeId, Receive, Send
from starling.algorithms.errors import SettingsError
from starling.algorithms.messages import model_of, take_model
from starling.algorithms.topologies import Ring, Topology

if TYPE_CHECKING:
    from collections.abc import Sequence


class RandomWalk(Algorithm, name="random_walk"):
    """SGD along a self-repellent random walk; see the module's docstring."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    result: ClassVar[Literal["mean", "last"]] = "last"
    uses_optimizer: ClassVar[bool] = False

    topology: Topology = Ring()  # P; symmetric
    graph_seed: int = 0  # of random topologies: the graph is the same for all nodes, whatever the run's seed
    repulsion: NonNegativeFloat = 5.0  # α; 0: visits do not matter
    visits_exponent: float = Field(default=0.55, gt=0.5, le=1)  # a; 1: all visits count alike, else late ones more
    step_exponent: float = Field(default=0.6, gt=0.5, le=1)  # b; above a: θ moves slower than x
    lr: PositiveFloat = 2.0  # of the token's steps; the nodes' own optimizers take none

    @model_validator(mode="after")
    def _comes_equally_often(self) -> Self:
        try:
            self.topology.require_symmetric(self.name)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    async def round(self, node: Node) -> None:
        members = list(node.view.members)
        step, visits = 0, torch.full((len(members),), 1 / len(members), dtype=torch.float64)
        # Whoever joins finds the walk begun, also as the first member: a view of number 0 is that of the start.
        if node.round or node.incarnation or node.view.number or node.id != members[0]:
            while not isinstance(message := await Receive(), Message):
                if isinstance(message, Left):
                    members = [member for member in members if member != message.node]
            step, visits = int(message.number("step")), message.tensor("visits")
            take_model(node, message)
        step += 1
        visits = visited(covering(visits, members), node.id, (step + 1) ** -self.visits_exponent)
        before = node.parameters.clone()
        report = await Gradient()
        node.parameters.copy_(before.sub_(report.gradient, alpha=self.lr * (step + 1) ** -self.step_exponent))
        # The walk's step, which all know that have the token, is the round of graphs that change over time.
        row = self.topology.mixing(members, step, self.graph_seed).weights[node.id]
        chances = kernel(torch.tensor(list(row.values()), dtype=torch.float64), visits[list(row)], self.repulsion)
        place = int(torch.multinomial(chances, 1, generator=node.rng("walk")))
        token = {**model_of(node), "visits": visits, "step": step}
        await Send(list(row)[place], token)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        weights = self.topology.mixing(range(num_nodes), 0, self.graph_seed).weights
        hops = sum(1 - row[node] for node, row in weights.items())
        return round(hops * (layout.nbytes + layout.buffer_nbytes + 8 * num_nodes + 8))


def kernel(base: Tensor, visits: Tensor, repulsion: float) -> Tensor:
    """Return K[x] for rows of P and shares of visits, shape (…, N), float64: base · visits^-α, scaled to sum to 1.

    The visits may have any scale, but none may be 0.

    >>> kernel(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]), 1.0)
    tensor([0.7500, 0.2500])
    """
    # Of logarithms: 0.001^-200 is infinite, and infinity by infinity is no probability.
    return torch.softmax(base.log() - repulsion * visits.log(), dim=-1)


def visited(visits: Tensor, node: NodeId, rate: float) -> Tensor:
    """Return the shares of visits after one more to ``node``: x + γ (δ_i - x), shape (N,).

    >>> visited(torch.tensor([0.5, 0.5]), 0, 0.5)
    tensor([0.7500, 0.2500])
    """
    result = visits * (1 - rate)
    result[node] += rate
    return result


def covering(visits: Tensor, members: Sequence[NodeId]) -> Tensor:
    """Return visits with an entry for every member; a new member gets the least share of the others.

    >>> covering(torch.tensor([0.75, 0.25]), [0, 1, 2])
    tensor([0.7500, 0.2500, 0.2500])
    """
    missing = max(members) + 1 - len(visits)
    return visits if missing <= 0 else torch.cat([visits, visits.min().expand(missing)])
