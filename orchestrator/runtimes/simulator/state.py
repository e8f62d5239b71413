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
    """A process is ended: it has not stopped in time, or (with its ``incarnation``) was given notice of this."""

    node: NodeId
    incarnation: int | None


Coming: TypeAlias = "End | Happening"

_PLAIN: Mapping[str, type[Any]] = {one.__name__: one for one in (Died, Retired, Notice, Kept, Halted, SpareLost)}


def written(what: Coming) -> list[Any] | None:
    """One thing that is to happen; ``None``: it is of a round that is over, or is begun again."""
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


def read(form: list[Any], in_flight: Mapping[tuple[int, ...], Envelope]) -> Coming:
    """What ``written`` gave; ``in_flight`` are the messages that have not arrived, by key and attempt."""
    kind, *content = form
    match kind:
        case "End":
            return End(*content)
        case "Up":
            return Up(facts(content[0]), content[1])
        case "Arrived":
            return Arrived(in_flight[tuple(content)])
        case _:
            return _PLAIN[kind](**content[0])


def facts(form: Mapping[str, Any]) -> NodeFacts:
    """What is known of a node, of what ``asdict`` made of it."""
    return NodeFacts(**{**form, "gpus": tuple(form["gpus"]), "warnings": tuple(form["warnings"])})
