"""Schema of a checkpoint's ``state.json``: types and bounds of every field that a resumed run reads.

Its checksum vouches for what was written, not for who wrote it, nor which Starling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, ValidationError

from starling.orchestrator.checkpoints.saved_processes import LIST, NodeName, SavedMembers, SavedProcesses
from starling.orchestrator.checkpoints.schedule import MAIL
from starling.orchestrator.errors import CheckpointReadError
from starling.orchestrator.records.run_files import Count, Node, Round, Seconds, Stored, Value, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.orchestrator.checkpoints.reader import Checkpoint

_Place: TypeAlias = Annotated[list[Count], Field(min_length=2, max_length=3)]
_Segment: TypeAlias = Annotated[list[Count], Field(min_length=4, max_length=4)]
_Pair: TypeAlias = Annotated[list[Count], Field(min_length=2, max_length=2)]
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_DEEPEST = 100
"""Levels of a tree of state."""


class _Ledger(Stored):
    sizes: list[Count]
    positions: dict[NodeName, _Place]
    extras: dict[NodeName, list[_Segment]]
    pool: list[_Segment]
    changed: list[Node]
    most: Count


class _Samples(Stored):
    parts: Annotated[int, Field(ge=1, le=2**31 - 1)] | None
    ledger: _Ledger | None
    positions: dict[NodeName, _Place]
    drawn: Count
    committed: Count


class _Progress(Stored):
    committed: Round
    members: list[Node]
    elapsed_s: Seconds
    transport_nbytes: Count | None
    seconds: Seconds
    booked: dict[Literal["peer", "server", "recovery", "evaluation"], Count]
    started: Count
    lost: Count
    joined: Count
    drained: Count
    healed: Count
    residuals: list[float] | None
    metrics: dict[str, Value]
    samples: _Samples
    data: dict[str, int | str] = {}


class _Envelope(Stored):
    sender: Node
    round: Count
    number: Count
    to: Node
    nbytes: Count
    letter: Annotated[int, Field(lt=0)]
    heard: int
    attempt: Count = 0


class _SavedLeft(Stored):
    left: Node


class _SavedBox(Stored):
    round: int
    sent: Annotated[list[int], Field(min_length=2, max_length=2)]
    heard: dict[NodeName, int]
    unsent: list[_Pair]
    queue: list[_Envelope | _SavedLeft | Literal["timeout"]]


class _Mail(Stored):
    attempt: Count
    boxes: dict[NodeName, _SavedBox]
    arriving: dict[NodeName, list[_Envelope]] = {}


class _Directory(Stored):
    round: Round
    events: Count


class _Loop(Stored):
    view: Any
    faults: list[dict[str, Any]]


class _Synchronous(_Loop):
    view: Annotated[tuple[Count, list[Node], list[Node], list[Node]], LIST]
    epoch: Count
    late: list[Node] = []
    halting: list[Node] = []
    entered: list[Node] = []


class _Asynchronous(_Loop):
    view: Count
    present: list[Node]
    rounds: dict[NodeName, Count]
    seen: dict[NodeName, list[Node]]
    begun: dict[NodeName, Annotated[tuple[Count, bool, bool], LIST]]
    readings: dict[NodeName, list[float]]
    commits: Count
    last: Node
    since: list[Annotated[tuple[Value, Count, float], LIST]]
    reported: list[Annotated[tuple[Node, dict[str, Value]], LIST]] = []
    contributed: list[Node]
    entered: list[Node] = []
    too_few_since: float | None = None
    mark: Annotated[list[float], Field(min_length=3, max_length=3)]


class _Controller(Stored):
    progress: _Progress
    loop: _Synchronous | _Asynchronous
    mail: _Mail
    directory: _Directory
    config: dict[str, Any]
    processes: SavedProcesses | None = None
    members: SavedMembers | None = None


class _Tensor(Stored):
    dtype: str
    shape: list[Count]


class _Node(Stored):
    run: str
    round: Round
    step: Count
    counters: Count
    shared: dict[str, Any] | None
    local: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    position: _Place | None
    extras: list[_Segment]
    num_void: Count
    incarnation: Count = 0
    tensors: list[_Tensor]


class _Spec(Stored):
    name: str
    dtype: str
    shape: list[Count]
    is_number: bool


class _Letters(Stored):
    letters: list[list[_Spec]]
    tensors: list[_Tensor]


def check(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint if a run can go on from it, as far as types and sizes say.

    Raises:
        CheckpointReadError: a field is missing, or is something else; one line names it.
    """
    where = f"{checkpoint.where}/state.json"
    found = _problem(checkpoint)
    if found is not None:
        raise CheckpointReadError(f"{where}: {found}")
    return checkpoint


