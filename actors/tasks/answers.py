"""Checks what a task's methods return; an error names task, method, the wanted type and the given one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset, IterableDataset

from starling.actors.tasks.datasets import DatasetSamples
from starling.algorithms.errors import DataError, ProgramError, SettingsError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.actors.data.samples import Samples
    from starling.actors.tasks.base import Task

_SAMPLES = (
    "Samples: TensorSamples(inputs, targets), a map-style torch Dataset, or an object with owners, len() and batch()"
)


def samples(task: Task, method: str, given: Any) -> Samples:  # noqa: ANN401 - whatever a user's method returns
    """Check and return the samples that ``method`` gave; a torch ``Dataset`` is wrapped.

    Raises:
        DataError: it is something else.
    """
    where = f"task {task.name}: {method}"
    found: Any = given
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset) and not hasattr(found, "batch"):
        found = DatasetSamples(cast("Dataset[Any]", given))
    lacks = [name for name in ("owners", "__len__", "batch") if not hasattr(found, name)]
    if lacks or isinstance(given, DataLoader | IterableDataset):
        without = f" without {' and '.join(lacks)}" if hasattr(given, "batch") else ""
        raise DataError(f"{where} must give {_SAMPLES}; it gives {_kind(given)}{without}")
    try:
        count = len(found)
    except TypeError as error:
        raise DataError(f"{where} gives {_kind(given)}, which does not say how many samples it has: {error}") from None
    owners: object = found.owners
    if owners is not None and not (isinstance(owners, Tensor) and owners.shape == (count,) and _is_whole(owners)):
        raise DataError(f"{where}: owners must be None or node indices, int64 of shape [{count}], not {_kind(owners)}")
    labels: object = getattr(found, "labels", None)
    if labels is not None and not (isinstance(labels, Tensor) and labels.shape == (count,) and _is_whole(labels)):
        raise DataError(f"{where}: labels must be None or classes, int64 of shape [{count}], not {_kind(labels)}")
    return found


def module(task: Task, given: Any) -> nn.Module:  # noqa: ANN401 - as above
    """Check and return the module that ``build`` gave.

    Raises:
        SettingsError: it is no module, or one that cannot be trained here.
    """
    where = f"task {task.name}: build()"
    if not isinstance(given, nn.Module):
        raise SettingsError(f"{where} must give a torch.nn.Module; it gives {_kind(given)}")
    for name, one in (*given.named_parameters(), *given.named_buffers()):
        if isinstance(one, UninitializedBuffer | UninitializedParameter):
            raise SettingsError(f"{where} leaves {name} of a lazy layer without a shape; call the model once there")
        if one.is_meta:
            raise SettingsError(
                f"{where} leaves {name} on the meta device, without values; load or initialise it there"
            )
    trained = {name: one for name, one in given.named_parameters() if one.requires_grad}
    if not trained:
        raise SettingsError(f"{where} gives a model without trainable parameters: all are frozen, or there are none")
    for name, one in trained.items():
        if one.is_complex():
            what = f"{where} gives the parameter {name} in {_dtype(one)}, and complex parameters cannot be trained here"
            raise SettingsError(f"{what}; hold real and imaginary parts, and put them together: torch.view_as_complex")
    _check_memory(where, given, trained)
    return given


def _check_memory(where: str, given: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Refuse what shares memory with a trained parameter without being it: it would not any more."""
    others = {**dict(given.named_parameters()), **dict(given.named_buffers())}
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes, name) for name, one in others.items() if one.numel())
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        is_whole = others[name].is_contiguous() and others[other].is_contiguous()
        if start < end and is_whole and (name in trained or other in trained):
            what = f"{where} lets {name} and {other} share memory, and what is trained has memory of its own"
            raise SettingsError(f"{what}; to tie parameters, let both layers have the same Parameter")


