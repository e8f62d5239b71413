"""Errors of a user's code, reported with node and round."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from starling.actors.host.failures import failure
from starling.orchestrator.errors import NodeFailedError, StarlingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starling.algorithms.api import NodeId


@contextlib.contextmanager
def user_code(node: NodeId, number: int) -> Iterator[None]:
    """Raise ``NodeFailedError``, which names the node, for an exception of a user's task outside of a program."""
    try:
        yield
    except StarlingError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a user's task raises
        failed = failure(node, number, error)
        raise NodeFailedError(failed.message, failed.traceback) from None
