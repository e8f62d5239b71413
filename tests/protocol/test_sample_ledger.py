"""The data ledger, by itself: whatever happens to nodes, each sample of an epoch is committed exactly once."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from starling.actors.data import EpochSampler, Place, PlannedDraws, Position, Segment
from starling.orchestrator.protocol.sample_ledger import DataLedger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from starling.algorithms.api import NodeId

    Tag = tuple[int, int, int]
    """A part, an epoch, and a place in the order of the part in that epoch."""


class Tagged(EpochSampler):
    """Says which place of which epoch each draw is, in place of the sample."""

    def __init__(self, part: int, size: int) -> None:
        super().__init__(torch.arange(size), 0, part)
        self.part = part

    def read(self, epoch: int, start: int, count: int) -> NDArray[np.int64]:
        stop = min(start + count, len(self.indices))
        return np.array([self.part * 10**8 + epoch * 10**4 + place for place in range(start, stop)], dtype=np.int64)


def tag(number: int) -> Tag:
    return number // 10**8, number // 10**4 % 10**4, number % 10**4


class Process:
    """What embodies a node: it draws, and knows no more of the plan than what it was told."""

    def __init__(self, node: NodeId, sizes: list[int], position: Position) -> None:
        own = Tagged(node, sizes[node]) if node < len(sizes) else None
        self.draws = PlannedDraws(own, torch.arange(1), 0, node, lambda part: Tagged(part, sizes[part]))
        # As a transfer does it: what it was handed comes with the begin of a round.
        self.draws.position = position._replace(extra=0)
        self.committed = self.draws.position
        self.drawn: list[Tag] = []

    def begin(self, place: Place | None) -> None:
        self.drawn = []
        if place is not None:
            self.draws.plan(place)
        self.committed = self.draws.position

    def draw(self, *batch_sizes: int) -> None:
        for size in batch_sizes:
            self.drawn += map(tag, self.draws.draw(size).tolist())

    def rollback(self) -> None:
        self.draws.position, self.drawn = self.committed, []


class World:
    """Nodes that come, go and draw, and a ledger."""

    def __init__(self, sizes: list[int], present: set[NodeId]) -> None:
        self.sizes = sizes
        self.ledger = DataLedger(sizes)
        self.processes: dict[NodeId, Process] = {}
        self.count: Counter[Tag] = Counter()
        for node in present:
            self.come(node)

    def come(self, node: NodeId) -> None:
        self.processes[node] = Process(node, self.sizes, self.ledger.position(node))

    def go(self, node: NodeId) -> None:
        del self.processes[node]
        self.ledger.set_back(node)

    def begin(self, *nodes: NodeId) -> None:
        told = self.ledger.begin(nodes, self.processes)
        assert told.keys() <= set(nodes)
        for node in nodes:
            self.processes[node].begin(told.get(node))

    def commit(self, *nodes: NodeId) -> None:
        self.ledger.committed({node: self.processes[node].draws.position for node in nodes})
        for node in nodes:
            process = self.processes[node]
            self.count.update(process.drawn)
            process.committed, process.drawn = process.draws.position, []

    def round(self, *batch_sizes: int) -> None:
        """One in which nothing happens."""
        nodes = sorted(self.processes)
        self.begin(*nodes)
        for node in nodes:
            self.processes[node].draw(*batch_sizes)
        self.commit(*nodes)

    def restart(self) -> None:
        """The controller is another one, which has read what the last one wrote, and so are all processes."""
        self.ledger = DataLedger.from_json(json.loads(json.dumps(self.ledger.to_json())))
        for node in self.processes:
            self.come(node)

    def epochs(self) -> dict[int, list[int]]:
        """How often each place of each epoch was committed, the parts one behind the other."""
        last = max((epoch for _, epoch, _ in self.count), default=-1)
        return {
            epoch: [self.count[part, epoch, place] for part, size in enumerate(self.sizes) for place in range(size)]
            for epoch in range(last + 1)
        }

    def finish(self) -> int:
        """Go on with whoever is there until all that has been begun is complete; return the number of epochs."""
        nodes = sorted(self.processes)
        goal = 1 + max((epoch for _, epoch, _ in self.count), default=0)
        for _ in range(200):
            self.round(13, 14)
            if sum(epoch < goal for _, epoch, _ in self.count) == goal * sum(self.sizes):
                return goal
        raise AssertionError(f"epoch {goal - 1} does not end with nodes {nodes}: {self.ledger.to_json()}")


class Churn(RuleBasedStateMachine):
    """Nodes join, leave, crash and come back; rounds are committed by some, given up, or cut off by a restart."""

    everybody = Bundle("everybody")

    @initialize(
        target=everybody,
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
        num_more=st.integers(0, 2),
        away=st.sets(st.integers(0, 4), max_size=3),
    )
    def start(self, sizes: list[int], num_more: int, away: set[int]) -> int:
        everybody = len(sizes) + num_more
        self.everybody_is = everybody
        self.world = World(sizes, set(range(len(sizes))).difference(away) or {0})
        return everybody

    def some(self, data: st.DataObject, nodes: list[NodeId], least: int = 0) -> list[NodeId]:
        return sorted(data.draw(st.sets(st.sampled_from(nodes), min_size=least))) if nodes else []

    @rule(data=st.data(), batches=st.lists(st.integers(1, 12), min_size=1, max_size=4))
    def round(self, data: st.DataObject, batches: list[int]) -> None:
        """All begin; some die in it, some are too late, the others commit. With nobody left it is given up."""
        world = self.world
        nodes = sorted(world.processes)
        world.begin(*nodes)
        for node in nodes:
            world.processes[node].draw(*batches)
        dying = self.some(data, nodes)[:-1] if len(nodes) > 1 else []
        late = set(self.some(data, nodes)).difference(dying)
        for node in dying:
            world.go(node)
        for node in late:
            world.processes[node].rollback()
        world.commit(*set(nodes).difference(dying, late))

    @rule(data=st.data(), batches=st.lists(st.integers(1, 12), min_size=1, max_size=4))
    def own_round(self, data: st.DataObject, batches: list[int]) -> None:
        """Rounds of single nodes, as asynchronous algorithms have them: who begins does so amid others' rounds."""
        world = self.world
        order = data.draw(st.permutations(sorted(world.processes)))
        for node in order:
            world.begin(node)
            world.processes[node].draw(*batches)
        for node in data.draw(st.permutations(order)):
            if data.draw(st.booleans()):
                world.commit(node)
                if data.draw(st.booleans()):
                    world.begin(node)
                    world.processes[node].draw(*batches)
        for process in world.processes.values():
            process.rollback()

    @rule(data=st.data())
    def come(self, data: st.DataObject) -> None:
        for node in self.some(data, [node for node in range(self.everybody_is) if node not in self.world.processes]):
            self.world.come(node)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        for node in self.some(data, sorted(self.world.processes))[1:]:
            self.world.go(node)

    @rule(data=st.data())
    def replaced(self, data: st.DataObject) -> None:
        """They die and are there again before the next round begins."""
        for node in self.some(data, sorted(self.world.processes)):
            self.world.go(node)
            self.world.come(node)

    @rule()
    def resume(self) -> None:
        self.world.restart()

    @invariant()
    def nothing_is_committed_twice(self) -> None:
        if hasattr(self, "world"):
            assert max(self.world.count.values(), default=0) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        goal = world.finish()
        for epoch, counts in world.epochs().items():
            assert set(counts) <= {0, 1}
            assert epoch >= goal or set(counts) == {1}


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=60, stateful_step_count=25)


