"""The nodes' side of exchanges, without a host: contributions, handles, reduction and results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from starling.actors.host.exchanges import Exchanges
from starling.actors.host.failures import UnfinishedExchange
from starling.actors.wire.tickets import Contributed, Posted
from starling.algorithms.api import AllGather, AllReduce, Handle, NeighborAllGather
from starling.algorithms.topologies import Ring
from tests.toys import begin, replica

LARGE = 40_000
"""Values that do not travel inline."""


def exchanges(num_nodes: int = 2, *, alone: bool = False) -> Exchanges:
    """Exchanges of nodes that have just entered round 0."""
    members = tuple(range(num_nodes))
    replicas = {node: replica(node, num_nodes=num_nodes) for node in members}
    for one in replicas.values():
        begin(one, members=members)
    made = Exchanges(replicas, seed=0, alone=alone)
    made.begin(0, members)
    for node in members:
        made.reset(node)
    return made


def inline(node: int, posted: Posted) -> Contributed:
    assert posted.specs is not None
    assert posted.inline is not None
    return Contributed(node, posted.weight, posted.specs, posted.inline)


def test_small_contributions_are_reduced_to_a_weighted_mean_that_nobody_shares():
    ours = exchanges()
    posted = [
        ours.post(node, AllReduce(torch.full((3,), float(node)), weight=1.0 + node), started=False) for node in (0, 1)
    ]
    assert [(one.seq, one.waits) for one in posted] == [(0, True)] * 2
    assert not ours.is_concluded(0)
    ours.conclude_inline(0, 0, [inline(node, one) for node, one in enumerate(posted)])
    assert ours.is_concluded(0)
    cpu = torch.device("cpu")
    one, other = (ours.take(node, 0).own(cpu) for node in (0, 1))
    assert one.members == (0, 1)
    assert one.weight == 3.0
    torch.testing.assert_close(one.value, torch.full((3,), 2 / 3))
    assert torch.equal(one.value, other.value)
    assert one.value.data_ptr() != other.value.data_ptr()
    assert not ours.is_concluded(0), "the last node takes the result along"


def test_large_contributions_are_reduced_part_by_part_to_the_bits_of_inline_ones():
    ours = exchanges()
    values = [torch.randn(LARGE, generator=torch.Generator().manual_seed(node)) for node in (0, 1)]
    posted = [ours.post(node, AllReduce(values[node]), started=False) for node in (0, 1)]
    first = posted[0]
    assert first.specs is not None
    assert first.inline is None
    parts = [
        ours.reduce(0, 0, part, first.specs, {node: (ours.parts(node, 0)[part], 1.0) for node in (1, 0)})
        for part in range(len(first.part_nbytes))
    ]
    ours.release(0)
    assert not ours.parts(0, 0), "nobody asks for contributions to a closed exchange"
    ours.conclude_reduce(0, 0, first.specs, {0: 1.0, 1: 1.0}, parts)
    assert torch.equal(ours.take(0, 0).own(torch.device("cpu")).value, (values[0] + values[1]) / 2)


def test_where_all_nodes_are_here_nothing_is_packed():
    for alone in (True, False):
        ours = exchanges(alone=alone)
        posted = ours.post(0, AllGather(torch.ones(3)), started=False)
        assert posted.inline is not None
        assert posted.inline.nbytes == (0 if alone else 12)
        assert posted.nbytes == 12


def test_neighbours_receive_from_those_that_are_in():
    ours = exchanges(4, alone=True)
    for node in range(4):
        ours.post(node, NeighborAllGather(torch.full((1,), float(node)), Ring()), started=False)
    ours.conclude_here([0, 1, 3], 0)
    inbox = ours.take(0, 0)
    assert sorted(inbox.payloads) == [1, 3]
    assert sum(inbox.weights.values()) == pytest.approx(1.0)
    assert 2 not in ours.take(1, 0).payloads


def test_a_contribution_does_not_change_with_parameters_that_go_back():
    ours = exchanges()
    own = ours._replicas[0].parameters
    ours.post(0, AllReduce(own), started=False)
    before = ours.parts(0, 0)[0].copy()
    ours.detach(0)
    own.zero_()
    assert (ours.parts(0, 0)[0] == before).all()


def test_a_handle_is_waited_for_once_and_in_its_round():
    ours = exchanges()
    handle: Handle[Any] = Handle(ours.post(0, AllReduce(torch.zeros(2)), started=True).seq, 0)
    with pytest.raises(UnfinishedExchange, match=r"exchange 0 \(AllReduce\) is in flight"):
        ours.check_finished(0)
    assert ours.wait(0, handle) == 0
    ours.check_finished(0)
    with pytest.raises(UnfinishedExchange, match="waited for already"):
        ours.wait(0, handle)
    with pytest.raises(UnfinishedExchange, match="belongs to its round"):
        ours.wait(0, Handle(0, 1))
    assert ours.num_posted(0) == 1
    ours.reset(0)
    assert ours.num_posted(0) == 0
