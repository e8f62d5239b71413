"""Gradients of the task's loss at the shared module: by autograd, or by the task's closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.tasks import Task
from starling.actors.training.flat_gradient import FlatGradient
from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from starling.actors.training.optimizers import OptimizerConfig
    from starling.actors.training.shared_module import SharedModule
    from starling.actors.training.task_loss import TaskLoss


class Gradients:
    """Holds one flat gradient, of the node whose turn it is.

    Args:
        task: has gradients in closed form, perhaps.
        config: the precision.
        shared: the module.
        loss: is differentiated.
        is_flat: the optimizer sees one flat parameter. Else the module's parameters get the gradient one by one.
    """

    def __init__(
        self, task: Task, config: OptimizerConfig, shared: SharedModule, loss: TaskLoss, *, is_flat: bool
    ) -> None:
        self._task, self._shared, self._loss, self._is_flat = task, shared, loss, is_flat
        self._gradient: FlatGradient | None = None
        """Allocated when it is first needed; nodes need it only while it is their turn."""
        # The task's own form does not know of autocast, whose bits are those of autograd's operations.
        self.has_closed_form = type(task).gradients is not Task.gradients and config.precision != "bf16"

    def differentiate(self, point: Tensor, batches: Iterable[tuple[Tensor, ...]], num_samples: int) -> Tensor:
        """Fill ``values`` with the mean gradient over several batches; return the mean loss.

        Args:
            point: what the module's parameters are bound to, shape (P,).
            batches: together ``num_samples`` samples.
            num_samples: how many; without any the gradient and the loss are zero.
        """
        gradient = self._ready()
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
            loss = self._loss.of_batch(batch)
            size = batch[0].shape[0]
            if size < num_samples:
                loss = loss * (size / num_samples)
            loss.backward()
            gradient.take()
            self._shared.take_back("loss")
            total = loss.detach() if total is None else total + loss.detach()
        gradient.end()
        if not self._is_flat:
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
            result = self._task.gradients(parameters, batch)
            if result is None:
                self.has_closed_form = False
                return None
            gradients, losses = result
            if gradients.shape != parameters.shape or losses.shape != parameters.shape[:1]:
                expected = f"{list(parameters.shape)} and {list(parameters.shape[:1])}"
                message = (
                    f"gradients gives shapes {list(gradients.shape)} and {list(losses.shape)} instead of {expected}"
                )
                raise ProgramError(f"task {self._task.name}: {message}")
            if batch[0].shape[1] < num_samples:
                share = batch[0].shape[1] / num_samples
                gradients, losses = gradients * share, losses * share
            total = (gradients, losses) if total is None else (total[0] + gradients, total[1] + losses)
        return total

    @property
    def values(self) -> Tensor | None:
        """The flat gradient, shape (P,), −0.0 at parameters that have none; ``None`` until it is first needed."""
        return None if self._gradient is None else self._gradient.values

    @property
    def absent(self) -> frozenset[int]:
        """Parameters without a gradient, by their place in ``Layout.entries``."""
        return frozenset() if self._gradient is None else self._gradient.absent

    def none(self) -> None:
        """Let no parameter have a gradient: a step leaves all alone."""
        self._ready().none()
        if not self._is_flat:
            self.publish()

    def leave_out(self, indices: Collection[int]) -> None:
        """Let parameters, by their place in ``Layout.entries``, have no gradient: a step leaves them alone."""
        self._ready().leave_out(indices)
        if not self._is_flat:
            self.publish()

    def set(self, gradient: Tensor) -> None:
        """Copy a gradient, shape (P,), into this one, which it may share memory with."""
        self._ready().set(gradient)
        if not self._is_flat:
            self.publish()

    def publish(self) -> None:
        """Let the module's parameters have the gradient one by one."""
        self._ready().publish()

    def _ready(self) -> FlatGradient:
        if self._gradient is None:
            self._gradient = FlatGradient(self._shared.parameters, self._shared.places, self._shared.layout.num_values)
        self._shared.flat.grad = self._gradient.values
        return self._gradient

    def distinct(self) -> Tensor:
        """``values``, as it can be told by itself which parameters have none."""
        return self._ready().distinct()


def _with_a_dimension(batches: Iterable[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(one.unsqueeze(0) for one in batch) for batch in batches]
