"""Tickets of nodes, as the events that the controller sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starling.actors.wire.tickets import (
    Posted,
)
from starling.orchestrator.protocol.events import (
    Post,
)

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId


def post_event(node: NodeId, ticket: Posted) -> Post:
    """The rendezvous' view of an announcement."""
    return Post(
        node,
        ticket.seq,
        ticket.signature,
        contributes=ticket.specs is not None,
        weight=ticket.weight,
        part_nbytes=ticket.part_nbytes,
        result_nbytes=ticket.result_nbytes,
        inline=ticket.inline is not None,
        waits=ticket.waits,
        close=ticket.close,
        wants=ticket.wants,
        skipped=ticket.skipped,
        least=ticket.least,
    )
