"""Carries out the rendezvous's decisions with the parts of either runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.orchestrator.protocol.events import Advance, Cancel, Close, Decision, Deliver, GiveUp, Measure, Secure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.orchestrator.runtimes.interface import Runtime


def carry_out(runtime: Runtime, decisions: Sequence[Decision]) -> None:
    """Carry out what the rendezvous decided at one moment."""
    exchanges, programs = runtime.exchanges, runtime.programs
    measures = [one for one in decisions if isinstance(one, Measure)]
    if measures:
        exchanges.measure(measures)
    secures = [one for one in decisions if isinstance(one, Secure)]
    if secures:
        exchanges.secure(secures)  # together: what they transfer shares the network
    for decision in decisions:
        match decision:
            case Deliver():
                exchanges.deliver(decision)
            case Close():
                exchanges.close(decision)
            case Advance():
                programs.advance(decision)
            case Cancel(node):
                programs.halt([node])
            case GiveUp(node):
                exchanges.give_up(node)
            case _:
                pass  # measures and secures are on their way; commits, aborts and errors are the controller's own
