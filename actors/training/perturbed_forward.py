"""Losses next to a node's parameters without a copy of them: each operation takes its parameters perturbed.

``Perturbing`` stands between torch's operations and their kernels. Each operand that is a part of a node's flat
parameters is replaced by that part of θ + ε z. The perturbed part is made for the operation and freed when nothing uses
it. That covers a weight as it is, tied, transposed, sliced, through ``.data`` or in a list, in its own layer or in
another's code. So the memory besides θ is the largest tensor of one operation, and the loss has the bits of a whole θ +
ε z.

Code that bypasses torch's operations would take θ itself: kernels that were compiled into one, and values that are read
out of a parameter into Python. Both are refused.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.algorithms.layout import Layout
    from starling.algorithms.noise import Perturbed

_ALIGNMENT = 64
"""Bytes. Bits of a matrix product may depend on where in a line of the cache it begins."""

_INSTEAD = "take algorithm.perturb: copy"

_READERS: frozenset[object] = frozenset({Tensor.tolist, Tensor.numpy, Tensor.data_ptr, Tensor.untyped_storage})
"""Methods that hand out a tensor's memory without an operation."""


def check(module: nn.Module, *, compiled: bool) -> None:
    """Raise ``ProgramError`` if parts of ``module`` read their parameters by themselves."""
    if compiled:
        what = "optimizer.compile makes kernels that read parameters by themselves"
        raise ProgramError(f"parameters cannot be perturbed as they are used: {what}; set it to false, or {_INSTEAD}")
    for name, layer in module.named_modules():
        kind = None
        if isinstance(layer, torch.jit.ScriptModule):
            kind = "a ScriptModule"
        elif getattr(layer, "_compiled_call_impl", None) is not None or type(layer).__name__ == "OptimizedModule":
            kind = "compiled"
        if kind is not None:
            where = f"layer {name or type(layer).__name__} is {kind}, and reads them by itself"
            raise ProgramError(f"parameters cannot be perturbed as they are used: {where}; {_INSTEAD}")


@contextlib.contextmanager
def perturbing(flat: Tensor, layout: Layout, point: Perturbed) -> Iterator[None]:
    """Let operations take their parameters from ``point`` instead of ``flat``, shape (P,), of which they are views."""
    parameters = _Parameters(flat, layout)
    with _Reading(parameters), Perturbing(parameters, point):
        yield


class _Parameters:
    """The owners of parameter memory."""

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        self.flat = flat
        self._layout = layout
        self._low = flat.data_ptr()
        self._high = self._low + flat.nbytes

    def has(self, value: object) -> TypeGuard[Tensor]:
        """Whether it is a view of them."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return False
        return self._low <= value.data_ptr() < self._high

    def first(self, view: Tensor) -> int:
        """Place of the parameter's first value."""
        return (view.data_ptr() - self._low) // self.flat.itemsize

    def refuse(self, place: int, what: str) -> ProgramError:
        """Return the error for an operation on the parameter that has value ``place``."""
        name = next((one.name for one in self._layout.entries if one.start <= place < one.stop), "?")
        layer = name.rpartition(".")[0] or "the model itself"
        message = f"parameter {name} of layer {layer} is {what}, and cannot be perturbed as it is used; {_INSTEAD}"
        return ProgramError(message)


class Perturbing(TorchDispatchMode):
    """See the module's docstring."""

    def __init__(self, parameters: _Parameters, point: Perturbed) -> None:
        super().__init__()
        self._parameters = parameters
        self._point = point
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        """Perturbed tensors by the address of their storage; the weak reference keeps the address from reuse."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch's compiler is imported, which takes seconds and a hundred megabytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - whatever torch's operations take and return
        del types
        # What is done here is not the model's doing: ``_Reading`` need not see it.
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - torch's way to say so
            named = kwargs or {}
            for place, name in _written(func):
                value = args[place] if place < len(args) else named.get(name)
                for one in value if isinstance(value, list | tuple) else (value,):
                    self._check_written(one, f"written to by {func}")
            return func(*map(self._given, args), **{key: self._given(value) for key, value in named.items()})

    def _check_written(self, value: object, what: str) -> None:
        """A write to parameters, or to what was made of them, would be lost with it."""
        if self._parameters.has(value):
            raise self._parameters.refuse(self._parameters.first(value), what)
        if isinstance(value, Tensor) and value.layout is torch.strided:
            made = self._made.get(value.untyped_storage()._cdata)  # noqa: SLF001 - names a storage
            if made is not None:
                raise self._parameters.refuse(made[1], what)

    def _given(self, value: Any) -> Any:  # noqa: ANN401 - as above
        if isinstance(value, list | tuple):
            return type(value)(map(self._given, value))
        return self._perturbed(value) if self._parameters.has(value) else value

    def _perturbed(self, view: Tensor) -> Tensor:
        parameters = self._parameters
        first = parameters.first(view)
        size = 1 + sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
        last = first + -(-size * view.itemsize // parameters.flat.itemsize)
        if view.numel() == 0 or last <= self._point.start or first >= self._point.stop:
            return view
        if view.dtype != parameters.flat.dtype:
            raise parameters.refuse(first, f"looked at as {view.dtype}")
        center = parameters.flat[first : first + size]
        apart = first % (_ALIGNMENT // center.itemsize)
        made = torch.empty(apart + size, dtype=center.dtype, device=center.device)[apart:]
        self._point.write(made, center, first)
        storage = made.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage), first  # noqa: SLF001 - as above
        return made.as_strided(view.shape, view.stride(), made.storage_offset())


class _Reading(TorchFunctionMode):
    """Refuses what takes values out of parameters without an operation."""

    def __init__(self, parameters: _Parameters) -> None:
        super().__init__()
        self._parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - as above
        del types
        if func in _READERS and args and self._parameters.has(args[0]):
            raise self._parameters.refuse(self._parameters.first(args[0]), f"read by {func.__name__}")
        return func(*args, **(kwargs or {}))


@functools.cache
def _written(operation: Any) -> tuple[tuple[int, str], ...]:  # noqa: ANN401 - as above
    """Places and names of the arguments that an operation writes to."""
    if not isinstance(operation, torch._ops.OpOverload):  # noqa: SLF001 - the class has no other name
        what = f"{operation} is made of others"
        raise ProgramError(f"parameters cannot be perturbed as they are used: {what}; {_INSTEAD}")
    arguments = operation._schema.arguments  # noqa: SLF001 - torch's own, and stable
    return tuple(
        (place, one.name)
        for place, one in enumerate(arguments)
        if one.alias_info is not None and one.alias_info.is_write
    )
