"""Staged state: assignments of a program become current when its round commits, all of them or none."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from starling.actors.replica.digest import digest_state, leaves
from starling.algorithms.errors import ProgramError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starling.algorithms.api import State

_Held: TypeAlias = "tuple[State, tuple[int, ...]]"
"""A value, and the version counters that its tensors had when it was assigned."""


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size: whole values are compared ten times as fast as their bytes."""


class StagedState(MutableMapping[str, "State"]):
    """A mapping with a committed and a staged layer. Reads see the round's own writes.

    Values are replaced, never written in place. A commit must not change values that were read before, and a rollback
    must find the old bits. Nodes of one process also share tensors. Containers refuse to be written to; tensors cannot,
    so their version counters are looked at when the round ends.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._committed: dict[str, _Held] = {}
        self._staged: dict[str, _Held] = {}
        self._removed: set[str] = set()
        self._aliases: frozenset[int] = frozenset()

    def is_finite(self) -> bool:
        """Whether all floating-point tensors are finite, those that are staged included."""
        found = (leaf for leaf in self.leaves().values() if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return all(bool(leaf.isfinite().all()) for leaf in found)

    def forbid_aliases_of(self, *tensors: Tensor) -> None:
        """Refuse values that share memory with ``tensors``, which are written in place."""
        self._aliases = frozenset(_storage(tensor) for tensor in tensors if tensor.numel())

    def __getitem__(self, key: str) -> State:
        if key in self._staged:
            return self._staged[key][0]
        if key in self._committed and key not in self._removed:
            return self._committed[key][0]
        raise KeyError(key)

    def __setitem__(self, key: str, value: State) -> None:
        frozen = self._freeze(value, key)
        self._staged[key] = frozen, _versions(frozen)
        self._removed.discard(key)

    def _freeze(self, value: State, path: str) -> State:
        """Check a value, and make its containers read-only."""
        match value:
            case Tensor():
                if value.numel() and _storage(value) in self._aliases:
                    message = f"node.{self._label}[{path!r}] shares memory with the parameters; assign a clone()"
                    raise ProgramError(message)
                return value
            case bool() | int() | float() | str() | None:
                return value
            case list():
                return _FrozenList(self._freeze(child, f"{path}/{index}") for index, child in enumerate(value))
            case dict() if all(isinstance(key, str) for key in value):
                return _FrozenDict({key: self._freeze(child, f"{path}/{key}") for key, child in value.items()})
            case dict():
                message = f"node.{self._label}[{path!r}] has keys that are not texts: {listed(value)}"
                raise ProgramError(message)
            case _:
                kinds = "tensors, numbers, texts, None, and lists and dicts of them"
                message = f"node.{self._label}[{path!r}] is a {type(value).__name__}; it may hold {kinds}"
                raise ProgramError(message)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._staged.pop(key, None)
        self._removed.add(key)

    def __iter__(self) -> Iterator[str]:
        yield from self._staged
        yield from (key for key in self._committed if key not in self._staged and key not in self._removed)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check_unwritten(self) -> None:
        """Raise ``ProgramError`` if a tensor was written in place since it was assigned."""
        # Also what the round replaced: its old bits are what a rollback goes back to.
        for layer in (self._committed, self._staged):
            for key, (value, versions) in layer.items():
                if _versions(value) != versions:
                    message = f"node.{self._label}[{key!r}] was written in place; assign a new tensor instead"
                    raise ProgramError(message)

    def commit(self) -> None:
        """Make the staged layer current."""
        if not self._staged and not self._removed:
            return
        self._committed.update(self._staged)
        for key in self._removed:
            self._committed.pop(key, None)
        self._staged, self._removed = {}, set()

    def rollback(self) -> None:
        """Drop the staged layer."""
        self._staged, self._removed = {}, set()

    def committed(self) -> dict[str, State]:
        """Return the committed values."""
        return {key: value for key, (value, _) in self._committed.items()}

    def replace(self, values: Mapping[str, State]) -> None:
        """Make ``values`` all that there is, committed."""
        self._committed, self._staged, self._removed = {}, {}, set()
        self.update(values)
        self.commit()

    def adopt(self, other: StagedState) -> None:
        """Alias the committed values of ``other``, which are equal to the last bit, and drop the own copy."""
        self._committed = dict(other._committed)

    def leaves(self) -> dict[str, State]:
        """Return the visible leaves, committed and staged, by path."""
        return dict(leaves(dict(self)))

    def equals(self, other: StagedState) -> bool:
        """Whether both hold the same bits."""
        return same_bits(self.leaves(), other.leaves())

    def digest(self) -> str:
        """Return the digest of the visible state, committed and staged."""
        return digest_state(dict(self))


def _refuse(*_: object, **__: object) -> NoReturn:
    message = "what node.shared and node.local hold is not written in place; change a copy, and assign that"
    raise ProgramError(message)


def _read_only(kind: Any, *writers: str) -> Any:  # noqa: ANN401 - dict or list, in and out
    """A subclass whose instances cannot be written to; copies of them, deep ones too, are plain again."""
    members = dict.fromkeys(writers, _refuse) | {"__reduce__": lambda self: (kind, (kind(self),))}
    return type(f"Frozen{kind.__name__.title()}", (kind,), members)


_FrozenDict = _read_only(
    dict, "__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"
)
_FrozenList = _read_only(
    list,
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove"),
    *("reverse", "sort"),
)


def same_bits(mine: Mapping[str, State], theirs: Mapping[str, State]) -> bool:
    """Whether the leaves of two states are the same bits; cheaper than two digests where both live in one process."""
    return mine.keys() == theirs.keys() and all(_same(leaf, theirs[path]) for path, leaf in mine.items())


def _same(one: State, other: State) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_form = (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        # Compared as integers: NaN equals itself then, and -0.0 is not 0.0, as in a digest.
        return one is other or (same_form and torch.equal(_integers(one), _integers(other)))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    # Equal floats may be 0.0 and -0.0, or NaN; of one type, anything else that is equal is written alike.
    if type(one) is type(other) and not isinstance(one, float) and one == other:
        return True
    return json.dumps(one) == json.dumps(other)


def _integers(tensor: Tensor) -> Tensor:
    integer = _INTEGERS.get(tensor.dtype.itemsize)
    return tensor.contiguous().reshape(-1).view(torch.uint8) if integer is None else tensor.view(integer)


def _versions(value: State) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return (value._version,)  # noqa: SLF001 - as below
    return tuple(leaf._version for _, leaf in leaves(value) if isinstance(leaf, Tensor))  # noqa: SLF001 - torch's counter


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
