"""The workbench computes losses and gradients with the one module that the nodes of a process share.

A node owns flat tensors and nothing else of a model. The module, which is hundreds of Python objects, is there once;
the nodes of a process take turns at it: attaching one makes the module's parameters and buffers views into its tensors.
A node that is alone in its process stays attached for good.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starling.actors.data.generators import Settings
from starling.actors.tasks import Task, answers
from starling.actors.training import blame, optimizers, perturbed_forward
from starling.actors.training.bound_module import BoundModule, buffer_slots, consecutive
from starling.actors.training.flat_gradient import FlatGradient
from starling.actors.training.module_init import compile_in_place, initial_module
from starling.actors.training.slab import ModelTensors, aligned
from starling.actors.training.updates import update_of
from starling.algorithms.errors import DataError, ProgramError, SettingsError
from starling.algorithms.layout import Layout, LayoutEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch.optim import Optimizer

    from starling.actors.tasks import Samples
    from starling.actors.training.optimizers import OptimizerConfig
    from starling.algorithms.noise import Perturbed
    from starling.algorithms.rules import DataBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Dtype of the master weights by ``optimizer.precision``; bf16 is autocast over fp32 master weights."""

_MAX_KEPT_VIEWS = 16
"""To make views anew takes longer than to attach them; each is some 400 bytes, for every node."""

_NO_CONTEXT = contextlib.nullcontext()


