"""The gradient of a model as one flat tensor, and which parameters have none.

Zero is not None: torch's optimizers leave a parameter without a gradient alone, and decay one whose gradient is zero. A
flat tensor writes "none" as −0.0 throughout, the number that changes nothing when it is added. So a mean over nodes is
"none" where it is for all nodes, and a gradient otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor, nn

    from starling.actors.training.bound_module import FlatRange


class FlatGradient:
    """The gradient of ``parameters``, in memory of its own.

    Args:
        parameters: of the module, each with its place in a flat tensor.
        places: theirs.
        num_values: of all of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], places: Sequence[FlatRange], num_values: int) -> None:
        self._parameters = parameters
        first = parameters[0]
        self.values: Tensor = torch.zeros(num_values, dtype=first.dtype, device=first.device)
        self._views = [place.of(self.values) for place in places]
        self._starts = torch.tensor(
            [place.start for place, one in zip(places, parameters, strict=True) if one.numel()], device=first.device
        )
        self._owners = [index for index, one in enumerate(parameters) if one.numel()]
        self.absent: frozenset[int] = frozenset()
        """Indices of the parameters without a gradient."""
        self._seen: list[bool] = []

    # --- from autograd -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the last gradient."""
        self._seen = [False] * len(self._parameters)

    def forget(self) -> None:
        """Leave the module without a gradient, as a plain loop does before each loss: code may look for one."""
        for parameter in self._parameters:
            parameter.grad = None

    def take(self) -> None:
        """Add what a backward pass has left at the parameters, whoever put it there; take it from them."""
        seen = self._seen
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.grad = None
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            if seen[index]:
                self._views[index].add_(gradient.detach())
            else:
                self._views[index].copy_(gradient.detach())
                seen[index] = True

    def end(self) -> None:
        """Write down who has none."""
        missing = [index for index, is_there in enumerate(self._seen) if not is_there]
        for index in missing:
            self._views[index].fill_(-0.0)
        self.absent = frozenset(missing)

    def leave_out(self, indices: Collection[int]) -> None:
        """Let these parameters have none, whatever was computed."""
        for index in indices:
            self._views[index].fill_(-0.0)
        self.absent |= frozenset(indices)

    # --- from elsewhere ----------------------------------------------------------------------------------------------

    def zero(self) -> None:
        """Give every parameter a gradient of zero."""
        self.values.zero_()
        self.absent = frozenset()

    def none(self) -> None:
        """Leave every parameter without a gradient."""
        self.values.fill_(-0.0)
        self.absent = frozenset(range(len(self._parameters)))

    def set(self, gradient: Tensor) -> None:
        """Copy one of shape (P,), in which −0.0 throughout a parameter is none."""
        self.values.copy_(gradient)
        self.absent = frozenset(self._marked())

    def distinct(self) -> Tensor:
        """The values, to be told from "none" by whoever gets them alone."""
        for index in self._marked():
            if index not in self.absent:
                self._views[index].add_(0.0)
        return self.values

    def _marked(self) -> list[int]:
        first = self.values.index_select(0, self._starts)
        # One look at a value of each before all of any.
        likely = ((first == 0) & first.signbit()).nonzero().flatten().tolist()
        candidates = [self._owners[one] for one in likely]
        return [one for one in candidates if bool(((view := self._views[one]) == 0).all() & view.signbit().all())]

    def publish(self) -> None:
        """Let the parameters have it as ``grad``, for an optimizer that takes them one by one."""
        for index, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
            parameter.grad = None if index in self.absent else view
