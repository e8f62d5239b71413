"""A module bound to flat tensors, and repaired after a user's code has had it.

In a plain training loop, loop and model share one set of tensors, and models rely on that. They put new values in place
of old ones (``self.running = …``, ``weight.data = …``), leave layers in evaluation mode, and swap parameters. Here the
tensors are a node's, the module is that of many nodes, and neither may notice. So after such code ran what it put in
place of a node's tensors is copied into them, and what cannot be made good is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LOOKED_AT = 256
"""Values of a frozen tensor that are compared: enough to notice a moving average, few enough for large models."""


@dataclass(frozen=True)
class FlatRange:
    """The range of a flat tensor that holds one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)


class BoundModule:
    """See the module's docstring.

    Args:
        module: its trainable parameters are those that require a gradient now.
        task: its name, for messages.
    """

    def __init__(self, module: nn.Module, task: str) -> None:
        self.module = module
        self._task = task
        named = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.names = list(named)
        self.parameters = list(named.values())
        self.places = consecutive(self.parameters)
        self.floating, self.counting = buffer_slots(module)
        self.buffer_places = consecutive([slot.tensor for slot in self.floating])
        self._views: list[Tensor] = [one.data for one in self.parameters]
        self._buffers = [slot.tensor for slot in (*self.floating, *self.counting)]
        self._modules = list(module.modules())
        self._modes: dict[bool, list[bool]] = {}
        self._all_parameters = dict(module.named_parameters(remove_duplicate=False))
        self._state = _state_names(module)
        self._frozen = {name: one for name, one in module.named_parameters() if name not in named}
        self._frozen_bits = {name: _first_bits(one) for name, one in self._frozen.items()}

    # --- binding -----------------------------------------------------------------------------------------------------

    def bind(self, views: Sequence[Tensor]) -> None:
        """Bind the parameters to views of a node's tensor."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
        self._views = list(views)
        # A graph that was made at one node's parameters and is differentiated in another's turn would give a gradient
        # of neither; with this, autograd refuses it.
        torch.autograd.graph.increment_version(self.parameters)

    def bind_buffers(self, flat: Tensor, counters: Sequence[Tensor]) -> None:
        """Bind the floating-point buffers to parts of ``flat``, and the others to ``counters``."""
        self._buffers = [*(place.of(flat) for place in self.buffer_places), *counters]
        for slot, tensor in zip((*self.floating, *self.counting), self._buffers, strict=True):
            if not slot.is_loose:
                slot.tensor = tensor

    def mode(self, *, training: bool) -> None:
        """Put the module into training or evaluation mode, whichever layers a user's code has put into another."""
        if self._modes.get(training) != [one.training for one in self._modules]:
            self.module.train(training)
            # What a model's own train() leaves in the other mode is meant to be there.
            self._modes[training] = [one.training for one in self._modules]

    # --- after a user's code ran -------------------------------------------------------------------------------------

    def take_back(self, method: str) -> None:
        """Copy tensors that replaced bound ones into the bound ones, and bind these again.

        Args:
            method: of the task, for messages.

        Raises:
            ProgramError: it has another shape or type.
        """
        # Addresses are no values: who perturbs parameters as they are used has nothing to do with them.
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - torch's way to say so
            addresses = [
                (parameter.data_ptr(), own.data_ptr())
                for parameter, own in zip(self.parameters, self._views, strict=True)
            ]
            known = {own for _, own in addresses}
        for name, parameter, own, (address, bound) in zip(
            self.names, self.parameters, self._views, addresses, strict=True
        ):
            if address != bound or parameter.shape != own.shape:
                if parameter.shape != own.shape or parameter.dtype != own.dtype:
                    self._refuse(method, f"parameter {name}", own, parameter)
                if address in known:
                    what = f"parameter {name} shares the memory of another now; tie them in build()"
                    raise ProgramError(f"task {self._task}: after {method} {what}")
                own.copy_(parameter.detach())
                parameter.data = own
        for slot, own in zip((*self.floating, *self.counting), self._buffers, strict=True):
            found = slot.given
            if found is own or slot.is_loose:
                continue
            if not isinstance(found, Tensor) or not _holds(own, found):
                if not slot.is_state:
                    slot.is_loose = True  # a cache that has grown: its module's business
                    continue
                self._refuse(method, f"buffer {slot.name}", own, found)
            own.copy_(found.detach())
            slot.tensor = own

    def drop(self) -> None:
        """Bind the bound tensors again, and drop what replaced them."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view
        for slot, own in zip((*self.floating, *self.counting), self._buffers, strict=True):
            if not slot.is_loose:
                slot.tensor = own

    def check(self, method: str) -> None:
        """Check the unbound state of the module.

        Raises:
            ProgramError: a parameter was replaced, added or unfrozen, the values of a frozen one changed, or the
                module's state has another member.
        """
        where = f"task {self._task}: after {method} the model"
        found = dict(self.module.named_parameters(remove_duplicate=False))
        for name, one in found.items():
            if self._all_parameters.get(name) is not one:
                what = "another parameter" if name in self._all_parameters else "a new parameter"
                text = f"{where} has {what} {name}, which is not trained; make all in build(), and write new values"
                raise ProgramError(f"{text} into them: with torch.no_grad(): parameter.copy_(…)")
        gone = self._all_parameters.keys() - found.keys()
        if gone:
            raise ProgramError(f"{where} has no parameter {min(gone)} any more; make in build() what is to be trained")
        for name, one in self._frozen.items():
            if one.requires_grad:
                what = f"{where} has parameter {name} unfrozen, which is not trained: it was frozen in build()"
                raise ProgramError(f"{what}; let it require a gradient there, and freeze it in the loss")
            if _first_bits(one) != self._frozen_bits[name]:
                what = f"{where} has other values in parameter {name}, which is frozen and the same for all nodes"
                raise ProgramError(f"{what}; make it a buffer, which is a node's own, or let it require a gradient")
        others = _state_names(self.module) ^ self._state
        if others:
            name = min(others)
            what = "a new buffer" if name not in self._state else "no buffer"
            raise ProgramError(f"{where} has {what} {name}; register buffers in build(), with a value of their shape")

    def _refuse(self, method: str, what: str, own: Tensor, found: object) -> NoReturn:
        given = _form(found) if isinstance(found, Tensor) else type(found).__name__
        text = f"task {self._task}: after {method} {what} is {given}, and was {_form(own)} when the model was built"
        raise ProgramError(f"{text}; put values of the same form in its place, or write into it")


class _BufferSlot:
    """A buffer's place in its submodule."""

    def __init__(self, name: str, owner: nn.Module, attribute: str, *, is_state: bool) -> None:
        self.name = name
        self.is_state = is_state
        """Whether the slot is in the module's state dict."""
        self.is_loose = False
        """Whether no node owns the slot: the module may change the value freely."""
        self._buffers: dict[str, Any] = owner._buffers  # noqa: SLF001 - the only way to rebind one
        self._attribute = attribute

    @property
    def given(self) -> object:
        """The value in the slot."""
        return self._buffers.get(self._attribute)

    @property
    def tensor(self) -> Tensor:
        return self._buffers[self._attribute]

    @tensor.setter
    def tensor(self, value: Tensor) -> None:
        self._buffers[self._attribute] = value