def _problem(checkpoint: Checkpoint) -> str | None:
    state: Any = checkpoint.controller
    try:
        controller = _Controller.model_validate(state)
    except ValidationError as error:
        return f"controller.{problem(error)}"
    if controller.progress.committed != checkpoint.number:
        return f"controller.progress.committed is {controller.progress.committed}, in round {checkpoint.number}'s"
    faults = _lacking(controller, state)
    if faults is not None:
        return faults
    there = 0
    for node, export in checkpoint.nodes.items():
        kind = _Letters if node == MAIL else _Node
        try:
            kind.model_validate(export.meta)
        except ValidationError as error:
            return f"nodes.{node}.{problem(error)}"
        wrong = next(_faults(export.meta, is_mail=node == MAIL), None)
        if wrong is not None:
            return f"nodes.{node}.{wrong}"
        there += node != MAIL
    return None if there else "nodes has none"


def _lacking(controller: _Controller, state: dict[str, Any]) -> str | None:
    """Return the first missing counterpart of something that is there, as an error; None if there is none."""
    if controller.processes is None:
        return None
    if controller.members is None:
        return "controller.members is missing"
    wanted = ("late", "halting") if isinstance(controller.loop, _Synchronous) else ("entered", "too_few_since")
    absent = next((f"controller.loop.{name}" for name in wanted if name not in state["loop"]), None)
    return None if absent is None else f"{absent} is missing"


def _faults(meta: dict[str, Any], *, is_mail: bool) -> Iterator[str]:
    """Yield the errors in a node's state beyond the types of its fields."""
    tensors: list[Any] = meta["tensors"]
    yield from (f"tensors has the unknown type {one['dtype']!r}" for one in tensors if one["dtype"] not in _DTYPES)
    if is_mail:
        specs = [spec for one in meta["letters"] for spec in one]
        yield from (f"letters has the unknown type {one['dtype']!r}" for one in specs if one["dtype"] not in _DTYPES)
        if len(meta["letters"]) != len(tensors):
            yield f"letters are {len(meta['letters'])}, with {len(tensors)} tensors"
        return
    if meta["counters"] + 2 > len(tensors):
        yield f"tensors are {len(tensors)}; parameters, buffers and {meta['counters']} counters are more"
    elif len(tensors[0]["shape"]) != 1:
        yield "tensors.0: the parameters are one row of values"
    for name in ("shared", "local", "optimizer"):
        if meta[name] is not None:
            yield from (f"{name}{fault}" for fault in _tree_faults(meta[name], len(tensors), _DEEPEST))


def _tree_faults(tree: Any, num_tensors: int, deepest: int) -> Iterator[str]:  # noqa: ANN401 - from JSON
    """Yield the errors in a tree of state, as ``actors.replica.state_transfer`` packs it."""
    if not isinstance(tree, dict) or len(tree) != 1 or not deepest:
        yield ": is no tree of state"
        return
    ((kind, content),) = tree.items()
    match kind, content:
        case "tensor", int() if 0 <= content < num_tensors and not isinstance(content, bool):
            pass
        case "tensor", _:
            yield f": there is no tensor {content!r}"
        case "dict", dict():
            for key, child in content.items():
                yield from (f".{key}{fault}" for fault in _tree_faults(child, num_tensors, deepest - 1))
        case "list", list():
            for place, child in enumerate(content):
                yield from (f".{place}{fault}" for fault in _tree_faults(child, num_tensors, deepest - 1))
        case "value", None | bool() | int() | float() | str():
            pass
        case _:
            yield f": is no tree of state ({kind})"
