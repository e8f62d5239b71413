"""Failures of nodes, as they are reported."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from starling.actors.wire.tickets import (
    Failed,
)
from starling.algorithms.api import (
    SERVER,
)
from starling.algorithms.errors import ProgramError, StarlingError
from starling.algorithms.words import shortened

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId


_MOST_CHARACTERS = 600
"""Characters kept of a user's exception text; the traceback has all of it."""


class UnfinishedExchange(ProgramError):  # noqa: N818 - the protocol's word
    """A handle was waited for in another round or twice, or a round ended with an open one."""


def failure(node: NodeId, number: int, error: Exception) -> Failed:
    """Return the report of a program's exception for the person who wrote the program."""
    who = "server" if node == SERVER else f"node {node}"
    if isinstance(error, StarlingError):
        message = str(error)
        return Failed(
            message if message.startswith(("node ", "server,")) else f"{who}, round {number}: {message}", None
        )
    text = "".join(traceback.format_exception(error))
    return Failed(f"{who}, round {number}: {type(error).__name__}: {shortened(str(error), _MOST_CHARACTERS)}", text)
