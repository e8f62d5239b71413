"""Bytes of exchanges by formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starling.algorithms.aggregators import Aggregator

INLINE_LIMIT_BYTES = 64 * 1024
"""A contribution up to this size travels inside the message that announces it, and every member combines locally."""

PART_BYTES = 1024 * 1024
"""A larger one is cut into at most one part per member, and not smaller than this."""


def all_reduce_bytes(
    nbytes: int,
    num_nodes: int,
    num_contributors: int | None = None,
    result_nbytes: int | None = None,
    aggregator: Aggregator | None = None,
) -> int:
    """Return the payload bytes of an ``AllReduce`` over all nodes: ``nbytes`` each in, ``result_nbytes`` out.

    An ``aggregator`` that measures contributions takes no small ones along with their announcements, and each measure
    goes to all who reduce.

    >>> all_reduce_bytes(1_000_000, num_nodes=4) == 2 * 3 * 1_000_000
    True
    >>> all_reduce_bytes(1_000, num_nodes=4, num_contributors=2) == 2 * 3 * 1_000
    True
    """
    contributors = num_nodes if num_contributors is None else num_contributors
    measured = 0 if aggregator is None else aggregator.measured_nbytes(contributors)
    if nbytes <= INLINE_LIMIT_BYTES and not measured:
        return contributors * (num_nodes - 1) * nbytes
    parts = num_parts(nbytes, num_nodes)
    moved = (contributors - 1) * nbytes + (num_nodes - 1) * (nbytes if result_nbytes is None else result_nbytes)
    return moved + parts * (min(parts, contributors) - 1) * measured


def num_parts(nbytes: int, num_members: int) -> int:
    """Return the number of parts into which a contribution of ``nbytes`` is cut, with ``num_members`` in the view.

    >>> num_parts(3 * PART_BYTES, num_members=8), num_parts(3 * PART_BYTES, num_members=2)
    (3, 2)
    """
    return max(1, min(num_members, math.ceil(nbytes / PART_BYTES)))
