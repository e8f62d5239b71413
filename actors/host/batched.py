"""Batched training and commits of several nodes in one process, to the bits of one node after another.

Batching needs a task with gradients in closed form (``Task.gradients``) and an optimizer in ``_UPDATES``. The
parameters, gradients and moments of many nodes are then rows of one tensor, and one step updates all nodes. Each row
has the bits of a step alone: rows do not depend on their number, and updates treat each value on its own. Everything
else is done node by node.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from starling.actors.data.generators import drawn_from, same_draws
from starling.actors.data.samplers import piece_sizes
from starling.actors.tasks import TensorSamples
from starling.actors.wire.tickets import mean_loss
from starling.algorithms.api import TrainReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from starling.actors.replica.replica import Replica
    from starling.actors.replica.spec import Fence
    from starling.actors.training.slab import Slab
    from starling.algorithms.api import NodeId, Train

    Request: TypeAlias = tuple[Replica, Train, Fence]

Outcome: TypeAlias = "TrainReport | Exception"
"""Result of a ``Train``: a report, or ``Interrupted``, or whatever the node's task or rule raised."""

_MAX_ROWS = 256
"""Nodes that are trained as one: enough to make the calls cheap, few enough for their batches to stay in the cache."""


def train_together(requests: Sequence[Request], on_turn: Callable[[NodeId], None] | None = None) -> list[Outcome]:
    """Carry out ``Train``s of several nodes; never raises for a node's failure.

    Args:
        requests: a replica, what it is to do, and what tells it to stop.
        on_turn: called before code of a task or a rule runs for one node alone.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, (replica, operation, _) in enumerate(requests):
        bench = replica.bench
        is_plain = bench.optimizers.update is not None and not bench.is_random and not replica.optimizer.is_one_by_one
        if bench.gradients.has_closed_form and is_plain and operation.rule is None and operation.only is None:
            alike.setdefault(_likeness(replica, operation), []).append(place)
    outcomes: list[Outcome | None] = [None] * len(requests)
    for places in alike.values():
        for start in range(0, len(places), _MAX_ROWS):
            chunk = places[start : start + _MAX_ROWS]
            if len(chunk) > 1:
                for place, report in zip(chunk, _train_rows([requests[one] for one in chunk]), strict=True):
                    outcomes[place] = report
    return [_train_alone(*requests[place], on_turn) if one is None else one for place, one in enumerate(outcomes)]


def settle_all(replicas: Iterable[Replica], committed: int) -> list[Replica]:
    """Commit those of ``replicas`` that staged a round up to ``committed``; return them, in order."""
    due = [one for one in replicas if one.staged_round is not None and committed >= one.staged_round]
    commit_all(due)
    return due


def commit_all(replicas: Sequence[Replica]) -> None:
    """Commit several replicas."""
    for replica in replicas:
        replica.make_step()
    for slab, start, stop in _runs(replicas):
        slab.commit(start, stop)
    for replica in replicas:
        replica.commit_state()


def _runs(replicas: Sequence[Replica]) -> Iterator[tuple[Slab, int, int]]:
    """Yield the ranges of slab rows that cover the replicas."""
    by_slab: dict[Slab, list[int]] = {}
    for replica in replicas:
        by_slab.setdefault(replica.slab, []).append(replica.row)
    for slab, rows in by_slab.items():
        rows.sort()
        for _, run in itertools.groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
            (_, first), *others = run
            yield slab, first, first + 1 + len(others)


# --- training -------------------------------------------------------------------------------------------------------


def _train_alone(replica: Replica, operation: Train, fence: Fence, on_turn: Callable[[NodeId], None] | None) -> Outcome:
    if on_turn is not None:
        on_turn(replica.id)
    try:
        return replica.trainer.train(operation, fence)
    except Exception as error:  # noqa: BLE001 - whatever a user's task raises is data here
        return error


def _likeness(replica: Replica, operation: Train) -> tuple[object, ...]:
    """Return a key that is equal for requests that may be rows of one tensor."""
    steps = replica.trainer.num_steps(operation) if replica.num_samples else None
    optimizer = replica.optimizer
    age = optimizer.age if optimizer.moments else 0
    size, factor = replica.trainer.step_size(operation), operation.lr_factor
    return id(replica.bench), id(replica.data.samples), steps, size, factor, age, replica.schedule.place


def _train_rows(requests: Sequence[Request]) -> list[TrainReport | None]:
    """Train identical nodes in one batch; return ``None``, without side effects, for nodes that have to train alone."""
    began = time.perf_counter()
    replicas = [replica for replica, _, _ in requests]
    positions = [(replica.data.position, replica.data.num_drawn) for replica in replicas]
    steps = replicas[0].trainer.num_steps(requests[0][1])
    rows = _Rows(replicas, requests[0][1], [fence for _, _, fence in requests])
    # Of tensors in memory nothing is drawn at random, and a round may be as short as looking takes.
    may_draw = type(replicas[0].data.samples) is not TensorSamples
    before = drawn_from() if may_draw else None
    try:
        done = all(rows.step(number) for number in range(steps))
    except Exception:  # noqa: BLE001 - alone, each gets the error that is its own
        done = False
    if before is not None and not same_draws(before, drawn_from()):
        # Its samples draw from the generators of the process: alone, each node gets what is its own.
        replicas[0].bench.is_random, done = True, False
    if not done:
        for replica, position in zip(replicas, positions, strict=True):
            replica.data.position, replica.data.num_drawn = position
        return [None] * len(replicas)
    losses: list[list[float]] = torch.stack(rows.losses, dim=1).tolist()
    good = rows.finite(losses)
    rows.write_back(good, steps)
    seconds = (time.perf_counter() - began) / len(replicas)
    reports: list[TrainReport | None] = []
    for row, replica in enumerate(replicas):
        if good[row]:
            counts = rows.counts[row]
            loss = mean_loss(list(zip(losses[row], counts, strict=True)))
            reports.append(TrainReport(math.nan if loss is None else loss, sum(counts), steps, seconds))
        else:
            replica.data.position, replica.data.num_drawn = positions[row]
            reports.append(None)
    return reports


class _Rows:
    """Nodes in batched training; their own tensors stay as they were until ``write_back``."""

    def __init__(self, replicas: Sequence[Replica], operation: Train, fences: Sequence[Fence]) -> None:
        self._replicas = replicas
        self._size, self._lr_factor = replicas[0].trainer.step_size(operation), operation.lr_factor
        self._fences = list({id(fence): fence for fence in fences}.values())
        first = replicas[0]
        self._spec, self._bench, self._samples = first.spec, first.bench, first.data.samples
        (slab, start, stop), *others = _runs(replicas)
        self._run: tuple[Slab, int, int] | None = None
        """Rows of one slab that are copied at once; None if the nodes do not come in their order."""
        if not others and [one.row for one in replicas] == [*range(start, stop)]:
            self._run = slab, start, stop
            self.values = slab.stacked(start, stop).clone(memory_format=torch.contiguous_format)
        else:
            self.values = torch.stack([replica.parameters for replica in replicas])
        self._moments = {
            name: torch.stack([replica.optimizer.moments[name] for replica in replicas])
            for name in first.optimizer.moments
        }
        self.losses: list[Tensor] = []
        """Losses of each step, shape (n,)."""
        self.counts: list[list[int]] = [[] for _ in replicas]
        """Samples of each step, node by node."""

    def step(self, number: int) -> bool:
        """Take the ``number``-th step; ``False`` if these nodes have to go on alone."""
        if any(fence.is_set() for fence in self._fences):
            return False
        first, bench, config = self._replicas[0], self._bench, self._spec.optimizer
        drawn = [replica.data.draw(self._size) for replica in self._replicas]
        result = self._gradients(drawn)
        if result is None:
            return False
        gradients, losses = result
        if config.grad_clip is not None:
            gradients = _clip(gradients, config.grad_clip)
        assert bench.optimizers.update is not None
        rate = first.schedule.rate(number) * self._lr_factor
        bench.optimizers.update(self.values, gradients, self._moments, first.optimizer.age + number, rate)
        self.losses.append(losses)
        for row, indices in enumerate(drawn):
            self.counts[row].append(len(indices))
        return True

    def _gradients(self, drawn: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor] | None:
        sizes = [len(indices) for indices in drawn]
        if len(set(sizes)) == 1:
            return self._gradients_of_equal(self.values, drawn)
        gradients, losses = torch.empty_like(self.values), None
        for size in sorted(set(sizes)):
            rows = [row for row, other in enumerate(sizes) if other == size]
            places = torch.tensor(rows)
            result = self._gradients_of_equal(self.values[places], [drawn[row] for row in rows])
            if result is None:
                return None
            losses = result[1].new_empty(len(sizes)) if losses is None else losses
            gradients[places], losses[places] = result
        assert losses is not None
        return gradients, losses

    def _gradients_of_equal(self, values: Tensor, drawn: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor] | None:
        """Compute gradients on batches of one size, in pieces of the size that a single node would compute at once."""
        num_samples = len(drawn[0])
        sizes = piece_sizes(num_samples, self._spec.batch_size, self._spec.min_batch)

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
                indices = np.concatenate([one[start : start + size] for one in drawn])
                tensors = self._bench.loss.drawn(self._samples, torch.from_numpy(indices))
                yield tuple(tensor.unflatten(0, (len(drawn), -1)) for tensor in tensors)

        return self._bench.gradients.closed_form(values, batches(), num_samples)

    def finite(self, losses: Sequence[Sequence[float]]) -> list[bool]:
        """Return for each node whether its losses and parameters are finite."""
        good = [all(map(math.isfinite, one)) for one in losses]
        if math.isfinite(self.values.sum()):
            return good
        whole: list[bool] = self.values.isfinite().all(dim=1).tolist()
        return [one and other for one, other in zip(good, whole, strict=True)]

    def write_back(self, good: Sequence[bool], steps: int) -> None:
        """Write parameters and moments back to the nodes that stayed finite."""
        if self._run is not None and all(good):
            slab, start, stop = self._run
            slab.stacked(start, stop).copy_(self.values)
        else:
            for row, replica in enumerate(self._replicas):
                if good[row]:
                    replica.parameters.copy_(self.values[row])
        for row, replica in enumerate(self._replicas):
            if good[row]:
                moments = {name: moment[row] for name, moment in self._moments.items()} if self._moments else {}
                replica.trainer.take_over(steps, moments)


def _clip(gradients: Tensor, max_norm: float) -> Tensor:
    """Clip the gradient norm of each row."""
    # A norm along a dimension adds up in another order than the norm of a row.
    norms = torch.stack([nn.utils.get_total_norm([row]) for row in gradients])
    return gradients * (max_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)


# --- optimizers -----------------------------------------------------------------------------------------------------
