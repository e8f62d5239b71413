"""The trainer of a node: gradients, losses and optimizer steps."""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starling.actors.data.generators import seeded
from starling.actors.data.samplers import piece_sizes
from starling.actors.replica.spec import NOT_STARTED, Interrupted
from starling.actors.training import probe_checks
from starling.actors.training.slab import aligned
from starling.actors.wire.finite import is_finite
from starling.actors.wire.tickets import mean_loss
from starling.algorithms.api import Batch, GradientReport, Perturbed, TrainReport
from starling.algorithms.errors import ProgramError
from starling.algorithms.rules import DataBatch, LocalProblem
from starling.algorithms.seeds import derive_seed, generator

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from starling.actors.data import Indices
    from starling.actors.replica.node_data import NodeData
    from starling.actors.replica.round_guard import RoundGuard
    from starling.actors.replica.schedule_progress import ScheduleProgress
    from starling.actors.replica.spec import Fence, ReplicaSpec
    from starling.actors.training.node_optimizer import NodeOptimizer
    from starling.actors.training.slab import ModelTensors
    from starling.actors.training.workbench import Workbench
    from starling.algorithms.api import Gradient, Loss, NodeId, Step, Train
    from starling.algorithms.rules import GradientFunction, Rule


class Trainer:
    """Carries out a node's ``Train``, ``Gradient``, ``Step`` and ``Loss``.

    Args:
        node: who trains.
        spec: of the run.
        bench: computes losses and gradients.
        tensors: of the node's model.
        data: of the node.
        optimizer: of the node.
        schedule: of the node's learning rate.
        guard: told of values that are not finite.
    """

    def __init__(
        self,
        node: NodeId,
        spec: ReplicaSpec,
        bench: Workbench,
        tensors: ModelTensors,
        data: NodeData,
        optimizer: NodeOptimizer,
        schedule: ScheduleProgress,
        guard: RoundGuard,
    ) -> None:
        self._node, self._spec, self._bench, self._tensors = node, spec, bench, tensors
        self._shared, self._gradients = bench.shared, bench.gradients
        self._data, self._optimizer, self._schedule, self._guard = data, optimizer, schedule, guard
        self._parameters = tensors.parameters
        self._round = NOT_STARTED
        self._seen: list[Tensor] = []
        """Indices of the samples of each step of the running ``Train``."""

    def begin(self, number: int) -> None:
        """Enter round ``number``."""
        self._round = number

    @property
    def module(self) -> nn.Module:
        """The module of all nodes in the process, bound to this node's tensors."""
        self._shared.attach(self._tensors)
        return self._shared.module

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self, operation: Train, fence: Fence) -> TrainReport:
        """Carry out ``Train``; the report's ``seconds`` are this machine's.

        Raises:
            NonFiniteLossError: the loss or the parameters became NaN or infinite, and ``on_nan`` is ``stop``.
            Interrupted: the fence went up.
            ProgramError: the node has no data, the rule gives something that is no gradient, or ``only`` names nothing.
        """
        began = time.perf_counter()
        steps = self.num_steps(operation)
        size, rule = self.step_size(operation), operation.rule
        frozen = self._frozen(operation)
        clip = self._spec.optimizer.grad_clip
        self._shared.attach(self._tensors)
        self._shared.mode(training=True)
        losses: list[float | Tensor] = []
        counts: list[int] = []
        self._seen = []
        immediate = self._shared.device.type == "cpu"
        rate = 0.0
        with self._seeded(self._schedule.step, "train"):
            try:
                backward = self._backward if rule is None else self._ruled(rule, size)
                for _ in range(steps):
                    if fence.is_set():
                        raise Interrupted
                    loss, num_samples = backward(size)
                    if frozen:
                        self._bench.gradients.leave_out(frozen)
                    if clip is not None:
                        nn.utils.clip_grad_norm_(self._bench.optimizers.trained, clip)
                    rate = self._schedule.rate() * operation.lr_factor
                    self._optimizer.step(self._parameters, rate)
                    self._schedule.advance(1)
                    if num_samples:
                        counts.append(num_samples)
                        # On a GPU reading a loss waits for the device, so they are looked at once, at the end.
                        losses.append(loss.item() if immediate else loss)
                        if immediate and not math.isfinite(losses[-1]):
                            break
            finally:
                if rule is not None:
                    rule.finish()
        self._shared.check("loss")
        values = [float(loss) for loss in losses]
        seconds = time.perf_counter() - began
        bad = next((step for step, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            seen = [one for one in self._seen if len(one)]
            culprit = self._data.culprit_at(seen[bad]) if bad < len(seen) else None
            self._guard.give_up(f"loss is {values[bad]} after inner step {bad} (lr {rate:.3g})", culprit)
            return TrainReport(math.nan, 0, 0, seconds)
        # The last step's own result is in no loss yet, and must not reach the other nodes.
        if not is_finite(self._parameters):
            culprit = self._data.culprit_at(self._seen[-1]) if self._seen else None
            self._guard.give_up(f"parameters are not finite after inner step {steps - 1} (lr {rate:.3g})", culprit)
            return TrainReport(math.nan, 0, 0, seconds)
        mean = mean_loss(list(zip(values, counts, strict=True)))
        return TrainReport(math.nan if mean is None else mean, sum(counts), steps, seconds)

    def num_steps(self, operation: Train) -> int:
        """Return the optimizer steps of a ``Train``.

        Raises:
            ProgramError: the node has no data.
        """
        draws = self._data.own("Train")
        return operation.steps or (operation.epochs or 0) * draws.steps_per_epoch(self.step_size(operation))

    def _frozen(self, operation: Train) -> frozenset[int]:
        """Return the places in ``Layout.entries`` that a ``Train`` leaves alone."""
        if operation.only is None:
            return frozenset()
        layout = self._shared.layout
        return frozenset(range(len(layout.entries))).difference(layout.select(operation.only))

    def step_size(self, operation: Train) -> int:
        """Return the samples of an optimizer step of a ``Train``."""
        return operation.batch_size or self._spec.samples_per_step

    def take_over(self, steps: int, moments: dict[str, Tensor]) -> None:
        """Count steps that were taken in one batch with other nodes, and keep the moments that they left."""
        self._optimizer.aged(steps, moments)
        self._schedule.advance(steps)

    def _backward(self, size: int) -> tuple[Tensor, int]:
        """Fill the gradient of an optimizer step of ``size``; return the mean loss and the number of samples."""
        # Drawn at once and weighted by size: k batches of b are one batch of k·b, also where an epoch ends.
        drawn = self._data.draw(size)
        self._seen.append(torch.from_numpy(drawn))
        num_samples = len(drawn)
        sizes = piece_sizes(num_samples, self._spec.batch_size, self._spec.min_batch)
        starts = itertools.accumulate(sizes, initial=0)
        pieces = (
            self._data.load(torch.from_numpy(drawn[start : start + length]))
            for start, length in zip(starts, sizes, strict=False)
        )
        if not num_samples and not self._data.own("Train").may_be_empty:
            self._gradients.none()
            return self._parameters.new_zeros(()), 0
        return self._gradients.differentiate(self._parameters, pieces, num_samples), num_samples

    def _ruled(self, rule: Rule, size: int) -> Callable[[int], tuple[Tensor, int]]:
        """Return a ``_backward`` for steps of ``size`` that uses a rule's gradient and sampler."""
        spec, data, own = self._spec, self._data, self._data.own("Train")
        rng = generator(spec.seed, self._round, self._node, self._schedule.step, "rule")
        loss = self._bench.loss.of_module
        problem = LocalProblem(self._gradient_at, self.module, loss, self._shared.layout, len(own.indices), size, rng)
        gradient_of, chosen = rule.wrap(problem), rule.sampler(problem)

        def backward(size: int) -> tuple[Tensor, int]:
            drawn = own.next(size) if chosen is None else _at_places(own.indices, rule, chosen.next(size))
            indices = data.take(drawn)
            self._seen.append(indices)
            batch = DataBatch(data.load(indices), len(indices))
            gradient, loss = self._checked(rule, gradient_of, batch)
            self._gradients.set(gradient)
            return loss.detach(), len(indices)

        return backward

    def _checked(self, rule: Rule, gradient_of: GradientFunction, batch: DataBatch) -> tuple[Tensor, Tensor]:
        gradient, loss = gradient_of(self._parameters, batch)
        if gradient.shape != self._parameters.shape or loss.numel() != 1:
            given = f"a gradient of shape {list(gradient.shape)} and a loss of shape {list(loss.shape)}"
            expected = f"{list(self._parameters.shape)} and []"
            raise ProgramError(f"{type(rule).__name__} gives {given}; they must be {expected}")
        return gradient.detach(), loss

    # --- single gradients, losses and steps --------------------------------------------------------------------------

    def gradient(self, operation: Gradient) -> GradientReport:
        """Carry out ``Gradient``; the learning rate's schedule does not move on.

        Raises:
            NonFiniteLossError: the loss or the gradient is NaN or infinite, and ``on_nan`` is ``stop``.
            ProgramError: ``at`` has the wrong shape, or the node has no data.
        """
        batch = self._data.batch(Batch()) if operation.batch is None else operation.batch
        at = self._parameters if operation.at is None else operation.at
        with self._seeded_for_batch():
            gradient, loss = self._gradient_at(at, batch)
        value = float(loss)
        if not (math.isfinite(value) and is_finite(gradient)):
            what = "the gradient is not finite" if math.isfinite(value) else f"loss is {value}"
            self._guard.give_up(f"{what} in a Gradient", self._data.culprit_of(batch))
            return GradientReport(torch.zeros_like(self._parameters), math.nan, 0)
        return GradientReport(gradient.clone(), value, batch.num_samples)

    def step(self, operation: Step) -> TrainReport:
        """Carry out ``Step``.

        Raises:
            NonFiniteLossError: the parameters became NaN or infinite, and ``on_nan`` is ``stop``.
            ProgramError: the gradient has the wrong shape.
        """
        gradient, clip = operation.gradient, self._spec.optimizer.grad_clip
        if gradient.shape != self._parameters.shape:
            shapes = f"{list(self._parameters.shape)}, not {list(gradient.shape)}"
            raise ProgramError(f"Step takes a gradient of shape {shapes}")
        self._shared.attach(self._tensors)
        if operation.fresh:
            self._optimizer.reset()
        self._gradients.set(gradient)
        if clip is not None:
            nn.utils.clip_grad_norm_(self._bench.optimizers.trained, clip)
        rate = self._schedule.rate()
        self._optimizer.step(self._parameters, rate)
        self._schedule.advance(1)
        if not is_finite(self._parameters):
            self._guard.give_up(f"parameters are not finite after a Step (lr {rate:.3g})")
            return TrainReport(math.nan, 0, 0, 0.0)
        return TrainReport(operation.report.loss, operation.report.num_samples, 0, 0.0)

    def loss(self, operation: Loss) -> float:
        """Carry out ``Loss``, forward only.

        Raises:
            NonFiniteLossError: it is NaN or infinite, and ``on_nan`` is ``stop``; with ``skip`` the result is NaN.
            ProgramError: ``at`` has the wrong shape, the node has no data, or the model cannot be probed.
        """
        batch = self._data.batch(Batch()) if operation.batch is None else operation.batch
        at, shared = operation.at, self._shared
        if operation.probe:
            probe_checks.check(self._bench)
        total = 0.0
        place = shared.perturbed(self._tensors, at) if isinstance(at, Perturbed) else shared.at(self._tensors, at)
        with self._seeded_for_batch(), torch.no_grad(), place:
            self._shared.mode(training=True)
            for part in self._split(batch) if batch.num_samples else ():
                total += float(self._bench.loss.of_batch(part)) * (len(part[0]) / batch.num_samples)
        self._shared.check("loss")
        if not (math.isfinite(total) or operation.probe):
            self._guard.give_up(f"loss is {total} in a Loss", self._data.culprit_of(batch))
            return math.nan
        return total

    def _gradient_at(self, parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
        with self._shared.at(self._tensors, parameters) as point:
            self._shared.mode(training=True)
            loss = self._gradients.differentiate(point, self._split(batch), batch.num_samples)
            self._shared.check("loss")
        return self._gradients.distinct(), loss

    def _split(self, batch: DataBatch) -> Iterator[tuple[Tensor, ...]]:
        """Split a batch into pieces of the configured size: it says how much is computed at once."""
        tensors = self._bench.loss.to_device(batch.tensors)
        sizes = piece_sizes(batch.num_samples, self._spec.batch_size, self._spec.min_batch)
        pieces = ((aligned(piece) for piece in one.split(sizes)) for one in tensors)
        return zip(*pieces, strict=True)

    def _seeded_for_batch(self) -> contextlib.AbstractContextManager[None]:
        """Seed dropout of ``Gradient`` and ``Loss``: one mask for all points at which the latest batch is looked at."""
        return self._seeded(*self._data.position.labels, "batch")

    def _seeded(self, *labels: int | str) -> contextlib.AbstractContextManager[None]:
        return seeded(derive_seed(self._spec.seed, self._round, self._node, *labels), self._shared.device)


def _at_places(own: Indices, rule: Rule, places: Tensor) -> Tensor:
    """Return the node's samples at the ``places`` that a rule's sampler gives."""
    is_index = places.dtype == torch.int64 and places.dim() == 1
    if not is_index or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(own)):
        what = f"int64 places of shape (b,) in [0, {len(own)})"
        raise ProgramError(f"the sampler of {type(rule).__name__} must give {what}, not {places.dtype} {places}")
    return own[places]
