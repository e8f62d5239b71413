"""M-SGC: several jobs in flight, so that a burst of stragglers is made up for later and costs almost nothing more.

Job t is the gradient of model t mod M, M = W - 1 + B, over all data; it is begun in round t, and known at the end of
round t + T, T = W - 2 + B, in time for the model's next one. Of all data, D1 is computed once: each of N nodes has
W - 1 chunks of it of its own, of (λ+1)c each. D2 is coded: B groups of N chunks of c, each on λ + 1 nodes, and

    c = 1 / (N (B + (W-1)(λ+1)))

Slot m of round r serves job r - m. Where m < W - 1 a node computes its chunk m of D1; a straggler's is lost. After
that it repeats one that was lost, or else computes its coded share of group m - (W - 1) of D2. That is exact if in all
W successive rounds at most λ nodes straggle, none of them over more than B rounds, which the close policy sees to:
rounds in which others are late wait for them.

A chunk is drawn by its name, so that whoever makes up for it later draws the same samples.

The fastest node's time counts (1 + μ) times; those that are not done by then are late if the code can bear it. If not,
the paper waits for everyone, and this until it can. The code is fractional repetition, so that λ + 1 must divide N.
Reference: Krishnan, Ebrahimi and Khisti, "Sequential Gradient Coding for Straggler Mitigation", ICLR 2023,
arXiv:2211.13802.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from starling.algorithms.api import Algorithm, AllGather, AllReduce, Batch, Gradient, Layout, Node, all_reduce_bytes
from starling.algorithms.closing import ClosePolicy, Waited
from starling.algorithms.closing.coded import decoding
from starling.algorithms.errors import SettingsError
from starling.algorithms.rules import DataBatch

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet


class WithinModel(ClosePolicy):
    """Leaves late ones behind if the pattern of stragglers stays what the code can bear."""

    recent: tuple[int, ...]  # straggled in one of the last W - 1 rounds
    blocked: tuple[int, ...]  # straggled B rounds ago or before, so that they must not now
    stragglers: int  # λ
    mu: NonNegativeFloat

    def enough(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> bool:
        return arrived == active or (not waited.left_s(0, self.mu) and self.bearable(active - arrived))

    def ask_again_s(self, arrived: AbstractSet[int], active: AbstractSet[int], waited: Waited) -> float | None:
        return waited.left_s(0, self.mu) or None if self.bearable(active - arrived) else None

    def past_deadline(self, arrived: AbstractSet[int], active: AbstractSet[int]) -> bool:
        return arrived == active or self.bearable(active - arrived)

    def bearable(self, late: AbstractSet[int]) -> bool:
        return len(late | set(self.recent)) <= self.stragglers and late.isdisjoint(self.blocked)


class MSGC(Algorithm):
    burst: PositiveInt = 1  # B
    window: PositiveInt = 2  # W > B
    stragglers: PositiveInt = 1  # λ
    chunk: PositiveInt = 1  # samples of a chunk of D2, c; those of D1 have λ + 1 times as many
    mu: NonNegativeFloat = 1.0  # μ, the author's
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
        size = self.stragglers + 1
        share = size / (len(node.view.members) * (self.burst + (self.window - 1) * size))  # (λ+1)c
        rows = self.code(len(node.view.members))
        results: list[Tensor] = []
        for slot, job in enumerate(jobs):
            batch = joined([await one for one in self.batches(node.id, slot, job, rows[node.id])])
            report = await Gradient(at=models[job["job"] % len(models)], batch=batch)
            results.append(report.gradient * share)
        done = set(await AllGather(1.0, close=self._policy(node)))
        # Who is there decides with what factor a coded result counts, so that is agreed upon before they are added up.
        coders = [
            done.difference(who for who, _ in job["lost"]) if slot >= self.window - 1 else set[int]()
            for slot, job in enumerate(jobs)
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
        node.shared["jobs"] = jobs
        late = sorted(set(node.view.members) - done)
        node.shared["straggled"] = [*cast("list[list[int]]", node.shared["straggled"])[1:], late]
        node.parameters.copy_(cast("list[Tensor]", node.shared["models"])[0])

    def batches(self, me: int, slot: int, job: dict[str, Any], row: tuple[float, ...]) -> list[Batch]:
        """Of a job's samples, those that a node computes on in a slot."""
        lost = [chunk for who, chunk in job["lost"] if who == me]
        if slot < self.window - 1 or lost:
            chunk = slot if slot < self.window - 1 else lost[0]
            size = (self.stragglers + 1) * self.chunk
            return [Batch(part=me, size=size, key=f"job {job['job']}, chunk {chunk}")]
        key = f"job {job['job']}, group {slot - (self.window - 1)}"
        return [Batch(part=part, size=self.chunk, key=key) for part, entry in enumerate(row) if entry]

    def _lost(self, node: Node, slot: int, lost: list[list[int]], done: set[int]) -> list[list[int]]:
        """Whose chunks of D1 are still to be had, and which: some are lost, or the first of each repeated."""
        if slot < self.window - 1:
            return sorted([*lost, *([one, slot] for one in set(node.view.members) - done)])
        first = {pair[0]: pair for pair in reversed(lost)}
        return [pair for pair in lost if pair[0] not in done or pair != first[pair[0]]]

    def _policy(self, node: Node) -> WithinModel:
        rounds = cast("list[list[int]]", node.shared["straggled"])
        before = rounds[: self.window - self.burst]
        return WithinModel(
            recent=tuple(sorted({one for late in rounds for one in late})),
            blocked=tuple(sorted({one for late in before for one in late})),
            stragglers=self.stragglers,
            mu=self.mu,
        )

    def code(self, num_nodes: int) -> tuple[tuple[float, ...], ...]:
        """Which chunks of a group of D2 a node holds: those of the λ + 1 nodes that it is among."""
        size = self.stragglers + 1
        return tuple(tuple(float(i // size == j // size) for j in range(num_nodes)) for i in range(num_nodes))

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return num_nodes * (num_nodes - 1) * 8 + all_reduce_bytes(self.num_slots * layout.nbytes, num_nodes)

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 0


def joined(batches: list[DataBatch]) -> DataBatch:
    """One batch of several: the code's entries are ones, so that a coded share is the gradient over all of them."""
    tensors = tuple(torch.cat(pieces) for pieces in zip(*(one.tensors for one in batches), strict=True))
    return DataBatch(tensors, sum(one.num_samples for one in batches))
