"""Staged state: what a program assigns becomes current when its round commits, all of it or nothing."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from actors.digest import digest_state, leaves
from algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from algorithms.api import State


class StagedState(MutableMapping[str, "State"]):
    """A mapping with a committed and a staged layer. Reads see the round's own writes.

    Tensors are replaced, never written in place: a tensor that was read before a commit must not change by it, and
    a rollback must find the old bits.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._committed: dict[str, State] = {}
        self._staged: dict[str, State] = {}
        self._removed: set[str] = set()
        self._versions: dict[str, list[int]] = {}
        self._aliases: frozenset[int] = frozenset()

    def forbid_aliases_of(self, *tensors: Tensor) -> None:
        """Refuse values that share memory with ``tensors``, which are written in place."""
        self._aliases = frozenset(_storage(tensor) for tensor in tensors if tensor.numel())

    def __getitem__(self, key: str) -> State:
        if key in self._staged:
            return self._staged[key]
        if key in self._committed and key not in self._removed:
            return self._committed[key]
        raise KeyError(key)

    def __setitem__(self, key: str, value: State) -> None:
        for path, leaf in leaves(value, key):
            if isinstance(leaf, Tensor):
                if leaf.numel() and _storage(leaf) in self._aliases:
                    message = f"node.{self._label}[{path!r}] shares memory with the parameters; assign a clone()"
                    raise ProgramError(message)
            elif not isinstance(leaf, bool | int | float | str | dict | list | None):
                message = f"node.{self._label}[{path!r}] is a {type(leaf).__name__}; tensors, numbers, texts, None only"
                raise ProgramError(message)
        self._staged[key] = value
        self._removed.discard(key)
        self._versions[key] = _versions(value)

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
        for key, value in self.items():
            if _versions(value) != self._versions[key]:
                message = f"node.{self._label}[{key!r}] was written in place; assign a new tensor instead"
                raise ProgramError(message)

    def commit(self) -> None:
        """Make the staged layer current."""
        self._committed.update(self._staged)
        for key in self._removed:
            self._committed.pop(key, None)
            self._versions.pop(key, None)
        self._staged, self._removed = {}, set()

    def rollback(self) -> None:
        """Drop the staged layer."""
        for key in self._staged:
            if key in self._committed:
                self._versions[key] = _versions(self._committed[key])
        self._staged, self._removed = {}, set()

    def adopt(self, other: StagedState) -> None:
        """Alias the committed values of ``other``, which are equal to the last bit, and drop the own copy."""
        self._committed = dict(other._committed)  # noqa: SLF001 - the same class
        self._versions = dict(other._versions)  # noqa: SLF001

    def equals(self, other: StagedState) -> bool:
        """Whether both hold the same bits; cheaper than two digests where both live in one process."""
        mine, theirs = dict(leaves(dict(self))), dict(leaves(dict(other)))
        return mine.keys() == theirs.keys() and all(_same(leaf, theirs[path]) for path, leaf in mine.items())

    def digest(self) -> str:
        """Digest of what a reader sees: committed and staged."""
        return digest_state(dict(self))


def _same(one: State, other: State) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one is other:
            return True
        same_form = one.dtype == other.dtype and one.shape == other.shape
        # Compared as integers: NaN equals itself then, and -0.0 is not 0.0, as in a digest.
        return same_form and torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and one == other


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def _versions(value: State) -> list[int]:
    return [leaf._version for _, leaf in leaves(value) if isinstance(leaf, Tensor)]  # noqa: SLF001 - torch's counter


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
