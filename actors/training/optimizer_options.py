"""An optimizer's own options: read by the types that its signature gives them, and tried in real steps.

Constructors look at few of their options: a text is true, three betas are found out in the first step. So what is
written in a configuration is held against the annotation, and the optimizer steps once on a small tensor.
"""

from __future__ import annotations

import inspect
import math
import types
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, cast, get_args, get_origin

import torch
from pydantic_core import PydanticCustomError
from torch import nn

from starling.algorithms.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

Option: TypeAlias = "bool | int | float | str | tuple[Option, ...] | None"

_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Texts read as booleans, as pydantic reads them in fields of a section (``compile: 'false'``)."""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}

_MISFIT = object()


def options_of(kind: type[Optimizer]) -> dict[str, Any]:
    """An optimizer's options and their annotations; what it would swallow as ``**kwargs`` is none."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]  # the first are the parameters
    return {one.name: one.annotation for one in parameters if one.kind != one.VAR_KEYWORD and one.name != "lr"}


def read_option(name: str, value: object, annotation: Any = inspect.Parameter.empty) -> Option:  # noqa: ANN401 - a type
    """A number, a truth value, a text, or a tuple of them, of the type that ``annotation`` asks for.

    Raises:
        PydanticCustomError: it is something else.
    """
    if not _is_plain(value):
        raise _bad(name, "a finite number, a text, or a list of them", value)
    found = _fitted(value, annotation)
    if found is _MISFIT:
        raise _bad(name, _in_words(annotation), value)
    return cast("Option", found)


def is_known_good(name: str, options: Mapping[str, Option]) -> bool:
    """Whether an optimizer takes these options for sure: common ones of SGD and Adam, in their usual ranges.

    To try others, a torch optimizer is made. The first one in a process imports torch._dynamo, which takes longer than
    all else that a process imports: 800 modules, 1.5 s, for each node.

    Args:
        name: lower case, without underscores.
        options: those that are set, as ``read_option`` gave them.
    """
    known = _GOOD.get(name)
    if known is None or not all(option in known and known[option](value) for option, value in options.items()):
        return False
    # Nesterov's momentum without a momentum is refused by torch.
    return not options.get("nesterov") or (options.get("momentum", 0) != 0 and options.get("dampening", 0) == 0)


def _is_fraction(value: Any) -> bool:  # noqa: ANN401 - an Option
    return type(value) in (int, float) and 0 <= value < 1


def _is_truth(value: Any) -> bool:  # noqa: ANN401 - an Option
    return isinstance(value, bool)


def _are_betas(value: Any) -> bool:  # noqa: ANN401 - an Option
    fits = [isinstance(one, float) and 0 <= one < 1 for one in cast("tuple[Option, ...]", value)]
    return fits == [True, True]  # a whole number among them is refused by torch


def _is_epsilon(value: Any) -> bool:  # noqa: ANN401 - an Option
    return isinstance(value, float) and _LEAST_EPSILON <= value < 1


_LEAST_EPSILON = 1e-30

_GOOD_SGD = {"momentum": _is_fraction, "dampening": _is_fraction, "weight_decay": _is_fraction, "nesterov": _is_truth}
_GOOD_ADAM = {"betas": _are_betas, "eps": _is_epsilon, "weight_decay": _is_fraction, "amsgrad": _is_truth}
_GOOD = {"sgd": _GOOD_SGD, "adam": _GOOD_ADAM, "adamw": _GOOD_ADAM}


def try_steps(kind: type[Optimizer], rate: float, options: Mapping[str, Option]) -> None:
    """Take two steps on a small matrix, at a rate of at most 1: what too high a one does depends on the model.

    Raises:
        SettingsError: with these options the optimizer fails, and without them it does not.
    """
    rate = min(rate, 1.0)
    problem = _problem(kind, rate, options)
    # Some are for tensors of other shapes than this one, which is no fault of their options.
    if problem is not None and _problem(kind, rate, {}) is None:
        raise SettingsError(f"{kind.__name__.lower()}: {problem}")


