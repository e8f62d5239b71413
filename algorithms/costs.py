"""Bytes of exchanges by formula."""

from __future__ import annotations

INLINE_LIMIT_BYTES = 64 * 1024
"""A contribution up to this size travels inside the message that announces it, and every member combines locally."""

PART_BYTES = 1024 * 1024
"""A larger one is cut into at most one part per member, and not smaller than this."""


def all_reduce_bytes(
    nbytes: int, num_nodes: int, num_contributors: int | None = None, result_nbytes: int | None = None
) -> int:
    """Return the payload bytes of an ``AllReduce`` over all nodes: ``nbytes`` each in, ``result_nbytes`` out.

    >>> all_reduce_bytes(1_000_000, num_nodes=4) == 2 * 3 * 1_000_000
    True
    >>> all_reduce_bytes(1_000, num_nodes=4, num_contributors=2) == 2 * 3 * 1_000
    True
    """
    contributors = num_nodes if num_contributors is None else num_contributors
    if nbytes <= INLINE_LIMIT_BYTES:
        return contributors * (num_nodes - 1) * nbytes
    return (contributors - 1) * nbytes + (num_nodes - 1) * (nbytes if result_nbytes is None else result_nbytes)