class Workbench:
    """Binds the shared module to one node's tensors at a time, and computes with it."""

    def __init__(self, task: Task, config: OptimizerConfig, seed: int, device: torch.device) -> None:
        self.task = task
        self.config = config
        self.device = device
        self.dtype = DTYPES[config.precision]
        self._seed = seed
        self.module = self._build()
        if config.compile:
            compile_in_place(self.module, device)
        self._bound = BoundModule(self.module, task.name)
        self.parameters = self._bound.parameters
        self._places = self._bound.places
        self.layout = layout_of(self.module, self.dtype)
        self.attached: ModelTensors | None = None
        self.is_random = False
        """Whether samples were seen to draw from the generators of the process."""
        self.can_be_probed = False
        """It has been looked at, and nothing speaks against it."""
        self._is_fresh = True
        """Until the first node is attached the module has the initial values."""
        self._gradient: FlatGradient | None = None
        """Allocated when it is first needed; nodes need it only while it is their turn."""
        # One flat tensor instead of many: the same bits, and one kernel instead of one per layer.
        self._flat = nn.Parameter(torch.empty(0, dtype=self.dtype, device=device))
        self.is_flat = optimizers.is_elementwise(config)
        """Whether the optimizer sees one flat parameter."""
        self.trained: list[Tensor] = [self._flat] if self.is_flat else [*self.parameters]
        plain = config.name.lower().replace("_", "")
        # On a GPU torch has faster ones, which it chooses by itself.
        self.update = update_of(plain, config.options) if self.is_flat and device.type == "cpu" else None
        self.make_optimizer()  # raises, before anything is trained, if it does not take such parameters
        # The task's own form does not know of autocast, whose bits are those of autograd's operations.
        self.has_closed_form = type(task).gradients is not Task.gradients and config.precision != "bf16"

    def make_optimizer(self, *, one_by_one: bool = False) -> Optimizer:
        """A fresh optimizer for one node, of its parameters as they are or ``one_by_one``. It updates who is attached.

        Raises:
            SettingsError: the optimizer does not take such parameters.
        """
        return optimizers.build(self.config, [*self.parameters] if one_by_one else self.trained)

    def _build(self) -> nn.Module:
        return initial_module(self.task, self._seed, self.device, self.dtype).to(device=self.device)

    def initialize(self, parameters: Tensor, buffers: Tensor) -> list[Tensor]:
        """Write the initial values into flat tensors; return the counters."""
        module = self.module if self._is_fresh else self._build()
        trainable = self.parameters if self._is_fresh else [one for one in module.parameters() if one.requires_grad]
        for place, parameter in zip(self._places, trainable, strict=True):
            view = place.of(parameters)
            # One by one they take the place of what the module was built with: there are never two whole models.
            parameter.data = view.copy_(parameter.detach())
        floating, counting = buffer_slots(module)
        for place, slot in zip(self._bound.buffer_places, floating, strict=True):
            place.of(buffers).copy_(slot.tensor)
        return [slot.tensor.clone() for slot in counting]

    # --- taking turns ------------------------------------------------------------------------------------------------

    def attach(self, tensors: ModelTensors) -> None:
        """Make the module's parameters and buffers views into a node's tensors."""
        if self.attached is not tensors:
            views = tensors.views or [place.of(tensors.parameters) for place in self._places]
            if len(views) <= _MAX_KEPT_VIEWS:
                tensors.views[:] = views
            self._bind(tensors.parameters, views)
            self._bound.bind_buffers(tensors.buffers, tensors.counters)
            self.attached = tensors
            self._is_fresh = False

    def _bind(self, parameters: Tensor, views: Sequence[Tensor]) -> None:
        self._bound.bind(views)
        self._flat.data = parameters

    @contextlib.contextmanager
    def at(
        self, tensors: ModelTensors, parameters: Tensor | None, buffers: Tensor | None = None, *, moves: bool = True
    ) -> Iterator[Tensor]:
        """Compute at other parameters or buffers than a node's; its own tensors stay as they are.

        Statistics of a batch norm move with the node's own model only: what is computed at other parameters leaves its
        buffers alone.

        Args:
            tensors: of the node whose turn it is.
            parameters: shape (P,); ``None``, or the node's own: its own.
            buffers: shape (B,); ``None``: a copy of its own.
            moves: whether what is computed at the node's own parameters may move its buffers.

        Yields:
            The parameters that the module has.

        Raises:
            ProgramError: they have another shape than the node's.
        """
        self.attach(tensors)
        own = tensors.parameters
        point = own if parameters is None else self._like(parameters, own, "parameters")
        if point.data_ptr() == own.data_ptr() and buffers is None and moves:
            yield own
            return
        statistics = (tensors.buffers if buffers is None else self._like(buffers, tensors.buffers, "buffers")).clone()
        counters = [counter.clone() for counter in tensors.counters]
        self.attached = None
        self._bind(point, [place.of(point) for place in self._places])
        self._bound.bind_buffers(statistics, counters)
        try:
            yield point
        finally:
            self.attach(tensors)

    def perturbed(self, tensors: ModelTensors, point: Perturbed) -> contextlib.AbstractContextManager[None]:
        """Compute at a point next to a node's parameters, without a copy; ``ProgramError`` if the module cannot."""
        perturbed_forward.check(self.module, compiled=self.config.compile)
        self.attach(tensors)
        return perturbed_forward.perturbing(tensors.parameters, self.layout, point)

    def _like(self, value: Tensor, own: Tensor, what: str) -> Tensor:
        """A tensor as the module can have it; the same one if it already is."""
        if value.shape != own.shape:
            message = f"a model of {own.numel()} {what} cannot be computed at a tensor of shape {list(value.shape)}"
            raise ProgramError(message)
        return aligned(value.detach().to(self.device, self.dtype).contiguous())

    def mode(self, *, training: bool) -> None:
        """Put the module into training or evaluation mode."""
        self._bound.mode(training=training)

    def check(self, method: str) -> None:
        """Look at the module after the task's ``method`` ran, whoever is attached; see ``BoundModule``.

        Raises:
            ProgramError: it is not as it was built.
        """
        if self.attached is None:
            self._bound.drop()
        else:
            self._bound.take_back(method)
        self._bound.check(method)

    # --- the loss and its gradient -----------------------------------------------------------------------------------

    def to_device(self, batch: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Move samples to the device, in the module's dtype."""
        return tuple(one.to(self.device, self.dtype if one.is_floating_point() else one.dtype) for one in batch)

    def drawn(self, samples: Samples, indices: Tensor) -> tuple[Tensor, ...]:
        """Load the samples at ``indices`` as the module takes them.

        Raises:
            ProgramError: the task's samples give no tensors with a row for each.
        """
        return self.to_device(answers.batch(self.task, samples.batch(indices), len(indices)))

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Compute the task's mean loss of the attached node, to be differentiated."""
        return self._loss(self.module, batch)

    def loss_of_module(self, module: nn.Module, batch: DataBatch) -> Tensor:
        """Compute the task's mean loss of a module that a rule has made of the shared one."""
        return self._loss(module, batch.tensors)

    def _loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        before = Settings.now()
        with self._autocast():
            try:
                given = self.task.loss(module, batch)
            except ValueError as error:
                hint = blame.too_small(error, len(batch[0]))
                if hint is None:
                    raise
                raise ProgramError(f"task {self.task.name}: {hint}") from error
        before.restore()
        return answers.loss(self.task, given, is_differentiated=before.records_gradients)

    def differentiate(self, point: Tensor, batches: Iterable[tuple[Tensor, ...]], num_samples: int) -> Tensor:
        """Fill ``gradient`` with the mean gradient over several batches; return the mean loss.

        Args:
            point: what the module's parameters are bound to, shape (P,).
            batches: together ``num_samples`` samples.
            num_samples: how many; without any the gradient and the loss are zero.
        """
        gradient = self._ready_gradient()
        if not num_samples:
            gradient.zero()
            return gradient.values.new_zeros(())
        if self.has_closed_form:
            batches = list(batches)
            closed = self.closed_form(point.unsqueeze(0), _with_a_dimension(batches), num_samples)
            if closed is not None:
                gradient.zero()
                gradient.values.copy_(closed[0][0])
                return closed[1][0]
        total: Tensor | None = None
        gradient.begin()
        for batch in batches:
            # The loss may run backward passes of its own: each piece begins without a gradient, and ends with what is
            # at the parameters then, whatever it is made of.
            gradient.forget()
            loss = self.loss(batch)
            size = batch[0].shape[0]
            if size < num_samples:
                loss = loss * (size / num_samples)
            loss.backward()
            gradient.take()
            if self.attached is not None:
                self._bound.take_back("loss")
            total = loss.detach() if total is None else total + loss.detach()
        gradient.end()
        if not self.is_flat:
            gradient.publish()
        assert total is not None
        return total

    def closed_form(
        self, parameters: Tensor, batches: Iterable[tuple[Tensor, ...]], num_samples: int
    ) -> tuple[Tensor, Tensor] | None:
        """``Task.gradients`` of n nodes over several batches, each tensor of shape (n, b, …); ``num_samples`` per node.

        Raises:
            ProgramError: what the task returns is of the wrong shape.
        """
        total: tuple[Tensor, Tensor] | None = None
        for batch in batches:
            result = self.task.gradients(parameters, batch)
            if result is None:
                self.has_closed_form = False
                return None
            gradients, losses = result
            if gradients.shape != parameters.shape or losses.shape != parameters.shape[:1]:
                expected = f"{list(parameters.shape)} and {list(parameters.shape[:1])}"
                message = (
                    f"gradients gives shapes {list(gradients.shape)} and {list(losses.shape)} instead of {expected}"
                )
                raise ProgramError(f"task {self.task.name}: {message}")
            if batch[0].shape[1] < num_samples:
                share = batch[0].shape[1] / num_samples
                gradients, losses = gradients * share, losses * share
            total = (gradients, losses) if total is None else (total[0] + gradients, total[1] + losses)
        return total

    @property
    def gradient(self) -> Tensor | None:
        """The flat gradient, shape (P,), −0.0 at parameters that have none; ``None`` until it is first needed."""
        return None if self._gradient is None else self._gradient.values

    @property
    def absent(self) -> frozenset[int]:
        """Parameters without a gradient, by their place in ``Layout.entries``."""
        return frozenset() if self._gradient is None else self._gradient.absent

    def no_gradient(self) -> None:
        """Let no parameter have a gradient: a step leaves all alone."""
        self._ready_gradient().none()
        if not self.is_flat:
            self.publish()

    def set_gradient(self, gradient: Tensor) -> None:
        """Copy a gradient, shape (P,), into this one, which it may share memory with."""
        self._ready_gradient().set(gradient)
        if not self.is_flat:
            self.publish()

    def publish(self) -> None:
        """Let the module's parameters have the gradient one by one."""
        self._ready_gradient().publish()

    def _ready_gradient(self) -> FlatGradient:
        if self._gradient is None:
            self._gradient = FlatGradient(self.parameters, self._places, self.layout.num_values)
        self._flat.grad = self._gradient.values
        return self._gradient

    def distinct_gradient(self) -> Tensor:
        """``gradient``, as it can be told by itself which parameters have none."""
        return self._ready_gradient().distinct()

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, samples: Samples, batch_size: int, max_batches: int | None) -> dict[str, float]:
        """Evaluate the attached node, in batches of the size that the task chooses."""
        size = answers.evaluation_batch_size(self.task, self.task.evaluation_batch_size(batch_size))
        present = getattr(samples, "present", None)
        self.mode(training=False)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        with torch.no_grad(), self._autocast():
            for number, start in enumerate(range(0, len(samples), size)):
                if max_batches is not None and number >= max_batches:
                    break
                indices = torch.arange(start, min(start + size, len(samples)))
                indices = indices if present is None else present(indices)
                if not len(indices):
                    continue
                for name, value in self._metrics(self.drawn(samples, indices)).items():
                    sums[name] = sums.get(name, 0.0) + value * len(indices)
                    # Of each on its own: where a batch has no positive sample, there is no recall.
                    counts[name] = counts.get(name, 0) + len(indices)
        self.check("metrics")
        if not counts:
            raise DataError("there are no held-out samples that can be read, or no metrics of them")
        means = {name: value / counts[name] for name, value in sums.items()}
        return answers.metrics(self.task, "summary", self.task.summary(means))

    def _metrics(self, batch: tuple[Tensor, ...]) -> dict[str, float]:
        task = self.task
        values = answers.metrics(task, "metrics", task.metrics(self.module, batch))
        if task.extra_metrics:
            predicted = task.predictions(self.module, batch)
            if predicted is None:
                what = f"the task {task.name} gives no predictions to work them out from"
                raise SettingsError(f"task.extra_metrics: {what}; leave it empty, or override Task.predictions")
            pair = answers.predictions(task, predicted)
            more = {metric.label: metric.of(*pair) for metric in task.extra_metrics}
            values = values | answers.metrics(task, "extra_metrics", more)
        return values

    def named_buffers(self, tensors: ModelTensors, buffers: Tensor | None = None) -> dict[str, Tensor]:
        """A node's buffers by name, the floating-point ones those of ``buffers``, shape (B,), if given."""
        flat = tensors.buffers if buffers is None else buffers.detach()
        floating = {
            slot.name: place.of(flat)
            for slot, place in zip(self._bound.floating, self._bound.buffer_places, strict=True)
        }
        return floating | {slot.name: one for slot, one in zip(self._bound.counting, tensors.counters, strict=True)}

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return _NO_CONTEXT


def _with_a_dimension(batches: Iterable[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(one.unsqueeze(0) for one in batch) for batch in batches]


def layout_of(module: nn.Module, dtype: torch.dtype) -> Layout:
    """Return the layout of the parameters of ``module`` that are trained; their values are not looked at."""
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    entries = (
        LayoutEntry(name, place.start, place.start + math.prod(place.shape), place.shape, _block_of(name))
        for name, place in zip(trained, consecutive(trained.values()), strict=True)
    )
    floating, _ = buffer_slots(module)
    return Layout(tuple(entries), dtype, sum(slot.tensor.numel() for slot in floating))


def _block_of(name: str) -> str:
    """The submodule that a parameter belongs to: the path up to the first number, else its first component."""
    path = name.split(".")
    for index, component in enumerate(path):
        if component.isdigit():
            return ".".join(path[: index + 1])
    return path[0] if len(path) > 1 else ""