# --- by example -------------------------------------------------------------------------------------------------------


def test_without_churn_nothing_is_ever_said():
    world = World([10, 7, 12], {0, 1, 2})
    for _ in range(20):
        assert world.ledger.begin(range(3), range(3)) == {}
        world.round(4, 4)
    assert world.ledger.to_json()["extras"] == {}


def test_who_is_back_before_others_have_finished_the_epoch_goes_on_where_it_was():
    world = World([10, 10, 10], {0, 1, 2})
    world.round(4)
    world.go(1)
    world.round(4)
    world.come(1)
    assert world.ledger.begin(range(3), range(3)) == {}
    assert world.ledger.position(1) == Position(0, 4)


def test_what_is_left_of_a_finished_epoch_goes_to_the_others_in_even_shares():
    world = World([10, 10, 10], {0, 1, 2})
    world.round(4)
    world.go(1)
    world.round(6)  # the others' epoch is over
    told = world.ledger.begin((0, 2), (0, 2))
    assert told == {
        0: Place((Segment(1, 0, 4, 7),), Position(1, 0)),
        2: Place((Segment(1, 0, 7, 10),), Position(1, 0)),
    }
    # Who comes back goes on after it, and has back nothing.
    assert world.ledger.begin((0, 1, 2), (0, 1, 2)) == {1: Place((), Position(1, 0))}


def test_what_was_handed_to_a_node_that_is_lost_goes_to_others():
    world = World([10, 10, 10], {0, 1, 2})
    world.go(1)
    world.round(10)
    world.begin(0, 2)
    world.processes[0].draw(3)
    world.commit(0)
    world.processes[2].draw(2)
    world.go(2)  # had drawn two of its five, and committed none
    told = world.ledger.begin((0,), (0,))
    assert told == {0: Place((Segment(1, 0, 3, 10),), Position(1, 0))}


def test_a_node_without_a_part_is_handed_the_last_half_of_the_longest_range():
    world = World([10, 16], {0, 1, 2})
    told = world.ledger.begin((0, 1, 2), (0, 1, 2))
    assert told == {
        1: Place((Segment(1, 0, 0, 8),), Position(1, 0)),
        2: Place((Segment(1, 0, 8, 16),), Position()),
    }


def test_the_parts_of_nodes_that_never_come_are_drawn_by_others():
    world = World([6, 6, 6], {0})
    world.finish()
    assert set(world.epochs()[0]) == {1}


