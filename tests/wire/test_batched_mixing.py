"""Mixing many nodes at once gives the bits of mixing one after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from starling.actors.wire import buffers
from starling.actors.wire.batched_mixing import MixingMatrix, Mixtures
from starling.algorithms.api import Inbox
from starling.algorithms.seeds import generator
from starling.algorithms.topologies import Ring, Topology
from starling.algorithms.topologies.barabasi_albert import BarabasiAlbert
from starling.algorithms.topologies.complete import Complete
from starling.algorithms.topologies.erdos_renyi import ErdosRenyi
from starling.algorithms.topologies.one_peer_exponential import OnePeerExponential

NODES = tuple(range(3, 26, 2))


def inboxes(topology: Topology, payloads: dict[int, torch.Tensor]) -> dict[int, Inbox[torch.Tensor]]:
    """As the host makes them, with what is mixed at once."""
    mixing = topology.mixing(NODES, 3, 5)
    received, stacked = buffers.copies(payloads)
    mixtures = Mixtures(MixingMatrix(mixing.weights), payloads, stacked)
    result: dict[int, Inbox[torch.Tensor]] = {}
    for node in NODES:
        mine = {sender: received[sender] for sender in mixing.in_neighbors(node)}
        result[node] = Inbox(mine, mixing.weights[node], mixtures.of(node, mine))  # type: ignore[arg-type]
    return result


def payloads(dtype: torch.dtype, size: int) -> dict[int, torch.Tensor]:
    rng = generator("mixtures", size)
    made = {node: torch.randn(size, generator=rng, dtype=torch.float64).to(dtype) for node in NODES}
    made[NODES[0]][0] = -0.0
    return made


@pytest.mark.parametrize("size", [1, 7, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "topology",
    [Ring(), Complete(), OnePeerExponential(), BarabasiAlbert(num_edges=2), ErdosRenyi(probability=0.4)],
    ids=lambda one: one.name,
)
def test_at_once_is_one_by_one(topology: Topology, dtype: torch.dtype, size: int):
    own = payloads(dtype, size)
    for node, inbox in inboxes(topology, own).items():
        once = inbox.mix(own[node])
        again = replace(inbox, mixed=None).mix(own[node])
        assert torch.equal(once.view(torch.uint8), again.view(torch.uint8))
        assert once.dtype == dtype


def test_only_what_was_contributed_is_known_in_advance():
    own = payloads(torch.float32, 5)
    inbox = inboxes(Ring(), own)[NODES[0]]
    plain = replace(inbox, mixed=None)
    other = torch.ones(5)
    assert torch.equal(inbox.mix(other), plain.mix(other))
    doubled = {sender: 2 * values for sender, values in inbox.payloads.items()}
    assert torch.equal(
        replace(inbox, payloads=doubled).mix(own[NODES[0]]), replace(plain, payloads=doubled).mix(own[NODES[0]])
    )
    own[NODES[0]].add_(1)
    assert torch.equal(inbox.mix(own[NODES[0]]), plain.mix(own[NODES[0]]))


def test_each_result_has_its_own_memory_and_version():
    own = payloads(torch.float32, 5)
    made = inboxes(Ring(), own)
    first, second = (made[node].mix(own[node]) for node in NODES[:2])
    before = second._version, second.clone()
    first.add_(1)
    assert second._version == before[0]
    assert torch.equal(second, before[1])
    assert made[NODES[0]].mix(own[NODES[0]]).data_ptr() != first.data_ptr()
