"""Catching up by replay: a node applies the records of rounds that it has missed, instead of taking another's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import load

from starling.algorithms.api import View
from starling.algorithms.errors import ProgramError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.actors.data import Position
    from starling.actors.replica.replica import Replica


@dataclass(frozen=True)
class Transcript:
    """Sealed records of rounds ``first``, ``first`` + 1, … (``Algorithm.sealed``)."""

    first: int
    records: tuple[bytes, ...]


def catch_up(
    replica: Replica,
    transcript: Transcript,
    base: Callable[[], bytes | None] = lambda: None,
    position: Position | None = None,
) -> int | None:
    """Make the state after the transcript's last round that of ``replica``, committed; return the bytes that it took.

    Args:
        replica: in the initial state, or with an earlier round's. What it has not committed is dropped.
        transcript: of the rounds that it may have missed.
        base: gives the model (safetensors) before the first of them; asked if the node has not got so far itself.
        position: where the node's data go on; default: where they were.

    Returns:
        ``None`` if there is no such model.

    Raises:
        ProgramError: the records are not of this run.
    """
    replica.rollback()
    nbytes, drawn = 0, replica.data.num_drawn
    if replica.committed_round + 1 < transcript.first:
        data = base()
        if data is None:
            return None
        nbytes += len(data)
        load_model(replica, data)
    for number, record in enumerate(transcript.records, transcript.first):
        if number > replica.committed_round:
            apply(replica, number, record)
            nbytes += len(record)
    replica.data.num_drawn = drawn
    replica.catch_up(max(replica.committed_round, transcript.first - 1), replica.committed_progress.step, position)
    return nbytes


def apply(replica: Replica, number: int, record: bytes) -> None:
    """Replay round ``number`` from its record, and commit it."""
    # Whoever was there is in the record, if it matters.
    replica.begin(number, View(0, ()), frozenset())
    replica.spec.algorithm.replay(replica, record)
    replica.stage()
    replica.commit()


def load_model(replica: Replica, data: bytes) -> None:
    """Make a model's parameters, as safetensors by name, those of ``replica``.

    Raises:
        ProgramError: it has not got them all, in these shapes.
    """
    tensors = load(data)
    for entry in replica.layout.entries:
        value = tensors.get(entry.name)
        if value is None or tuple(value.shape) != entry.shape:
            raise ProgramError(f"the model to begin with has no tensor {entry.name} of shape {list(entry.shape)}")
    for entry in replica.layout.entries:
        replica.parameters[entry.start : entry.stop].copy_(tensors[entry.name].reshape(-1))
    replica.commit()