def test_nodes_without_parts_alone_draw_everything():
    world = World([9, 14], {2, 3})
    for _ in range(100):
        world.round(3)
    epochs = world.epochs()
    assert len(epochs) > 10
    assert all(set(counts) == {1} for counts in list(epochs.values())[:-2])


@pytest.mark.parametrize("position", [Position(0, 2), Position(0, 4, 1)])
def test_a_position_that_cannot_be_is_refused(position: Position):
    ledger = DataLedger([10, 10])
    ledger.committed({0: Position(0, 3)})
    with pytest.raises(ValueError, match="node 0 cannot be at"):
        ledger.committed({0: position})


def test_an_epoch_is_due_when_the_fastest_has_finished_it():
    """Node 0 has but four samples, and is through; nobody waits for node 2 with what node 1 has left."""
    world = World([4, 10, 10], {0, 1, 2})
    world.round(4)
    world.go(1)
    told = world.ledger.begin((0, 2), (0, 2))
    assert told[0].extras == (Segment(1, 0, 4, 7),)
    assert told[2].extras == (Segment(1, 0, 7, 10),)


def test_shares_of_an_odd_number_differ_by_one():
    world = World([4, 11, 4], {0, 2})
    world.ledger.committed({0: Position(1, 0), 2: Position(1, 0)})
    told = world.ledger.begin((0, 2), (0, 2))
    assert {node: place.extras for node, place in told.items()} == {
        0: (Segment(1, 0, 0, 6),),
        2: (Segment(1, 0, 6, 11),),
    }


def test_who_has_something_left_is_given_less():
    """Node 0 still has six of another part: of eight more it takes one, and node 3 seven."""
    world = World([4, 6, 8, 4], {0, 2, 3})
    world.ledger.committed({0: Position(1, 0), 2: Position(0, 0), 3: Position(1, 0)})
    world.ledger.impose({0: Place((Segment(1, 0, 0, 6),), Position(1, 0))})
    world.ledger._positions[1] = Position(1, 0)
    world.go(2)
    told = world.ledger.begin((0, 3), (0, 3))
    assert told[0].extras == (Segment(1, 0, 0, 6), Segment(2, 0, 0, 1))
    assert told[3].extras == (Segment(2, 0, 1, 8),)


def test_what_is_to_be_handed_out_is_in_the_order_of_parts_and_epochs():
    """Whoever left first: two controllers that are told of the same losses in another order decide alike."""
    told = []
    for order in ((1, 2), (2, 1)):
        world = World([2, 4, 4], {0, 1, 2})
        world.ledger.committed({0: Position(1, 0)})
        for node in order:
            world.go(node)
            there = {0, 1, 2}.difference(order[: order.index(node) + 1])
            world.ledger._collect(frozenset(there))
        told.append(world.ledger.begin((0,), (0,)))
    assert told[0] == told[1] == {0: Place((Segment(1, 0, 0, 4), Segment(2, 0, 0, 4)), Position(1, 0))}


def test_what_was_handed_of_the_epoch_that_others_are_in_stays_with_its_node():
    """Node 3 holds a range of epoch 0 and one of epoch 1, and is away; only the former is due."""
    world = World([4, 4], {0, 1, 3})
    ours = (Segment(0, 0, 2, 4), Segment(1, 1, 2, 4))
    world.ledger.committed({0: Position(1, 0), 1: Position(1, 0)})
    world.ledger.impose({3: Place(ours, Position())})
    world.go(3)
    told = world.ledger.begin((0, 1), (0, 1))
    assert [one for place in told.values() for one in place.extras] == [Segment(0, 0, 2, 3), Segment(0, 0, 3, 4)]
    assert world.ledger.rest(3) == [Segment(1, 1, 2, 4)]


@pytest.mark.parametrize("same_processes", [True, False])
def test_a_checkpoint_has_what_is_still_to_be_handed_out(same_processes: bool):
    """Node 2 is in the middle of a round when its share is set aside."""
    world = World([4, 9, 4], {0, 2})
    world.ledger.committed({0: Position(1, 0), 2: Position(1, 0)})
    assert world.ledger.begin((0,), (0, 2))[0].extras == (Segment(1, 0, 0, 5),)
    written = json.loads(json.dumps(world.ledger.to_json()))
    again = DataLedger.from_json(written, same_processes=same_processes)
    assert again.begin((2,), (0, 2))[2].extras == (Segment(1, 0, 5, 9),)


def test_after_a_resume_everybody_is_told_once_where_it_is():
    """New processes know nothing, also those of nodes that were never handed anything."""
    world = World([10, 10], {0, 1})
    world.round(4)
    written = json.loads(json.dumps(world.ledger.to_json()))
    again = DataLedger.from_json(written)
    assert again.begin((0, 1), (0, 1)) == {node: Place((), Position(0, 4)) for node in (0, 1)}
    assert again.begin((0, 1), (0, 1)) == {}
    assert DataLedger.from_json(written, same_processes=True).begin((0, 1), (0, 1)) == {}
