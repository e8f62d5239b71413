"""A node's optimizer: an object of torch's, or its update on flat tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from starling.actors.training import optimizer_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from starling.actors.training.workbench import Workbench
    from starling.algorithms.api import State


class NodeOptimizer:
    """A node's optimizer: its moments, or an object of torch's kind, made when they are first needed.

    It takes the parameters as one flat tensor, where that gives equal bits, until a parameter has no gradient. Torch
    leaves such a parameter and its moments alone, so that each parameter has a state of its own from then on.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._object: Optimizer | None = None
        self.moments: dict[str, Tensor] = {}
        """Moments of an optimizer in ``_UPDATES``, each of shape (P,)."""
        self.age = 0
        """Steps since it was fresh."""
        self.is_one_by_one = False
        """Whether what was one flat parameter has become many."""

    def step(self, parameters: Tensor, rate: float) -> None:
        """Take one step of the node that is attached, along the workbench's gradient; ``parameters`` are its own."""
        optimizers, gradients = self._bench.optimizers, self._bench.gradients
        update, gradient, absent = optimizers.update, gradients.values, gradients.absent
        assert gradient is not None
        if len(absent) == len(self._bench.shared.parameters):
            return  # torch's optimizers would leave all alone
        if absent and optimizers.is_flat and not self.is_one_by_one:
            self._take_apart()
        if update is not None and not self.is_one_by_one:
            update(parameters, gradient, self.moments, self.age, rate)
        else:
            if self.is_one_by_one:
                gradients.publish()
            if self._object is None:
                self._object = optimizers.make(one_by_one=self.is_one_by_one)
            for group in self._object.param_groups:
                group["lr"] = rate
            self._object.step()
        self.age += 1

    def _take_apart(self) -> None:
        """Go on with a state for each parameter, which is its part of the one there was."""
        bench = self._bench
        if self._object is not None:
            kept = optimizer_state.packed(self._object)
        else:
            # Adam's objects count for themselves, from 1 as here.
            counted = {"step": torch.tensor(float(self.age))} if "exp_avg" in self.moments else {}
            kept = {"state": {"0": self.moments | counted} if self.moments else {}, "groups": None}
        self._object = bench.optimizers.make(one_by_one=True)
        optimizer_state.unpack(self._object, optimizer_state.taken_apart(kept, bench.shared.layout))
        self.moments, self.is_one_by_one = {}, True

    def aged(self, steps: int, moments: dict[str, Tensor]) -> None:
        """Count ``steps`` more steps, and copy the moments that they left."""
        self.age += steps
        for name, moment in moments.items():
            if name in self.moments:
                self.moments[name].copy_(moment)
            else:
                self.moments[name] = moment.clone()

    def reset(self) -> None:
        """Reset the optimizer: the next step is its first."""
        self._object, self.moments, self.age, self.is_one_by_one = None, {}, 0, False

    def state(self) -> State:
        """Return a copy of the optimizer's state, for ``load``.

        Raises:
            ProgramError: it remembers something that is no tensor, number or text.
        """
        moments = {name: moment.clone() for name, moment in self.moments.items()}
        kept = None if self._object is None else optimizer_state.packed(self._object)
        apart = {"one_by_one": True} if self.is_one_by_one else {}
        return {"age": self.age, "moments": moments, "object": kept} | apart

    def load(self, state: State) -> None:
        """Load the state of another optimizer, or of this one at another time."""
        kept = cast("dict[str, Any]", state)
        self.age = kept["age"]
        self.moments = {name: moment.clone() for name, moment in kept["moments"].items()}
        self._object = None
        self.is_one_by_one = kept.get("one_by_one", False)
        if kept["object"] is not None:
            self._object = self._bench.optimizers.make(one_by_one=self.is_one_by_one)
            optimizer_state.unpack(self._object, kept["object"])
