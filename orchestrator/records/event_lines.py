"""The lines of ``events.jsonl`` that a replay needs, each with the fields that it needs, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

from pydantic import Field, TypeAdapter, ValidationError

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.run_files import Count, Node, Stored, plain, problem, reason
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "events.jsonl"

_Position: TypeAlias = Annotated[list[Count], Field(min_length=2, max_length=3)]
_Message: TypeAlias = Annotated[list[int], Field(min_length=3, max_length=3)]
_Segment: TypeAlias = Annotated[list[Count], Field(min_length=4, max_length=4)]


class _Left(Stored):
    left: Node


class _OfNode(Stored):
    node: Node


class _Received(_OfNode):
    outcome: Literal["timeout"] | _Left | _Message


class _Seen(_OfNode):
    values: list[float]


class _Change(Stored):
    number: Count
    joined: list[Node]
    left: list[Node]


class _View(_Change, _OfNode):
    round: Count
    members: list[Node]


class _Start(Stored):
    nodes: list[Node]
    parts: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class _Transfer(_OfNode):
    donor: Node
    position: _Position | None


class _Plan(_OfNode):
    round: Count
    extras: list[_Segment]
    position: _Position


class _Begin(_Change):
    view: Annotated[list[Node], Field(min_length=1)]
    joiners: list[Node]


class _Commit(Stored):
    node: Node = 0


class _SynchronousCommit(Stored):
    round: Count
    closed: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], list[Node]]
    committed: list[Node]


class _Any(Stored):
    event: str


_MODELS: dict[str, type[Stored]] = {
    "received": _Received,
    "seen": _Seen,
    "view": _View,
    "start": _Start,
    "again": _OfNode,
    "lost": _OfNode,
    "left": _OfNode,
    "up": _OfNode,
    "transfer": _Transfer,
    "plan": _Plan,
    "begin": _Begin,
}


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events in a run's log, in order; a last line that was cut off is left out.

    Raises:
        ConfigError: a line is none of an event, or lacks what a replay needs; raised when it is reached.
        FileNotFoundError: there is no log.
    """
    folder = Folder(run_dir)
    try:
        for number, line in enumerate(folder.lines(NAME), 1):
            if line.endswith(b"\n"):
                yield _event(line, f"{folder}/{NAME}, line {number}")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{folder}/{NAME}: {reason(error)}") from None


def _event(line: bytes, where: str) -> dict[str, Any]:
    event = plain(line, where)
    try:
        kind = _ANY.validate_python(event).event
        if kind == "commit":
            model: type[Stored] = _SynchronousCommit if "closed" in event else _Commit
        else:
            model = _MODELS.get(kind, _Any)
        model.model_validate(event)
    except ValidationError as error:
        raise ConfigError(f"{where}: {problem(error)}") from None
    return cast("dict[str, Any]", event)


_ANY = TypeAdapter(_Any)
