"""The one module that the nodes of a process share, bound to one node's tensors at a time.

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

from starling.actors.training import perturbed_forward
from starling.actors.training.bound_module import BoundModule, buffer_slots, consecutive
from starling.actors.training.module_init import compile_in_place, initial_module
from starling.actors.training.slab import ModelTensors, aligned
from starling.algorithms.errors import ProgramError
from starling.algorithms.layout import Layout, LayoutEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starling.actors.tasks import Task
    from starling.actors.training.optimizers import OptimizerConfig
    from starling.algorithms.noise import Perturbed

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Dtype of the master weights by ``optimizer.precision``; bf16 is autocast over fp32 master weights."""

_MAX_KEPT_VIEWS = 16
"""Most parameter views that a node keeps: attaching a view is faster than making it, and a view takes 400 bytes."""


class SharedModule:
    """Binds the task's module to one node's tensors at a time.

    Args:
        task: builds the module.
        config: its dtype, and whether it is compiled.
        seed: of the initial values.
        device: of the module.
    """

    def __init__(self, task: Task, config: OptimizerConfig, seed: int, device: torch.device) -> None:
        self.device = device
        self.dtype = DTYPES[config.precision]
        self._build: Callable[[], nn.Module] = lambda: initial_module(task, seed, device, self.dtype).to(device=device)
        self._is_compiled = config.compile
        self.module = self._build()
        if config.compile:
            compile_in_place(self.module, device)
        self._bound = BoundModule(self.module, task.name)
        self.parameters = self._bound.parameters
        self.places = self._bound.places
        """Shape, stride and offset of each parameter in a flat tensor."""
        # One flat tensor instead of many: the same bits, and one kernel instead of one per layer.
        self.flat = nn.Parameter(torch.empty(0, dtype=self.dtype, device=device))
        """All parameters of the attached node as one flat tensor, shape (P,)."""
        self.layout = layout_of(self.module, self.dtype)
        self.attached: ModelTensors | None = None
        self._is_fresh = True
        """Whether the module has its initial values, which it has until the first node is attached."""

    def initialize(self, parameters: Tensor, buffers: Tensor) -> list[Tensor]:
        """Write the initial values into flat tensors; return the counters."""
        module = self.module if self._is_fresh else self._build()
        trainable = self.parameters if self._is_fresh else [one for one in module.parameters() if one.requires_grad]
        for place, parameter in zip(self.places, trainable, strict=True):
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
            views = tensors.views or [place.of(tensors.parameters) for place in self.places]
            if len(views) <= _MAX_KEPT_VIEWS:
                tensors.views[:] = views
            self._bind(tensors.parameters, views)
            self._bound.bind_buffers(tensors.buffers, tensors.counters)
            self.attached = tensors
            self._is_fresh = False

    def _bind(self, parameters: Tensor, views: Sequence[Tensor]) -> None:
        self._bound.bind(views)
        self.flat.data = parameters

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
        self._bind(point, [place.of(point) for place in self.places])
        self._bound.bind_buffers(statistics, counters)
        try:
            yield point
        finally:
            self.attach(tensors)

    def perturbed(self, tensors: ModelTensors, point: Perturbed) -> contextlib.AbstractContextManager[None]:
        """Compute at a point next to a node's parameters, without a copy; ``ProgramError`` if the module cannot."""
        perturbed_forward.check(self.module, compiled=self._is_compiled)
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
            self.take_back(method)
        self._bound.check(method)

    def take_back(self, method: str) -> None:
        """Copy tensors that the task's ``method`` put in place of the attached node's into these; see ``BoundModule``.

        Raises:
            ProgramError: one has another shape or type.
        """
        if self.attached is not None:
            self._bound.take_back(method)

    def named_buffers(self, tensors: ModelTensors, buffers: Tensor | None = None) -> dict[str, Tensor]:
        """A node's buffers by name, the floating-point ones those of ``buffers``, shape (B,), if given."""
        flat = tensors.buffers if buffers is None else buffers.detach()
        floating = {
            slot.name: place.of(flat)
            for slot, place in zip(self._bound.floating, self._bound.buffer_places, strict=True)
        }
        return floating | {slot.name: one for slot, one in zip(self._bound.counting, tensors.counters, strict=True)}


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