def _problem(kind: Any, rate: float, options: Mapping[str, Option]) -> str | None:  # noqa: ANN401 - each has other arguments
    # Two dimensions: some optimizers are for matrices alone.
    parameter = nn.Parameter(torch.full((2, 2), 0.5))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own optimizer says it again
            optimizer = kind([parameter], lr=rate, **options)
            for _ in range(2):
                parameter.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
                optimizer.step()
    except Exception as error:  # noqa: BLE001 - optimizers report a bad value with whatever exception they like
        return " ".join(str(error).split()) or type(error).__name__
    if not bool(parameter.isfinite().all()):
        return "a step along a gradient of 0.1 to 0.4 gives numbers that are not finite"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, cast("list[object]", value)))
    return isinstance(value, bool | int | str | None) or (isinstance(value, float) and math.isfinite(value))


def _fitted(value: Any, annotation: Any) -> Any:  # noqa: ANN401, PLR0911 - one line for each kind of type
    """``value`` as ``annotation`` wants it, or ``_MISFIT``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return _as_number(value)
    if origin in (Union, types.UnionType):
        fits = (_fitted(value, one) for one in inner)
        return next((one for one in fits if one is not _MISFIT), _MISFIT)
    if origin is Literal:
        return value if any(value == one and type(value) is type(one) for one in inner) else _MISFIT
    if origin in (tuple, list):
        return _fitted_list(value, inner, any_length=origin is list or inner[-1] is Ellipsis)
    if annotation is bool:
        known = value.lower() if isinstance(value, str) else value
        return _TRUTHS.get(known, _MISFIT) if isinstance(known, str) else known if known in (True, False) else _MISFIT
    if annotation in (int, float):
        number = _as_number(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            return _MISFIT
        if annotation is float or isinstance(number, int):
            return number
        return int(number) if number == int(number) else _MISFIT
    if annotation in (str, type(None)):
        return value if isinstance(value, annotation) else _MISFIT
    return _MISFIT  # a tensor, a function: nothing that a configuration can hold


def _fitted_list(value: Any, inner: tuple[Any, ...], *, any_length: bool) -> Any:  # noqa: ANN401 - as above
    if not isinstance(value, list | tuple):
        return _MISFIT
    values = cast("list[Any]", value)
    kinds = [inner[0]] * len(values) if any_length else list(inner)
    if len(values) != len(kinds):
        return _MISFIT
    found = tuple(_fitted(one, kind) for one, kind in zip(values, kinds, strict=True))
    return _MISFIT if any(one is _MISFIT for one in found) else found


def _as_number(value: Any) -> Any:  # noqa: ANN401 - as above
    """The number that a text is: YAML 1.1 reads 1e-4 as a text; lists one by one."""
    if isinstance(value, list | tuple):
        return tuple(map(_as_number, cast("list[Any]", value)))
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _in_words(annotation: Any) -> str:  # noqa: ANN401 - a type
    """Describe the accepted values in words.

    >>> _in_words(bool | None), _in_words(tuple[float, float])
    ('true or false, or null', 'a list of 2 numbers')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        known = [_in_words(one) for one in inner if one is not torch.Tensor]
        return ", or ".join(dict.fromkeys(known)) or "nothing that a configuration can hold"
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (tuple, list):
        if origin is list or inner[-1] is Ellipsis:
            return f"a list, each {_in_words(inner[0])}"
        what = "numbers" if all(one in (int, float) for one in inner) else "values"
        if what == "values":
            what += ": " + "; ".join(map(_in_words, inner))
            # Of a union the tensor among its members is no matter of a configuration.
            if {_in_words(one) for one in inner} == {"a number"}:
                what = "numbers"
        return f"a list of {len(inner)} {what}"
    return _WORDS.get(annotation, "left as it is: no configuration can hold its value")


def _bad(name: str, wanted: str, value: object) -> PydanticCustomError:
    text = f"{name} must be {wanted}, not {value!r}"
    return PydanticCustomError("bad_option", "{text}", {"text": text})