def converted(task: Task, given: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module on ``device``, its floating-point numbers as ``dtype``; whole and complex ones as they are.

    Raises:
        SettingsError: values would be rounded.
    """
    for name, one in (*given.named_parameters(), *given.named_buffers()):
        if one.is_floating_point() and one.dtype.itemsize > dtype.itemsize and not _is_exact(one, dtype):
            what = f"task {task.name}: build() gives {name} in {_dtype(one)}, and optimizer.precision would round it"
            raise SettingsError(f"{what} to {str(dtype).removeprefix('torch.')}; do so in build(), or take fp64")
    # Not Module.to(dtype=…), which makes real numbers of complex ones.
    return given._apply(lambda one: one.to(device, dtype if one.is_floating_point() else None))  # noqa: SLF001 - what to() is made of


def _is_exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    values = tensor.detach()
    return bool(((values.to(dtype).to(values.dtype) == values) | values.isnan()).all())


def batch(task: Task, given: Any, size: int | None = None) -> tuple[Tensor, ...]:  # noqa: ANN401 - as above
    """Check and return the batch that ``Samples.batch`` gave, of ``size`` rows.

    Raises:
        ProgramError: it is no tuple of tensors with a row for each.
    """
    tensors = cast("tuple[Any, ...]", given)
    if isinstance(given, tuple | list) and given:
        first = tensors[0]
        rows = len(first) if isinstance(first, Tensor) and first.dim() else -1
        if all(isinstance(one, Tensor) and one.dim() and len(one) == rows for one in tensors) and (
            size is None or rows == size
        ):
            return tuple(tensors)
    parts = listed(map(_kind, tensors)) if isinstance(given, tuple | list) and given else _kind(given)
    wanted = f"a tuple of tensors with {'as many' if size is None else size} rows each"
    raise ProgramError(f"task {task.name}: batch() of its samples must give {wanted}; it gives {parts}")


def loss(task: Task, given: Any, *, is_differentiated: bool) -> Tensor:  # noqa: ANN401 - as above
    """Check and return the loss that ``loss`` gave, of shape ().

    Raises:
        ProgramError: it is no scalar that can be differentiated.
    """
    if isinstance(given, Tensor) and given.numel() == 1 and given.is_floating_point():
        if given.requires_grad or not is_differentiated:
            return given if given.dim() == 0 else given.reshape(())
        why = "does not depend on the trainable parameters: it was detached, or computed without gradients"
        raise ProgramError(f"task {task.name}: what loss() gives {why}")
    raise _refusal(task, "loss", _LOSS, given, _hint(given))


_LOSS = "the mean loss, a tensor with one floating-point number"


def _hint(given: object) -> str:
    if isinstance(given, Tensor) and given.numel() > 1:
        return "; take its mean"
    return " (is a return missing?)" if given is None else ""


def metrics(task: Task, method: str, given: Any) -> dict[str, float]:  # noqa: ANN401 - as above
    """Check the metrics that ``method`` gave; return them as numbers by name.

    Raises:
        ProgramError: a name is no text, or a value no number.
    """
    if not isinstance(given, dict):
        raise _refusal(task, method, "a dict of names and numbers", given, _hint(given))
    found: dict[str, float] = {}
    for name, value in cast("dict[Any, Any]", given).items():
        is_number = isinstance(value, int | float) or (hasattr(value, "__float__") and not isinstance(value, Tensor))
        if isinstance(value, Tensor):
            is_number = value.numel() == 1 and not value.is_complex()
        if not isinstance(name, str):
            raise _refusal(task, method, "texts as names", name)
        if not is_number:
            raise _refusal(task, method, f"one number as {name!r}", value)
        found[name] = float(value.detach() if isinstance(value, Tensor) else value)
    return found


def predictions(task: Task, given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - as above
    """Check and return the outputs and targets that ``predictions`` gave.

    Raises:
        ProgramError: it is no pair of tensors with as many rows.
    """
    pair = cast("tuple[Any, ...]", given)
    if isinstance(given, tuple | list) and len(pair) == 2 and all(isinstance(one, Tensor) for one in pair):
        outputs, targets = cast("tuple[Tensor, Tensor]", tuple(pair))
        if outputs.dim() and targets.dim() and len(outputs) == len(targets):
            return outputs, targets
    parts = listed(map(_kind, pair)) if isinstance(given, tuple | list) and pair else _kind(given)
    raise ProgramError(f"task {task.name}: predictions() must give outputs and targets, row by row; it gives {parts}")


def evaluation_batch_size(task: Task, given: Any) -> int:  # noqa: ANN401 - as above
    """Check and return the batch size that ``evaluation_batch_size`` gave.

    Raises:
        ProgramError: it is no positive number.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise _refusal(task, "evaluation_batch_size", "a whole number of at least 1", given)
    return given


def _refusal(task: Task, method: str, wanted: str, given: object, hint: str = "") -> ProgramError:
    return ProgramError(f"task {task.name}: {method}() must give {wanted}; it gives {_kind(given)}{hint}")


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(given: object) -> str:
    """Return the type of ``given`` for an error: dtype and shape of a tensor, else its class."""
    if isinstance(given, Tensor):
        return f"a tensor of {_dtype(given)} and shape {list(given.shape)}"
    if given is None:
        return "None"
    if isinstance(given, tuple | list):
        return f"a {type(given).__name__} of {len(cast('tuple[Any, ...]', given))}"
    kind = type(given)
    what = f"{kind.__name__}" if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{what} {given!r}" if isinstance(given, bool | int | float | str | complex) else what
