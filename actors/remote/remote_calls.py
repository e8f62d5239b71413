"""Remote calls of an actor that is made of parts: marked at the parts, and gathered into the class that Ray sees.

Ray calls the methods of one class. So the actor's class gets a method for each remote call of its parts, which runs
that call on the actor's own part.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Callable

Group: TypeAlias = Literal["compute", "exchange", "state", "control", "watch"]
"""A concurrency group, which is one thread of the process."""

GROUPS: tuple[Group, ...] = get_args(Group)

_MARK = "_starling_group"

MethodT = TypeVar("MethodT", bound="Callable[..., Any]")


class Composed(Protocol):
    """An object made of parts."""

    parts: dict[type, object]
    """The parts by class."""


ComposedT = TypeVar("ComposedT", bound=Composed)


def remote_call(group: Group) -> Callable[[MethodT], MethodT]:
    """Mark a method as a remote call that runs in the thread of a concurrency group."""

    def mark(method: MethodT) -> MethodT:
        setattr(method, _MARK, group)
        return method

    return mark


def group_of(method: object) -> Group | None:
    """Return the concurrency group of a remote call; None for any other method."""
    return getattr(method, _MARK, None)


def answering_for(*parts: type) -> Callable[[type[ComposedT]], type[ComposedT]]:
    """Give an actor's class the remote calls of its parts.

    Raises:
        TypeError: two remote calls have one name.
    """

    def gather(actor: type[ComposedT]) -> type[ComposedT]:
        for part in parts:
            for name, method in vars(part).items():
                if group_of(method) is None:
                    continue
                if hasattr(actor, name):
                    raise TypeError(f"{actor.__name__} answers {name!r} already, and {part.__name__} does too")
                setattr(actor, name, _forwarded(part, method))
        return actor

    return gather


def _forwarded(part: type, method: Callable[..., Any]) -> Callable[..., Any]:
    # With the method's mark, and its signature, by which Ray checks arguments.
    @functools.wraps(method)
    def call(self: Composed, *arguments: object) -> object:
        return method(self.parts[part], *arguments)

    return call
