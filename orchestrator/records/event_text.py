"""Puts events of the run's log into words: a line for each that people care about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.algorithms.api import SERVER
from starling.algorithms.words import listed
from starling.orchestrator.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_PHASES = ("detect", "replace", "import", "transfer", "first_commit")


def told(event: Mapping[str, Any]) -> str | None:
    """Put an event into words; return None for events of every round.

    >>> told({"event": "lost", "round": 4, "node": 2, "reason": "its process died"})
    'round 4: node 2 lost: its process died'
    >>> told({"event": "commit", "round": 4})
    """
    who = "the server" if event.get("node") == SERVER else f"node {event.get('node')}"
    when = f"round {event['round']}: " if "round" in event else ""
    match event["event"]:
        case "lost":
            return f"{when}{who} lost: {event['reason']}"
        case "residual_lost":
            return f"{when}what {who} had still to send is lost with it, a residual of norm {event['norm']:.3g}"
        case "notice":
            return f"{when}{who} is to leave within {seconds_text(event['left_s'])}: {event['reason']}"
        case "left":
            kept = event["kept_nbytes"]
            state = f"{bytes_text(kept)} of its state are kept" if kept else "with nothing of its own yet"
            return f"{when}{who} left as it was told to, {state}"
        case "late":
            return f"{when}{who} left behind: {event['reason']}"
        case "up":
            return f"{who} up: {event['place']}"
        case "not_up":
            return f"{who} did not come up: {event['reason']}"
        case "spare_lost":
            return f"a warm spare was lost: {event['reason']}; {event['advice']}"
        case "abort":
            return f"{when}begins again: {event['reason']}"
        case "diverged" if event["healed"]:
            others = listed(node for group in event["groups"][1:] for node in group)
            return f"{when}the shared state of nodes {others} differs from that of most, which they will be given"
        case "checkpoint":
            return _checkpoint(event)
        case "recovered":
            phases = ((phase, event["seconds"][phase]) for phase in _PHASES)
            parts = (f"{phase.replace('_', ' ')} {value:.2f} s" for phase, value in phases if value is not None)
            total = seconds_text(event["total_s"])
            return f"{when}{who} has committed, {total} after its loss or start ({', '.join(parts)})"
        case _:
            return None


def _checkpoint(event: Mapping[str, Any]) -> str | None:
    """Report a storage that fails once, however often it does; events.jsonl has each time."""
    given_up = event.get("given_up", 0)
    if event["error"] is None:
        return f"checkpoints are written again; {given_up} could not be" if given_up else None
    if given_up > 1:
        return None
    return f"the checkpoint of round {event['round']} was given up: {event['error']}; more is counted, and not told"
