"""What exchanges cost, at the size at which they are carried out differently."""

from __future__ import annotations

from starling.algorithms.costs import INLINE_LIMIT_BYTES, all_reduce_bytes


def test_the_largest_that_travels_inline_goes_to_everybody():
    assert all_reduce_bytes(INLINE_LIMIT_BYTES, num_nodes=5) == 5 * 4 * INLINE_LIMIT_BYTES
    assert all_reduce_bytes(INLINE_LIMIT_BYTES + 1, num_nodes=5) == 2 * 4 * (INLINE_LIMIT_BYTES + 1)


def test_what_comes_back_costs_what_it_is():
    assert all_reduce_bytes(1_000_000, num_nodes=5, num_contributors=2, result_nbytes=10) == 1_000_000 + 4 * 10
