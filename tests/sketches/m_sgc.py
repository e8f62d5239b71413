"""M-SGC: several jobs in flight, so that a burst of stragglers is made up for later and costs almost nothing more.

Job t is the gradient of model t mod M, M = W - 1 + B, over all data; it is begun in round t, and known at the end of
round t + T, T = W - 2 + B, in time for the model's next one. Of all data, D1 is computed once: each of N nodes has
W - 1 chunks of it of its own, of (λ+1)c each. D2 is coded: B groups of N chunks of c, each on λ + 1 nodes, and

    c = 1 / (N (B + (W-1)(λ+1)))

Slot m of round r serves job r - m. Where m < W - 1 a node computes its chunk m of D1; a straggler's is lost. After
that it repeats one that was lost, or else computes its coded share of group m - (W - 1) of D2. That is exact if in all
W successive rounds at most λ nodes straggle, none of them over more than B rounds, which the close policy sees to:
rounds in which others are late wait for them.

Here a chunk is a share of the gradient over all samples of a node, and not one over a share of them: a batch of one
round cannot be drawn again in another. The code is fractional repetition, so that λ + 1 must divide N.
Reference: Krishnan, Ebrahimi and Khisti, "Sequential Gradient Coding for Straggler Mitigation", ICLR 2023,
arXiv:2211.13802.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from algorithms.api import Algorithm, AllGather, AllReduce, Batch, Gradient, Layout, Node, all_reduce_bytes
from algorithms.closing import ClosePolicy, decoding
from algorithms.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

ALL = 1_000_000  # samples: as many as there are


class WithinModel(ClosePolicy):
    """Leaves late ones behind if the pattern of stragglers stays what the code can bear."""

    recent: tuple[int, ...]  # straggled in one of the last W - 1 rounds
    blocked: tuple[int, ...]  # straggled B rounds ago or before, so that they must not now
    stragglers: int  # λ
    grace_s: NonNegativeFloat

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> bool:
        return arrived == active or (waited_s >= self.grace_s and self.bearable(active - arrived))

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited_s: float) -> float | None:
        bearable = waited_s < self.grace_s and self.bearable(active - arrived)
        return max(self.grace_s - waited_s, 0.001) if bearable else None

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        return self.enough(arrived, active, self.grace_s)

    def bearable(self, late: AbstractSet[int]) -> bool:
        return len(late | set(self.recent)) <= self.stragglers and late.isdisjoint(self.blocked)


class MSGC(Algorithm):
    burst: PositiveInt = 1  # B
    window: PositiveInt = 2  # W > B
    stragglers: PositiveInt = 1  # λ
    grace_s: NonNegativeFloat = 0.1  # after the first
    lr: PositiveFloat = 0.1

    def validate_for(self, num_nodes: int) -> None:
        if num_nodes % (self.stragglers + 1) or self.burst >= self.window:
            raise SettingsError(f"stragglers + 1 must divide {num_nodes}, and burst be less than window")

    @property
    def num_slots(self) -> int:
        return self.window - 1 + self.burst

    def init(self, node: Node) -> None:
        node.shared["models"] = [node.parameters.clone() for _ in range(self.num_slots)]
        node.shared["jobs"] = []  # in flight, the youngest first: what is known of the sum, and which chunks were lost
        node.shared["straggled"] = [[] for _ in range(self.window - 1)]  # in the last rounds

    async def round(self, node: Node) -> None:
        models = cast("list[Tensor]", node.shared["models"])
        fresh = {"job": node.round, "sum": torch.zeros_like(node.parameters), "lost": []}
        jobs: list[dict[str, Any]] = [fresh, *cast("list[Any]", node.shared["jobs"])]
        share = 1 / (len(node.view.members) * (self.burst + (self.window - 1) * (self.stragglers + 1)))  # c
        rows = self.code(len(node.view.members))
        results: list[Tensor] = []
        for slot, job in enumerate(jobs):
            at = models[job["job"] % len(models)]
            if slot < self.window - 1 or node.id in job["lost"]:
                results.append(await self._gradient(node.id, at) * ((self.stragglers + 1) * share))
            else:
                held = [part for part, entry in enumerate(rows[node.id]) if entry]
                coded = [rows[node.id][part] * await self._gradient(part, at) for part in held]
                results.append(torch.stack(coded).sum(0) * share)
        done = set(await AllGather(1.0, close=self._policy(node)))
        # Who is there decides with what factor a coded result counts, so that is agreed upon before they are added up.
        coders = [
            done.difference(job["lost"]) if slot >= self.window - 1 else set[int]() for slot, job in enumerate(jobs)
        ]
        factors = [decoding(rows, frozenset(coding)) or {} for coding in coders]
        scaled = {str(slot): result * factors[slot].get(node.id, 1.0) for slot, result in enumerate(results)}
        mean = await AllReduce(scaled)
        assert set(mean.members) == done
        jobs = [
            {
                "job": job["job"],
                "sum": job["sum"] + mean.value[str(slot)] * len(done),
                "lost": self._lost(node, slot, job["lost"], done),
            }
            for slot, job in enumerate(jobs)
        ]
        if len(jobs) == self.num_slots:
            last = jobs.pop()
            assert not last["lost"]
            place = last["job"] % len(models)
            step = models[place] - self.lr * last["sum"]
            node.shared["models"] = [step if index == place else model for index, model in enumerate(models)]
        node.shared["jobs"] = [*jobs]
        late = sorted(set(node.view.members) - done)
        node.shared["straggled"] = [*cast("list[Any]", node.shared["straggled"])[1:], [*late]]
        node.parameters.copy_(cast("list[Tensor]", node.shared["models"])[0])

    async def _gradient(self, part: int, at: Tensor) -> Tensor:
        report = await Gradient(at=at, batch=await Batch(part=part, size=ALL))
        return report.gradient

    def _lost(self, node: Node, slot: int, lost: list[int], done: set[int]) -> list[int]:
        """Whose chunks of D1 are still to be had, once for each: some are lost, or one of each repeated."""
        if slot < self.window - 1:
            return sorted([*lost, *(set(node.view.members) - done)])
        repeated = done.intersection(lost)
        return [one for place, one in enumerate(lost) if one not in repeated or one in lost[:place]]

    def _policy(self, node: Node) -> WithinModel:
        rounds = cast("list[list[int]]", node.shared["straggled"])
        before = rounds[: self.window - self.burst]
        return WithinModel(
            recent=tuple(sorted({one for late in rounds for one in late})),
            blocked=tuple(sorted({one for late in before for one in late})),
            stragglers=self.stragglers,
            grace_s=self.grace_s,
        )

    def code(self, num_nodes: int) -> tuple[tuple[float, ...], ...]:
        """Which chunks of a group of D2 a node holds: those of the λ + 1 nodes that it is among."""
        size = self.stragglers + 1
        return tuple(tuple(float(i // size == j // size) for j in range(num_nodes)) for i in range(num_nodes))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (num_nodes - 1) * 8 + all_reduce_bytes(self.num_slots * layout.nbytes, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 0