def buffer_slots(module: nn.Module) -> tuple[list[_BufferSlot], list[_BufferSlot]]:
    """Return the slots of floating-point buffers, and the slots of all other buffers.

    A buffer outside of the module's state (the frequencies of rotary positions, say) is among the others. Nodes average
    floating-point buffers, and a mean of equal numbers may differ from them in its last bit.
    """
    floating: list[_BufferSlot] = []
    counting: list[_BufferSlot] = []
    state = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        owner, _, attribute = name.rpartition(".")
        slots = floating if buffer.is_floating_point() and name in state else counting
        slots.append(_BufferSlot(name, module.get_submodule(owner), attribute, is_state=name in state))
    return floating, counting


def consecutive(tensors: Iterable[Tensor]) -> list[FlatRange]:
    """Places for tensors one after another."""
    places: list[FlatRange] = []
    start = 0
    for tensor in tensors:
        shape = tuple(tensor.shape)
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        places.append(FlatRange(shape, stride, start))
        start += tensor.numel()
    return places


def _state_names(module: nn.Module) -> frozenset[str]:
    """Names of the buffers that are saved."""
    return frozenset(
        f"{prefix}.{attribute}" if prefix else attribute
        for prefix, owner in module.named_modules()
        for attribute, buffer in owner._buffers.items()  # noqa: SLF001 - named_buffers leaves out which are saved
        if buffer is not None and attribute not in owner._non_persistent_buffers_set  # noqa: SLF001 - as above
    )


def _holds(own: Tensor, found: Tensor) -> bool:
    """Whether the values of ``found`` are the same in ``own``."""
    if own.shape != found.shape or own.device != found.device:
        return False
    are_floats = own.is_floating_point() and found.is_floating_point()
    return own.dtype == found.dtype or (are_floats and torch.promote_types(own.dtype, found.dtype) == own.dtype)


def _first_bits(tensor: Tensor) -> bytes:
    """The first values, without a copy of all; empty where they cannot be had without one."""
    if not tensor.is_contiguous() or tensor.layout is not torch.strided or tensor.is_quantized:
        return b""
    first = tensor.detach().view(-1)[:_LOOKED_AT]
    first = torch.view_as_real(first) if first.is_complex() else first
    return first.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
