"""Schema of the processes in a simulation's checkpoint: types and bounds of every field."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, Strict

from starling.orchestrator.records.run_files import Count, Node, Round, Stored

LIST = Strict(strict=False)
"""JSON has lists where we have tuples."""
NodeName: TypeAlias = Annotated[str, Field(pattern=r"^-?\d{1,10}$")]
_Time: TypeAlias = Annotated[float, Field(ge=0, le=1e18)]
_Crashes: TypeAlias = Annotated[tuple[Count, float | None], LIST]


class _Exactly(Stored):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Facts(_Exactly):
    node: Node
    place: str
    device: str
    num_samples: Count
    gpus: list[str]
    warnings: list[str]


class _Died(_Exactly):
    node: Node
    reason: str


class _Retired(_Exactly):
    node: Node
    nbytes: Count


class _Notice(_Exactly):
    node: Node
    deadline: float
    reason: str


class _SavedKept(_Exactly):
    node: Node
    number: Round
    nbytes: Count


class _Halted(_Exactly):
    node: Node


class _SpareLost(_Exactly):
    reason: str


_Coming: TypeAlias = (
    Annotated[tuple[Literal["End"], Node, Count | None], LIST]
    | Annotated[tuple[Literal["Up"], _Facts, float], LIST]
    | Annotated[tuple[Literal["Arrived"], Node, Count, Count, Count], LIST]
    | Annotated[tuple[Literal["Died"], _Died], LIST]
    | Annotated[tuple[Literal["Retired"], _Retired], LIST]
    | Annotated[tuple[Literal["Notice"], _Notice], LIST]
    | Annotated[tuple[Literal["Kept"], _SavedKept], LIST]
    | Annotated[tuple[Literal["Halted"], _Halted], LIST]
    | Annotated[tuple[Literal["SpareLost"], _SpareLost], LIST]
)


class SavedProcesses(Stored):
    """State of ``SimulatedProcesses``."""

    present: dict[NodeName, Count]
    hung: list[Node]
    incarnations: dict[NodeName, Count]
    coming: list[Node]
    up: list[Node]
    spares: list[float]
    ready: list[_Coming]
    queue: list[Annotated[tuple[_Time, Node, _Coming], LIST]]
    network: list[Annotated[tuple[Node, Node | str, float], LIST]]


class _SavedRecovery(_Exactly):
    struck: float | None = None
    lost: float | None = None
    launched: float | None = None
    up: float | None = None
    import_s: float = 0.0
    transfer_s: float = 0.0


class _Pool(Stored):
    wanted: list[Node]
    starting: list[Node]
    crashes: dict[NodeName, _Crashes]
    places: int
    spares: _Crashes


class SavedMembers(Stored):
    """State of ``Members``."""

    pool: _Pool
    recoveries: dict[NodeName, _SavedRecovery]
    facts: Annotated[list[_Facts], Field(min_length=1)]
    down: list[Node]
    new: list[Node]
    leaving: dict[NodeName, float]
    withdrawn: list[Node]
    retiring: list[Node]
    successors: list[_Coming]
    kept: dict[NodeName, Round]
    unsent: dict[NodeName, float]
