"""A cluster that is throttled: what comes back from its nodes is held back as the simulator's network says.

On a clock of the tests, with processes that answer when they are told to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from starling.actors.remote.messages import Reply
from starling.actors.wire.buffers import Signature
from starling.actors.wire.tickets import Pinging, Posted, Secured, Sending
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.protocol.events import Advance, Close, Deliver, Delivered, Reached, Secure
from starling.orchestrator.protocol.mailboxes import Envelope
from starling.orchestrator.runtimes.cluster import store
from starling.orchestrator.runtimes.cluster.event_loop import EventLoop
from starling.orchestrator.runtimes.cluster.runtime import Cluster
from starling.orchestrator.runtimes.cluster.transport import Transport
from starling.orchestrator.runtimes.decisions import carry_out
from starling.orchestrator.runtimes.events import Arrived, Loaded
from tests.fake_actors import Fakes

if TYPE_CHECKING:
    from starling.algorithms.api import NodeId

PART = 250_000
"""Bytes of each of four parts."""
NETWORK = {"bandwidth_mbps": 8, "latency_ms": 100}  # 1 MB/s


class Throttled(Fakes):
    """A cluster of four nodes."""

    def __init__(self, network: dict[str, Any], per_process: int = 1) -> None:
        super().__init__()
        self.cluster = Cluster(config(network), loop=self.loop)
        for first in range(0, 4, per_process):
            self.add(self.cluster.pool, *range(first, first + per_process))
        self.cluster.attempt.begin(0, (0, 1, 2, 3), ())

    def post(self, *, inline: bool = False, wants: dict[NodeId, frozenset[NodeId]] | None = None, seq: int = 0) -> None:
        """All have announced what they contribute to an exchange."""
        signature = Signature("AllReduce", "", None)
        sizes = (PART,) if inline else (PART,) * 4
        for node in range(4):
            wanted = None if wants is None else wants[node]
            posted = Posted(seq, signature, (), 1.0, sizes, sizes, None, None, wanted)
            self.cluster.exchanges.posted[seq][node] = posted

    def secure(self) -> None:
        carry_out(self.cluster, [Secure(0, part, part, (0, 1, 2, 3), 0) for part in range(4)])

    def secured(self) -> None:
        self.answer("secure", *(([Secured(0, part, part, frozenset(range(4)), 0)], 0) for part in range(4)))


@pytest.fixture(autouse=True)
def _no_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.ray, "nodes", list)


def config(network: dict[str, Any]) -> Config:
    return parse({"algorithm": "fedavg", "task": "digits", "network": network, "tracking": "none"})


def test_a_reduction_takes_as_long_as_the_links_say():
    plane = Throttled(NETWORK)
    plane.post()
    plane.secure()
    # Each sends three parts of 0.25 MB, and the real thing is done in no time.
    plane.secured()
    assert plane.at(0.84) == []
    assert {one.by for one in plane.at(0.86)} == {0, 1, 2, 3}
    # And back: each sends the part that it has made to three others, from now on.
    carry_out(plane.cluster, [Deliver(0, (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), 0)])
    plane.answer("deliver", *((frozenset[int](), 0) for _ in range(4)))
    assert plane.at(0.86 + 0.84) == []
    assert plane.at(0.86 + 0.86) == [Delivered(0, node, 0) for node in range(4)]


def test_without_a_throttle_nothing_is_held_back():
    plane = Throttled({})
    plane.post()
    plane.secure()
    plane.secured()
    assert len(plane.at(0.0)) == 4


def test_what_really_takes_longer_is_not_held_back_besides():
    plane = Throttled(NETWORK)
    plane.post()
    plane.secure()
    assert plane.at(5.0) == []
    plane.secured()
    assert len(plane.at(5.0)) == 4


def test_a_link_that_is_busy_delays_what_comes_next():
    plane = Throttled({"bandwidth_mbps": 8})
    plane.post()
    plane.post(seq=1)
    plane.secure()
    carry_out(plane.cluster, [Secure(1, 0, 0, (0, 1), 0)])  # another exchange, at the same time: 0.25 s behind 0.75
    plane.answer(
        "secure",
        *(([Secured(0, part, part, frozenset(range(4)), 0)], 0) for part in range(4)),
        ([Secured(1, 0, 0, frozenset((0, 1)), 0)], 0),
    )
    assert [one.seq for one in plane.at(0.76)] == [0, 0, 0, 0]
    assert plane.at(0.99) == []
    assert [one.seq for one in plane.at(1.01)] == [1]


def test_links_of_their_own_are_slower():
    plane = Throttled({"bandwidth_mbps": 8, "links": [{"between": [0, 3], "bandwidth_mbps": 1, "latency_ms": 500}]})
    plane.post()
    plane.secure()
    plane.secured()
    assert {one.by for one in plane.at(0.76)} == {1, 2}
    assert plane.at(2.49) == []  # 2 Mbit at 1 Mbit/s, and half a second
    assert {one.by for one in plane.at(2.51)} == {0, 3}


def test_nothing_of_an_older_attempt_arrives():
    plane = Throttled(NETWORK)
    plane.post()
    plane.secure()
    plane.secured()
    plane.cluster.attempt.begin(1, (0, 1, 2, 3), ())
    assert plane.at(10.0) == []


def test_what_is_missing_is_told_at_once():
    plane = Throttled(NETWORK)
    plane.post()
    plane.secure()
    carry_out(plane.cluster, [Deliver(0, (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), 0)])
    plane.answer("deliver", (frozenset((3,)), 0), *((frozenset[int](), 0) for _ in range(3)))
    assert plane.at(0.0) == [Delivered(0, 0, 0, frozenset((3,)))]


@pytest.mark.parametrize("per_process", [1, 2])
def test_small_contributions_arrive_where_they_are_wanted(per_process: int):
    plane = Throttled(NETWORK, per_process)
    # Node 0 hears three others, of which 1 and 2 send to it alone.
    others = {0: frozenset((1, 2, 3)), 1: frozenset[int](), 2: frozenset[int](), 3: frozenset((1,))}
    plane.post(inline=True, wants=others)
    carry_out(plane.cluster, [Close(0, (0, 1, 2, 3), inline=True), Advance(0, (0, 1, 2, 3), (0, 1, 2, 3), inline=True)])

    def advanced() -> set[int]:
        return {node for name, arguments in plane.asked if name == "advance" for node in arguments[2]}

    assert advanced() == {1, 2}
    plane.at(0.59)
    assert advanced() == {1, 2}
    plane.at(0.61)  # node 1 sends to 0 and 3: 0.5 s, and the latency
    assert advanced() == {1, 2, 3}
    plane.at(0.86)  # 0.75 MB come down the link of node 0
    assert advanced() == {0, 1, 2, 3}


def test_messages_and_state_arrive_late():
    plane = Throttled(NETWORK)
    message = Sending(2, 7, (), PART, cast("Any", b""))
    plane.cluster.programs.on_reply(plane.cluster.pool.home[1], Reply([(1, message)]))
    envelope = Envelope(sender=1, round=0, number=0, to=2, nbytes=PART, letter=7, heard=-1)
    plane.cluster.messages.dispatch(envelope)
    plane.cluster.states.transfer(3, 0)
    plane.answer("load", 2 * PART)
    assert plane.at(0.34) == [Reached(1, message)]
    assert plane.at(0.36) == [Arrived(envelope)]
    assert plane.at(0.59) == []
    assert plane.at(0.61) == [Loaded(3, 0, 2 * PART)]


def test_state_of_one_that_has_died_meanwhile_does_not_arrive():
    plane = Throttled(NETWORK)
    plane.cluster.states.transfer(3, 0)
    plane.answer("load", PART)
    plane.cluster.pool.home[3] = plane.add(plane.cluster.pool)
    assert plane.at(9.0) == []


def test_answers_take_their_time():
    plane = Throttled({"latency_ms": 100, "links": [{"between": [0, 3], "latency_ms": 400}]})
    plane.cluster.programs.on_reply(plane.cluster.pool.home[0], Reply([(0, Pinging((1, 3), 0.5))]))
    plane.answer("ping", True, True)
    plane.at(0.45)
    assert "run_on" not in dict(plane.asked)
    plane.at(0.55)
    assert dict(plane.asked)["run_on"][1] == [(0, frozenset({1}))]


def test_speeds_are_the_simulators():
    assert not Transport(config({"step_ms": 1000, "speeds": {0: 0.1}}).network, EventLoop()).is_throttled
