"""Scheduled events of a simulation as plain data: a resumed simulation goes on at the same moment.

Only what outlives a round is in it. Steps of exchanges, and state that is just being handed over, are begun again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from starling.orchestrator.runtimes.events import (
    Arrived,
    Died,
    Halted,
    Happening,
    Kept,
    NodeFacts,
    Notice,
    Retired,
    SpareLost,
    Up,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.protocol.mailboxes import Envelope


class End(NamedTuple):
    """A process ends: it has not stopped in time, or (with its ``incarnation``) its notice is over."""

    node: NodeId
    incarnation: int | None


Coming: TypeAlias = "End | Happening"

_PLAIN: Mapping[str, type[Any]] = {one.__name__: one for one in (Died, Retired, Notice, Kept, Halted, SpareLost)}


def written(what: Coming) -> list[Any] | None:
    """Return an event as plain data; None if it belongs to a round, or is begun again."""
    match what:
        case End():
            return ["End", what.node, what.incarnation]
        case Up(facts, import_s):
            return ["Up", asdict(facts), import_s]
        case Arrived(envelope):
            return ["Arrived", *envelope.key, envelope.attempt]
        case Died() | Retired() | Notice() | Kept() | Halted() | SpareLost():
            return [type(what).__name__, asdict(what)]
        case _:
            return None


def read(form: list[Any], in_flight: Mapping[tuple[int, ...], Envelope]) -> Coming | None:
    """Return the event of which ``written`` returned the data; None for the arrival of a message to nobody.

    ``in_flight`` are the messages that have not arrived, by key and attempt, without those to nodes that have left.
    """
    kind, *content = form
    match kind:
        case "End":
            return End(*content)
        case "Up":
            return Up(facts(content[0]), content[1])
        case "Arrived":
            envelope = in_flight.get(tuple(content))
            return None if envelope is None else Arrived(envelope)
        case _:
            return _PLAIN[kind](**content[0])


def facts(form: Mapping[str, Any]) -> NodeFacts:
    """Return the facts of which ``asdict`` returned the data."""
    return NodeFacts(**{**form, "gpus": tuple(form["gpus"]), "warnings": tuple(form["warnings"])})
