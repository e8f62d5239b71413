"""The guard of a node's round."""

from __future__ import annotations

import pytest

from starling.actors.replica.round_guard import RoundGuard
from starling.actors.replica.spec import NonFiniteLossError
from starling.algorithms.api import SERVER


def test_a_node_skips_the_rest_of_its_round_and_goes_back():
    undone: list[None] = []
    guard = RoundGuard(3, lambda: undone.append(None), skips=True)
    guard.begin(5)
    assert not guard.skipping
    guard.give_up("loss is nan")
    assert (guard.skipping, guard.reason, len(undone)) == (True, "loss is nan", 1)
    guard.begin(6)
    assert (guard.skipping, guard.reason) == (False, "loss is nan")


@pytest.mark.parametrize(("node", "name"), [(3, "node 3"), (SERVER, "server")])
def test_or_it_stops_and_says_where_and_what_to_do(node: int, name: str):
    undone: list[None] = []
    guard = RoundGuard(node, lambda: undone.append(None), skips=False)
    guard.begin(5)
    with pytest.raises(NonFiniteLossError, match=f"^{name}, round 5: loss is nan; lower optimizer.lr, or set on_nan"):
        guard.give_up("loss is nan")
    with pytest.raises(NonFiniteLossError, match="loss is nan; sample 7 is not finite: mend the data"):
        guard.give_up("loss is nan", "sample 7 is not finite")
    assert not undone
    assert not guard.skipping
