"""Single merge: gossip on a budget of neighbours, and one mean of all models in the last round.

Node i takes K = ``steps`` optimizer steps T on its own model x_i, and mixes it with r_t others on average, drawn anew
in each round t of R, with weights 1/(r_t + 1). In the last round all are merged:

    x_i ← Σ_j w_ij T_j(x_j)          the last:  x_i ← (1/N) Σ_j T_j(x_j)

With p = t/R, r = ``neighbors`` and r' = ``late_neighbors`` the budget of round t is, by ``schedule``,

    fixed       r
    linear      r + (r' - r) p
    cosine      r' + (r - r') (1 + cos πp) / 2
    truncate    r while p < ``begin``, then r'
    window      r' while ``begin`` ≤ p < ``begin`` + ``width``, else r

Fractions of a neighbour are carried over: r = 0.2 is one neighbour in every fifth round. From N - 1 neighbours on it is
the mean of all. The finding is that a late budget is worth more than an early one, and that some communication
throughout keeps models mergeable.
Deviations: weights are doubly stochastic (pairs, drawn as matchings), where the paper's code has row-stochastic ones,
which do not preserve the mean; fractions of a neighbour are carried over instead of drawn. Floating-point buffers are
mixed alike.
Elasticity: nothing is shared; a joiner begins with the model of another one, and a leaver takes its model along. Pairs
are drawn among the members of a round.
Cost: r_t·N·b·P bytes per round (r_t·(N-1)·b·P if N is odd), b = 4 for float32, and 2·b·P·(N-1) for a mean of all, or
N·(N-1)·b·P up to 64 KiB. State: P values (x_i).
Reference: "On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning", ICLR 2026,
arXiv:2507.06542; defaults are those of its code.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, PositiveInt

from starling.algorithms.api import Algorithm, AllReduce, NeighborAllGather, Train, all_reduce_bytes
from starling.algorithms.gossip.base import mix, tensors_of
from starling.algorithms.topologies.random_matching import RandomMatching

if TYPE_CHECKING:
    from starling.algorithms.api import Layout, Node

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class SingleMerge(Algorithm, name="single_merge"):
    """Gossip with a budget, and one merge; see the module's docstring."""

    replicated: ClassVar[bool] = False

    steps: PositiveInt = 100  # K, optimizer steps in a round
    schedule: Literal["fixed", "linear", "cosine", "truncate", "window"] = "fixed"  # of the budget
    neighbors: NonNegativeFloat = 0.2  # r, others that a node mixes with in a round, on average
    late_neighbors: NonNegativeFloat = 31.0  # r', the same at the schedule's end, or in its window
    begin: Share = 0.99  # where truncate and window change to r', as a share of all rounds
    width: Share = 0.01  # of the window
    merge: bool = True  # whether all are merged in the last round

    def budget(self, number: int, num_rounds: int) -> float:
        """Return r_t, the budget of round ``number`` in neighbours."""
        early, late, progress = self.neighbors, self.late_neighbors, number / num_rounds
        match self.schedule:
            case "fixed":
                return early
            case "linear":
                return early + (late - early) * progress
            case "cosine":
                return late + (early - late) * (1 + math.cos(math.pi * progress)) / 2
            case "truncate":
                return early if progress < self.begin else late
            case "window":
                return late if self.begin <= progress < self.begin + self.width else early

    def num_neighbors(self, number: int, num_nodes: int, num_rounds: int) -> int:
        """Return the number of other nodes that a node mixes with in round ``number``; N - 1 for a mean of all."""
        most = num_nodes - 1
        if self.merge and number == num_rounds - 1:
            return most
        spent = _spent(self, most, num_rounds)  # pyright: ignore[reportArgumentType] - frozen models are hashable
        return spent[number + 1] - spent[number]

    async def round(self, node: Node) -> None:
        await Train(steps=self.steps)
        num_nodes = len(node.view.members)
        count = self.num_neighbors(node.round, num_nodes, node.num_rounds)
        if count >= num_nodes - 1:
            node.parameters.copy_((await AllReduce(node.parameters, buffers=node.buffers)).value)
        elif count:
            tensors = tensors_of(node)
            mix(tensors, await NeighborAllGather(tensors, RandomMatching(matchings=count)))

    def round_bytes(self, layout: Layout, num_nodes: int, number: int, num_rounds: int) -> int:
        count, nbytes = self.num_neighbors(number, num_nodes, num_rounds), layout.nbytes + layout.buffer_nbytes
        if count >= num_nodes - 1:
            return all_reduce_bytes(nbytes, num_nodes)
        return count * (num_nodes - num_nodes % 2) * nbytes

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        matched = num_nodes - num_nodes % 2
        return round(min(self.neighbors, num_nodes - 1) * matched * (layout.nbytes + layout.buffer_nbytes))


@functools.lru_cache(maxsize=8)
def _spent(algorithm: SingleMerge, most: int, num_rounds: int) -> tuple[int, ...]:
    """Whole neighbours before each round, and before the one after the last."""
    budgets = (min(algorithm.budget(number, num_rounds), most) for number in range(num_rounds))
    # Sums of fractions: five times 0.2 is meant to be one.
    return tuple(math.floor(total + 1e-9) for total in itertools.accumulate(budgets, initial=0.0))
