"""Tickets of nodes, as tests of the rendezvous write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starling.actors.wire.tickets import Posted, Returned, Waiting
from starling.orchestrator.protocol.events import Reached

if TYPE_CHECKING:
    from starling.actors.wire.buffers import Signature

_SMALL: Any = b""


def post(
    node: int, seq: int, signature: Signature, *, contributes: bool = True, inline: bool = False, **keys: Any
) -> Reached:
    """A node announces its contribution, or (``contributes=False``) only receives."""
    specs, data = () if contributes else None, _SMALL if inline else None
    fields = {"weight": 1.0, "part_nbytes": (), "result_nbytes": (), "close": None} | keys
    return Reached(node, Posted(seq, signature, specs, inline=data, **fields))


def changed(one: Reached, **fields: Any) -> Reached:
    """A post that differs in ``fields``."""
    assert isinstance(one.ticket, Posted)
    return Reached(one.node, one.ticket._replace(**fields))


def waits(node: int, seq: int) -> Reached:
    """A node waits for a started exchange."""
    return Reached(node, Waiting(seq))


def returned(node: int, num_collectives: int, digest: str = "") -> Reached:
    """A node's program is done."""
    return Reached(node, Returned(digest, num_collectives, None, 0, 0.0))
