"""Typed state: names and types for what an algorithm keeps in ``node.shared`` and ``node.local``.

A subclass of ``NodeState`` lists fields, and an instance of it reads and assigns the keys of one mapping::

    class Shared(NodeState):
        anchor: Tensor
        outer: OuterState

    shared = Shared(node.shared)
    shared.anchor = node.parameters.clone()  # node.shared["anchor"] = node.parameters.clone()

The instance stores nothing itself. Values are staged, checked and digested as if they were assigned to the mapping.
Several classes may view one mapping: an algorithm's, its base class's and a compressor's.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from starling.algorithms.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from starling.algorithms.node import State

_REQUIRED: Any = object()
"""Stands for the default of a field without one."""


class NodeState:
    """Base class of typed views of ``node.shared`` or ``node.local``: each annotated name is a field.

    Reading a field gives the value of its key, or the field's default while the key is missing. Assigning sets the
    key, and ``del`` removes it if it is there.

    >>> class Shared(NodeState):
    ...     model: float
    ...     rounds: int = 0
    >>> values: dict[str, State] = {}
    >>> shared = Shared(values)
    >>> shared.model = 0.5
    >>> values, shared.rounds
    ({'model': 0.5}, 0)
    >>> shared.modle = 1.0
    Traceback (most recent call last):
    AttributeError: Shared has no field 'modle' (did you mean model?)
    """

    __slots__ = ("_values",)
    _values: MutableMapping[str, State]

    def __init__(self, values: MutableMapping[str, State]) -> None:
        object.__setattr__(self, "_values", values)

    def __init_subclass__(cls) -> None:
        """Make accessors of the annotated names."""
        super().__init_subclass__()
        for name in inspect.get_annotations(cls):
            declared = vars(cls).get(name, _REQUIRED)
            setattr(cls, name, _accessor(*declared if isinstance(declared, _Field) else (name, declared)))

    def __setattr__(self, name: str, value: object) -> None:
        """Assign a field; refuse any other name."""
        if not isinstance(getattr(type(self), name, None), property):
            raise self._error(name)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - called when there is no value, and always raises
        """Say why there is no value: a misspelt name, or a field that was not assigned yet."""
        raise self._error(name)

    def _error(self, name: str) -> AttributeError:
        cls = type(self)
        fields = [field for field in dir(cls) if isinstance(getattr(cls, field), property)]
        if name in fields:
            return AttributeError(f"{cls.__name__}.{name} is read before it was assigned: assign it in init or join")
        return AttributeError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, fields)}")


class _Field(NamedTuple):
    key: str
    default: object


def field(key: str, *, default: Any = _REQUIRED) -> Any:  # noqa: ANN401 - the annotation has the type, as in dataclasses
    """Declare a field of a ``NodeState`` that is stored under another name than its own."""
    return _Field(key, default)


def _accessor(key: str, default: object) -> property:
    def get(self: Any) -> object:  # noqa: ANN401 - a method of all subclasses of NodeState
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise AttributeError(key)
        return value

    def assign(self: Any, value: State) -> None:  # noqa: ANN401 - as above
        self._values[key] = value

    def remove(self: Any) -> None:  # noqa: ANN401 - as above
        self._values.pop(key, None)

    return property(get, assign, remove)
