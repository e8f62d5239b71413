"""The learner: a node's share of computing, which is its data, its optimizer, and all operations that train.

Half of a replica; the other half (``actors.replica.replica``) is what the node's program sees, and its rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from starling.actors.data import PlannedDraws, Position, blocks_of
from starling.actors.data.generators import seeded
from starling.actors.data.samplers import piece_sizes, planned_samples
from starling.actors.replica.pace import Milestone, Pace
from starling.actors.replica.spec import NOT_STARTED, Fence, Interrupted, NonFiniteLossError, ReplicaSpec
from starling.actors.tasks import TensorSamples
from starling.actors.training import probe_checks
from starling.actors.training.blame import non_finite, non_finite_of
from starling.actors.training.node_optimizer import NodeOptimizer
from starling.actors.training.shared_module import Slab, aligned
from starling.actors.wire.tickets import mean_loss
from starling.algorithms.api import SERVER, Batch, GradientReport, Perturbed, TrainReport
from starling.algorithms.errors import DataError, ProgramError
from starling.algorithms.rules import DataBatch, LocalProblem
from starling.algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from starling.actors.data import Draws, Indices, Place, Sampler, Segment
    from starling.actors.data.plans import Order
    from starling.actors.tasks import Samples
    from starling.algorithms.api import Gradient, Loss, NodeId, Step, Train
    from starling.algorithms.rules import GradientFunction, Rule

_NOTHING = contextlib.nullcontext()


class Learner:
    """What a node computes with; the arguments are those of ``Replica``."""

    parts: Sequence[Indices] | None = None
    """The indices of every node's samples, if the process knows them."""
    validation: Samples | None = None
    """The held-out data."""

    def __init__(
        self,
        node: NodeId,
        spec: ReplicaSpec,
        samples: Samples,
        indices: Indices,
        row: tuple[Slab, int],
        sampler: Sampler,
        pace: Pace | None,
    ) -> None:
        self.id = node
        self.spec, self.seed = spec, spec.seed
        self.slab, self.row = row
        self.bench = self.slab.bench
        self.device, self.layout = self.bench.device, self.bench.layout
        self.tensors = self.slab.current[self.row]
        self.parameters, self.buffers = self.tensors.parameters, self.tensors.buffers
        self.round = NOT_STARTED
        self.num_samples = len(indices)
        self.skipped = ""
        """Why, if it was."""
        self.skipping = False
        """Set for the rest of a round in which the loss was not finite (``on_nan: skip``): contributes nothing."""
        self.optimizer = NodeOptimizer(self.bench)
        self.samples = samples
        self._present: Callable[[Tensor], Tensor] | None = getattr(samples, "present", None)
        self._law = sampler
        self._sampler: Draws | None = None
        if node != SERVER:
            self._sampler = sampler.begin(indices, spec.seed, node, blocks_of(samples))
            self._sampler.min_batch = spec.min_batch
            if 0 < len(indices) < spec.min_batch:
                what = f"data: node {node} has {len(indices)} samples, fewer than data.min_batch ({spec.min_batch})"
                raise DataError(f"{what}; lower that, or give it more by data.partition")
        self.num_drawn = 0
        """Samples of training data that it has drawn since its last commit, those of rounds that were given up too.

        Without those that a task leaves out because they cannot be read."""
        self._latest: tuple[DataBatch, Tensor] | None = None
        """The batch that was drawn last by itself, and the indices of its samples."""
        self._seen: list[Tensor] = []
        """Those of each step of a ``Train``."""
        self._draws: dict[tuple[str | int, ...], int] = {}
        """How often the round has drawn from each part, less one."""
        self._step = 0
        self.milestone = Milestone()
        steps = 0 if node == SERVER else self._planned_steps(len(indices))
        self._own_steps = steps or 0
        self._pace = pace or Pace.of(spec, [len(indices)], 1)
        if node != SERVER and (steps is None or self._pace.steps):
            self.rate()  # raises, before anything is trained, if the schedule cannot work

    def _planned_steps(self, num_samples: int) -> int | None:
        spec = self.spec
        planned = planned_samples(num_samples, spec.samples_per_step, spec.min_batch)
        return spec.algorithm.steps_per_round(planned, spec.samples_per_step)

    @property
    def _module(self) -> nn.Module:
        """The workbench's module with this node's tensors."""
        self.bench.attach(self.tensors)
        return self.bench.module

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, operation: Train, fence: Fence) -> TrainReport:
        """Carry out ``Train``; the report's ``seconds`` are this machine's.

        Raises:
            NonFiniteLossError: the loss or the parameters became NaN or infinite, and ``on_nan`` is ``stop``.
            Interrupted: the fence went up.
            ProgramError: the node has no data, or the rule gives something that is no gradient.
        """
        began = time.perf_counter()
        steps = self.num_steps(operation)
        bench, clip = self.bench, self.spec.optimizer.grad_clip
        bench.attach(self.tensors)
        bench.mode(training=True)
        losses: list[float | Tensor] = []
        counts: list[int] = []
        self._seen = []
        immediate = self.device.type == "cpu"
        rate = 0.0
        with seeded(derive_seed(self.spec.seed, self.round, self.id, self._step, "train"), self.device):
            backward = self._backward if operation.rule is None else self._ruled(operation.rule)
            for _ in range(steps):
                if fence.is_set():
                    raise Interrupted
                loss, num_samples = backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(bench.trained, clip)
                rate = self.rate()
                self.optimizer.step(self.parameters, rate)
                self._count(1)
                if num_samples:
                    counts.append(num_samples)
                    # On a GPU reading a loss waits for the device, so they are looked at once, at the end.
                    losses.append(loss.item() if immediate else loss)
                    if immediate and not math.isfinite(losses[-1]):
                        break
        bench.check("loss")
        values = [float(loss) for loss in losses]
        seconds = time.perf_counter() - began
        bad = next((step for step, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            seen = [one for one in self._seen if len(one)]
            culprit = non_finite(self.samples, seen[bad]) if bad < len(seen) else None
            self.give_up_round(f"loss is {values[bad]} after inner step {bad} (lr {rate:.3g})", culprit)
            return TrainReport(math.nan, 0, 0, seconds)
        # The last step's own result is in no loss yet, and must not reach the other nodes.
        if not is_finite(self.parameters):
            culprit = non_finite(self.samples, self._seen[-1]) if self._seen else None
            self.give_up_round(f"parameters are not finite after inner step {steps - 1} (lr {rate:.3g})", culprit)
            return TrainReport(math.nan, 0, 0, seconds)
        mean = mean_loss(list(zip(values, counts, strict=True)))
        return TrainReport(math.nan if mean is None else mean, sum(counts), steps, seconds)

    def num_steps(self, operation: Train) -> int:
        """Optimizer steps of a ``Train``.

        Raises:
            ProgramError: the node has no data.
        """
        sampler = self._own_data("Train")
        return operation.steps or (operation.epochs or 0) * sampler.steps_per_epoch(self.spec.samples_per_step)

    def _backward(self) -> tuple[Tensor, int]:
        """Fill the gradient of one optimizer step; return the mean loss and the number of samples."""
        # Drawn at once and weighted by size: k batches of b are one batch of k·b, also where an epoch ends.
        drawn = self.draw()
        self._seen.append(torch.from_numpy(drawn))
        num_samples = len(drawn)
        sizes = piece_sizes(num_samples, self.spec.batch_size, self.spec.min_batch)
        starts = itertools.accumulate(sizes, initial=0)
        pieces = (
            self.load(torch.from_numpy(drawn[start : start + size])) for start, size in zip(starts, sizes, strict=False)
        )
        if not num_samples and not self._own_data("Train").may_be_empty:
            self.bench.no_gradient()
            return self.parameters.new_zeros(()), 0
        return self.bench.differentiate(self.parameters, pieces, num_samples), num_samples

    def _ruled(self, rule: Rule) -> Callable[[], tuple[Tensor, int]]:
        """The same with a rule's gradient and sampler."""
        bench, spec, own = self.bench, self.spec, self._own_data("Train")
        rng = generator(spec.seed, self.round, self.id, self._step, "rule")
        size = spec.samples_per_step
        loss = bench.loss_of_module
        problem = LocalProblem(self._gradient_at, self._module, loss, self.layout, len(own.indices), size, rng)
        gradient_of, chosen = rule.wrap(problem), rule.sampler(problem)

        def backward() -> tuple[Tensor, int]:
            drawn = own.next(size) if chosen is None else self._places(rule, chosen.next(size))
            indices = self._readable(drawn)
            self.num_drawn += len(indices)
            self._seen.append(indices)
            batch = DataBatch(self.load(indices), len(indices))
            gradient, loss = self._checked(rule, gradient_of, batch)
            bench.set_gradient(gradient)
            return loss.detach(), len(indices)

        return backward

    def _places(self, rule: Rule, places: Tensor) -> Tensor:
        """The samples at ``places`` among the node's own."""
        own = self._own_data("Train").indices
        is_index = places.dtype == torch.int64 and places.dim() == 1
        if not is_index or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(own)):
            what = f"int64 places of shape (b,) in [0, {len(own)})"
            raise ProgramError(f"the sampler of {type(rule).__name__} must give {what}, not {places.dtype} {places}")
        return own[places]

    def _checked(self, rule: Rule, gradient_of: GradientFunction, batch: DataBatch) -> tuple[Tensor, Tensor]:
        gradient, loss = gradient_of(self.parameters, batch)
        if gradient.shape != self.parameters.shape or loss.numel() != 1:
            given = f"a gradient of shape {list(gradient.shape)} and a loss of shape {list(loss.shape)}"
            expected = f"{list(self.parameters.shape)} and []"
            raise ProgramError(f"{type(rule).__name__} gives {given}; they must be {expected}")
        return gradient.detach(), loss

    def load(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Samples by index, as the module takes them."""
        return self.bench.drawn(self.samples, indices)

    def rate(self, ahead: int = 0) -> float:
        """The learning rate of the next step, or of one ``ahead`` of it."""
        config = self.spec.optimizer
        schedule, pace, (number, taken) = config.schedule, self._pace, self.milestone
        if schedule.is_flat:
            return config.lr
        place = pace.place(Milestone(number, taken + ahead), self._own_steps)
        if self.spec.algorithm.synchronous or not pace.steps:
            # It has taken more only if that is more than it plans; it is not to go by one step twice.
            place = max(place, self._step + ahead)
        return config.lr * schedule.factor(place, pace.total_steps(schedule))

    @property
    def schedule_place(self) -> tuple[object, ...] | None:
        """What ``rate`` depends on, besides what all nodes have in common."""
        if self.spec.optimizer.schedule.is_flat:
            return None
        return self.milestone, self._own_steps, self._step

    def hear(self, number: int) -> None:
        """What the node has now is of round ``number`` of the run, by whoever counts them."""
        if number != self.milestone.round:
            self.milestone = Milestone(number)

    def _count(self, steps: int) -> None:
        self._step += steps
        self.milestone = Milestone(self.milestone.round, self.milestone.steps + steps)

    def trained(self, steps: int, moments: dict[str, Tensor]) -> None:
        """Take over what steps that were taken elsewhere have made of the optimizer; the schedule moves on."""
        self.optimizer.aged(steps, moments)
        self._count(steps)

    def draw(self) -> NDArray[np.int64]:
        """The samples of one step, by index."""
        drawn = self._own_data("Train").draw(self.spec.samples_per_step)
        drawn = drawn if self._present is None else self._readable(torch.from_numpy(drawn)).numpy()
        self.num_drawn += len(drawn)
        return drawn

    def _own_data(self, operation: str) -> Draws:
        if self._sampler is None:
            raise ProgramError(f"the server has no training data: it can await no {operation} on its own")
        return self._sampler

    def _culprit_of(self, batch: DataBatch) -> str | None:
        """What of a batch is not finite."""
        if self._latest is not None and self._latest[0] is batch:
            return non_finite(self.samples, self._latest[1])
        return non_finite_of(batch.tensors)

    def give_up_round(self, what: str, culprit: str | None = None) -> None:
        """Go on without this node's round, if ``on_nan`` is ``skip``: its values are not finite, as ``what`` says.

        Args:
            what: is not finite, and where.
            culprit: what its samples have to do with that, if anything.

        Raises:
            NonFiniteLossError: it is not.
        """
        if not self.spec.skip_nan:
            hint = "lower optimizer.lr" if culprit is None else f"{culprit}: mend the data, or leave such samples out"
            where = f"{self._name()}, round {self.round}: {what}; {hint}"
            raise NonFiniteLossError(f"{where}, or set on_nan: skip to go on without this node's round")
        # The round goes on with what was committed; the optimizer's moments have seen the NaN and are made anew.
        self.skipping, self.skipped = True, what
        self.slab.restore(self.row)
        self.optimizer.reset()

    def _name(self) -> str:
        return "server" if self.id == SERVER else f"node {self.id}"

    # --- the other compute operations --------------------------------------------------------------------------------

    def batch(self, operation: Batch) -> DataBatch:
        """Carry out ``Batch``.

        Raises:
            ProgramError: there is no such data, or the size is not positive.
        """
        size = self.spec.samples_per_step if operation.size is None else operation.size
        if size < 1:
            raise ProgramError(f"Batch takes a size of at least 1; got {size}")
        if operation.source == "validation":
            if operation.part is not None or self.validation is None:
                why = "this process has no held-out data" if self.validation is None else "held-out data have no parts"
                raise ProgramError(f"Batch(source='validation', part={operation.part}): {why}")
            places = self._choose(("validation",), len(self.validation), size)
            with self._seeded_for_load("validation", self.round, self._draws["validation",]):
                tensors = self.bench.drawn(self.validation, places)
            return DataBatch(tensors, len(places))
        if operation.part is None:
            labels: tuple[int | str, ...] = (self.round, self.id, *self.position.labels)
            indices = self._own_data("Batch without a part").next(size)
        elif self.parts is not None and 0 <= operation.part < len(self.parts):
            part = self.parts[operation.part]
            # The same for all nodes: they may be asked for one batch, and its noise is part of it.
            if operation.key is None:
                places = self._choose(("part", operation.part), len(part), size)
                labels = ("part", operation.part, self.round, self._draws["part", operation.part])
            else:
                labels = ("part", operation.part, operation.key)
                # As no round is in the labels, a key cannot meet the draws of rounds, whose labels begin with one.
                places = _shuffled(len(part), self.spec.seed, "part", operation.part, operation.key)[:size]
            indices = part[places]
        else:
            known = f"0 to {len(self.parts) - 1}" if self.parts else "none"
            raise ProgramError(f"Batch(part={operation.part}): there is no such part (there are: {known})")
        with self._seeded_for_load(*labels):
            indices = self._readable(indices)
            self.num_drawn += len(indices)
            batch = DataBatch(self.load(indices), len(indices))
        self._latest = batch, indices
        return batch

    def _seeded_for_load(self, *labels: int | str) -> contextlib.AbstractContextManager[None]:
        """For samples that draw from the generators of the process: what they add is of (seed, round, node, draw)."""
        if type(self.samples) is TensorSamples and type(self.validation) in (TensorSamples, type(None)):
            return _NOTHING  # they draw nothing, and a round may be as short as this takes
        return seeded(derive_seed(self.spec.seed, "load", *labels), self.device)

    def _readable(self, indices: Tensor) -> Tensor:
        """Those whose samples can be read: a task may leave out what it cannot."""
        return indices if self._present is None else self._present(indices)

    def _choose(self, source: tuple[str | int, ...], population: int, size: int) -> Tensor:
        """At most ``size`` places at random, the same on all nodes: a pure function of (seed, round, source, count)."""
        count = self._draws[source] = self._draws.get(source, -1) + 1
        return _shuffled(population, self.spec.seed, self.round, *source, count)[:size]

    def gradient(self, operation: Gradient) -> GradientReport:
        """Carry out ``Gradient``; the learning rate's schedule does not move on.

        Raises:
            NonFiniteLossError: the loss or the gradient is NaN or infinite, and ``on_nan`` is ``stop``.
            ProgramError: ``at`` has the wrong shape, or the node has no data.
        """
        batch = self.batch(Batch()) if operation.batch is None else operation.batch
        at = self.parameters if operation.at is None else operation.at
        with self._seeded_for_batch():
            gradient, loss = self._gradient_at(at, batch)
        value = float(loss)
        if not (math.isfinite(value) and is_finite(gradient)):
            what = "the gradient is not finite" if math.isfinite(value) else f"loss is {value}"
            self.give_up_round(f"{what} in a Gradient", self._culprit_of(batch))
            return GradientReport(torch.zeros_like(self.parameters), math.nan, 0)
        return GradientReport(gradient.clone(), value, batch.num_samples)

    def step(self, operation: Step) -> TrainReport:
        """Carry out ``Step``.

        Raises:
            NonFiniteLossError: the parameters became NaN or infinite, and ``on_nan`` is ``stop``.
            ProgramError: the gradient has the wrong shape.
        """
        gradient, bench, clip = operation.gradient, self.bench, self.spec.optimizer.grad_clip
        if gradient.shape != self.parameters.shape:
            shapes = f"{list(self.parameters.shape)}, not {list(gradient.shape)}"
            raise ProgramError(f"Step takes a gradient of shape {shapes}")
        bench.attach(self.tensors)
        if operation.fresh:
            self.optimizer.reset()
        bench.set_gradient(gradient)
        if clip is not None:
            nn.utils.clip_grad_norm_(bench.trained, clip)
        rate = self.rate()
        self.optimizer.step(self.parameters, rate)
        self._count(1)
        if not is_finite(self.parameters):
            self.give_up_round(f"parameters are not finite after a Step (lr {rate:.3g})")
            return TrainReport(math.nan, 0, 0, 0.0)
        return TrainReport(operation.report.loss, operation.report.num_samples, 0, 0.0)

    def _gradient_at(self, parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
        bench = self.bench
        with bench.at(self.tensors, parameters) as point:
            bench.mode(training=True)
            loss = bench.differentiate(point, self._split(batch), batch.num_samples)
            bench.check("loss")
        return bench.distinct_gradient(), loss

    def loss(self, operation: Loss) -> float:
        """Carry out ``Loss``; as for ``gradient``, forward only.

        Raises:
            NonFiniteLossError: it is NaN or infinite, and ``on_nan`` is ``stop``; with ``skip`` the result is NaN.
            ProgramError: ``at`` has the wrong shape, the node has no data, or the model cannot be probed.
        """
        batch = self.batch(Batch()) if operation.batch is None else operation.batch
        bench = self.bench
        at = operation.at
        if operation.probe:
            probe_checks.check(bench)
        total = 0.0
        place = bench.perturbed(self.tensors, at) if isinstance(at, Perturbed) else bench.at(self.tensors, at)
        with self._seeded_for_batch(), torch.no_grad(), place:
            bench.mode(training=True)
            for part in self._split(batch) if batch.num_samples else ():
                total += float(bench.loss(part)) * (len(part[0]) / batch.num_samples)
        bench.check("loss")
        if not (math.isfinite(total) or operation.probe):
            self.give_up_round(f"loss is {total} in a Loss", self._culprit_of(batch))
            return math.nan
        return total

    def _split(self, batch: DataBatch) -> Iterator[tuple[Tensor, ...]]:
        """A batch in pieces of the configured size: it says how much is computed at once."""
        tensors = self.bench.to_device(batch.tensors)
        sizes = piece_sizes(batch.num_samples, self.spec.batch_size, self.spec.min_batch)
        pieces = ((aligned(piece) for piece in one.split(sizes)) for one in tensors)
        return zip(*pieces, strict=True)

    def _seeded_for_batch(self) -> Any:  # noqa: ANN401 - a context manager
        """Dropout of ``Gradient`` and ``Loss``: one mask for all points at which the latest batch is looked at."""
        return seeded(derive_seed(self.spec.seed, self.round, self.id, *self.position.labels, "batch"), self.device)

    @property
    def position(self) -> Position:
        """Where the node's next draw of its own data begins."""
        return Position() if self._sampler is None else self._sampler.position

    @position.setter
    def position(self, position: Position) -> None:
        if self._sampler is not None:
            self._sampler.position = position

    @property
    def extras(self) -> tuple[Segment, ...]:
        """What the node was handed of others' parts."""
        return self._sampler.extras if isinstance(self._sampler, PlannedDraws) else ()

    def plan(self, place: Place) -> None:
        """Draw as ``place`` says from now on: of a process that knows all parts."""
        draws = self._own_data("plan")
        if not isinstance(draws, PlannedDraws):
            own = draws if self.id < len(self.parts or ()) else None
            draws = self._sampler = PlannedDraws(own, draws.indices, self.seed, self.id, self._order_of)
            draws.min_batch = self.spec.min_batch
        draws.plan(place)
        if draws.own is None:
            self.num_samples = max(1, sum(one.size for one in place.extras))

    def _order_of(self, part: int) -> Order:
        assert self.parts is not None
        # The law of a plan is that of an epoch, which is without replacement.
        return cast("Order", self._law.begin(self.parts[part], self.seed, part, blocks_of(self.samples)))


def _shuffled(population: int, *labels: int | str) -> Tensor:
    """Places 0 … ``population`` - 1 in an order that is a pure function of ``labels``."""
    return torch.randperm(population, generator=generator(*labels))


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite."""
    # The sum is one pass, and finite only if all values are; that it is not may be its own overflow.
    return math.isfinite(values.sum()) or bool(values.isfinite().all())
