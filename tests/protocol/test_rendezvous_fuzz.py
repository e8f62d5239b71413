"""The rendezvous in a world of random delays, losses, stragglers, leaves, fetches that fail and replicas that differ.

The world has a store, nodes with a program and a queue of exchange calls, and messages to the controller that arrive in
any order. A reduced part is modelled as the set of contributions that it was made of: two members have the same bits
where they have the same sets.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.actors.wire.buffers import Signature, TensorSpec
from starling.actors.wire.tickets import Measured, Secured
from starling.algorithms.closing.base import FirstK
from starling.orchestrator.protocol.events import (
    Abort,
    Advance,
    Cancel,
    Commit,
    Deadline,
    Deliver,
    Delivered,
    Diverged,
    GiveUp,
    Lost,
    Measure,
    ProgramsDiverge,
    Reached,
    Secure,
    Withdrawn,
)
from starling.orchestrator.protocol.exchange import Phase
from starling.orchestrator.protocol.rendezvous import Rendezvous
from tests.tickets import changed, post, returned, waits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starling.algorithms.closing import ClosePolicy
    from starling.orchestrator.protocol.events import Decision, Event

MAX_STEPS = 20_000
MEASURE_NBYTES = 8


def measure_of(members: Iterable[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The measure of some contributions says whose they are."""
    return np.array([sum(1 << node for node in members)], dtype=np.int64).view(np.uint8)


@dataclass(frozen=True)
class Plan:
    """One collective operation of the programs."""

    is_gather: bool
    part_nbytes: tuple[tuple[int, ...] | None, ...]
    """Of each node; ``None`` contributes nothing."""
    result_nbytes: tuple[int, ...]
    inline: tuple[bool, ...]
    """Of each node; all alike but in a gather."""
    overlaps: bool
    """It is started, and waited for later."""
    wants: tuple[frozenset[int], ...] | None = None
    """Of a neighbour gather: the in-neighbours of each node."""
    close: ClosePolicy | None = None
    measures: bool = False
    """Of an AllReduce whose aggregator compares whole contributions."""

    def post(self, node: int, seq: int) -> Reached:
        sizes = self.part_nbytes[node]
        tensors = None if self.is_gather or sizes is None else (TensorSpec("", torch.float32, (len(sizes),)),)
        name = "AllReduce" if not self.is_gather else "AllGather" if self.wants is None else "NeighborAllGather"
        return post(
            node,
            seq,
            Signature(name, "", tensors),
            contributes=sizes is not None,
            part_nbytes=sizes or (),
            result_nbytes=() if self.is_gather else self.result_nbytes,
            inline=sizes is not None and self.inline[node],
            waits=not self.overlaps,
            close=self.close,
            wants=None if self.wants is None else self.wants[node],
            measures=self.measures,
        )

    def wanted(self, node: int, closed: Iterable[int]) -> set[int]:
        """Whose contributions a node is to hold in the end."""
        return {one for one in closed if self.wants is None or one in self.wants[node] or one == node}

    def nbytes(self, closed: tuple[int, ...], committed: tuple[int, ...], *, disturbed: bool) -> int:
        """What the exchange takes at least; ``disturbed``: losses may leave fewer makers."""
        num_receivers = len(committed)
        if self.wants is not None:
            return sum(sum(self.part_nbytes[one] or ()) for by in committed for one in self.wants[by] if one in closed)
        sizes = [sum(self.part_nbytes[node] or ()) for node in closed]
        if self.is_gather or all(self.inline[node] for node in closed):
            # A member that has died since may be in closed, and needs nothing any more.
            return sum(sizes) * (num_receivers - 1)
        parts = len(self.result_nbytes)
        measures = parts * (min(parts, len(closed)) - 1) * MEASURE_NBYTES if self.measures and not disturbed else 0
        return (len(closed) - 1) * sizes[0] + (num_receivers - 1) * sum(self.result_nbytes) + measures


@dataclass
class Member:
    """A node: its program's place, its queue of exchange calls, and what it holds."""

    steps: list[tuple[str, int]]
    """``post`` or ``wait`` and the sequence number."""
    place: int = 0
    runnable: bool = True
    stuck_at: int | None = None
    """The step that it never takes, alive as it is; after the last one it is the return."""
    dead: bool = False
    cancelled: bool = False
    calls: deque[tuple[Measure | Secure | Deliver, dict[int, Part]]] = field(default_factory=deque)
    """With the parts that are to be made or fetched."""
    held: dict[int, dict[int, frozenset[int]]] = field(default_factory=dict)
    """Delivered parts of each exchange, as the contributions that they are made of; of a gather, whose it has."""
    kept: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    """Whose contributions to a part of an exchange it has since it measured them."""
    received: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The closed set with which it was advanced."""


@dataclass
class Part:
    """A reduced part in the store, from the moment in which somebody was asked to make it."""

    maker: int
    made_of: frozenset[int] | None = None


class World:
    """One attempt at one round."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        size = rng.randint(1, 6)
        self.need = rng.randint(1, max(1, (size + 1) // 2))
        self.plans = [self._plan(size) for _ in range(rng.randint(1, 4))]
        steps = self._steps()
        self.members = [Member(list(steps)) for _ in range(size)]
        self.heal = rng.random() < 0.5
        # Some programs end with other state than most.
        odd_rate = rng.choice([0.0, 0.0, 0.2, 0.3])
        self.digests = [rng.choice("xy") if rng.random() < odd_rate else "d" for _ in range(size)]
        self.machine = Rendezvous(range(size), self.need, heal=self.heal)
        self.messages: list[Event] = []
        self.parts: dict[tuple[int, int], Part] = {}
        self.burnt: set[int] = set()
        """Nodes whose machine went with them, and all that it held."""
        self.out: set[int] = set()
        """Of whom the machine has said or heard that they are out."""
        self.unreachable: set[tuple[int, int]] = set()
        """(fetcher, holder) that cannot reach one another although both live."""
        self.closed: dict[int, tuple[int, ...]] = {}
        self.healed: Diverged | None = None
        self.ended: Decision | None = None
        self.disturbed = False
        self.log: list[object] = []
        # Some worlds are calm, some fall to pieces.
        self.loss_rate = rng.choice([0.0, 0.0, 0.01, 0.05, 0.2])
        self.deadline_rate = rng.choice([0.0, 0.0, 0.01, 0.1])
        self.leave_rate = rng.choice([0.0, 0.0, 0.0, 0.02, 0.1])
        self.spare = size - self.need
        """How many may be lost or stuck so that the round can still be finished."""
        if rng.random() < 0.3:
            for node in rng.sample(range(size), rng.randint(0, self.spare)):
                self.members[node].stuck_at = rng.randint(0, len(steps))
        if rng.random() < 0.2:
            pairs = [(one, other) for one in range(size) for other in range(size) if one != other]
            self.unreachable = {pair for pair in pairs if rng.random() < 0.15}
            self.disturbed = bool(self.unreachable)

    def _plan(self, size: int) -> Plan:
        rng = self.rng
        is_gather = rng.random() < 0.3
        quiet = rng.choice([0.0, 0.0, 0.3, 0.6])
        speaks = [rng.random() >= quiet for _ in range(size)]
        if not any(speaks) and rng.random() < 0.95:
            speaks[rng.randrange(size)] = True
        small = rng.random() < 0.4
        if is_gather:
            inline = tuple(small or rng.random() < 0.3 for _ in range(size))
            sizes = tuple((rng.randint(1, 100),) if speaks[node] else None for node in range(size))
            wants = None
            if rng.random() < 0.5:
                others = [[one for one in range(size) if one != node and rng.random() < 0.6] for node in range(size)]
                wants = tuple(map(frozenset, others))
            return Plan(True, sizes, (), inline, rng.random() < 0.3, wants, self._policy(size))
        measures = rng.random() < 0.4
        small = small and not measures
        num_parts = 1 if small else rng.randint(1, size)
        parts = tuple(rng.randint(1, 100) for _ in range(num_parts))
        results = tuple(rng.randint(1, 100) for _ in range(num_parts))
        if small:
            results = parts
        sizes = tuple(parts if speaks[node] else None for node in range(size))
        return Plan(False, sizes, results, (small,) * size, rng.random() < 0.3, None, self._policy(size), measures)

    def _policy(self, size: int) -> ClosePolicy | None:
        """Sometimes not all are waited for."""
        return FirstK(k=self.rng.randint(1, size)) if self.rng.random() < 0.1 else None

    def _steps(self) -> list[tuple[str, int]]:
        """Posts in order; each wait somewhere after its post."""
        steps: list[tuple[str, int]] = [("post", seq) for seq in range(len(self.plans))]
        for seq, plan in enumerate(self.plans):
            if plan.overlaps:
                after = steps.index(("post", seq)) + 1
                steps.insert(self.rng.randint(after, len(steps)), ("wait", seq))
        return steps

    # --- what may happen next -------------------------------------------------------------------------------------

    def run(self) -> None:
        idle = 0
        for _ in range(MAX_STEPS):
            if self.machine.over:
                break
            choices = self._choices()
            rare = self.rng.random()
            if self.leave_rate and self.rng.random() < self.leave_rate and self._can_lose():
                self._withdraw()
            elif rare < self.loss_rate and self._can_lose():
                self._lose()
            elif rare < self.loss_rate + self.deadline_rate or not choices:
                idle = 0 if choices else idle + 1
                # With nothing on its way a deadline must help; and if it does not, then the death of who is stuck.
                assert idle <= len(self.plans) + 2, f"a hang: {self._state()}"
                if idle > len(self.plans) + 1 and self._kill_stuck():
                    idle = 0
                else:
                    self._tell(Deadline())
            else:
                idle = 0
                kind, index = self.rng.choice(choices)
                {"run": self._run, "call": self._call, "message": self._message}[kind](index)
        assert self.machine.over, f"no end: {self._state()}"
        assert self.ended is not None
        self._check_end()

    def _choices(self) -> list[tuple[str, int]]:
        choices = [("message", index) for index in range(len(self.messages))]
        for node, member in enumerate(self.members):
            if member.runnable and member.place != member.stuck_at and not member.dead:
                choices.append(("run", node))
            if member.calls and not member.dead:
                choices.append(("call", node))
        return choices

    def _message(self, index: int) -> None:
        self._tell(self.messages.pop(index))

    def _run(self, node: int) -> None:
        """A program takes one step."""
        member = self.members[node]
        if member.cancelled:
            member.runnable = False  # the fence
            return
        if member.place == len(member.steps):
            member.runnable = False
            self.messages.append(returned(node, len(self.plans), self.digests[node]))
            return
        kind, seq = member.steps[member.place]
        member.place += 1
        if kind == "post":
            self.messages.append(self.plans[seq].post(node, seq))
            member.runnable = self.plans[seq].overlaps
        else:
            self.messages.append(waits(node, seq))
            member.runnable = False

    def _call(self, node: int) -> None:
        """A node carries out the next call in its exchange queue."""
        member = self.members[node]
        call, parts = member.calls.popleft()
        if isinstance(call, Measure):
            kept = member.kept.get((call.seq, call.part), frozenset())
            assert call.held <= kept
            got = frozenset(one for one in call.members if one in kept or self._reaches(node, one))
            member.kept[call.seq, call.part] = kept | got
            self.messages.append(Measured(call.seq, call.part, node, got, call.generation, measure_of(got)))
            return
        if isinstance(call, Secure):
            kept = member.kept.get((call.seq, call.part), frozenset())
            assert call.held <= kept
            got = frozenset(one for one in call.members if one in kept or self._reaches(node, one))
            if self.plans[call.seq].measures:
                # The coefficients of a combination are of those contributions that were measured, in all parts.
                parts_of = len(self.plans[call.seq].result_nbytes)
                assert [one.part for one in call.measured] == list(range(parts_of))
                whole = measure_of(call.members)
                assert all(np.array_equal(one.values, whole) for one in call.measured)
            if self.plans[call.seq].is_gather:
                member.held[call.seq] = {one: frozenset({one}) for one in got}
            else:
                parts[call.part].made_of = got
            self.messages.append(Secured(call.seq, call.part, node, got, call.generation))
            return
        missing = frozenset(index for index, part in parts.items() if not self._reaches(node, part.maker))
        if not missing and parts:
            made = {index: part.made_of for index, part in parts.items()}
            assert None not in made.values(), "a part is delivered before it is made"
            member.held[call.seq] = {index: one for index, one in made.items() if one is not None}
        self.messages.append(Delivered(call.seq, node, call.generation, missing))

    def _reaches(self, fetcher: int, holder: int) -> bool:
        return fetcher == holder or (holder not in self.burnt and (fetcher, holder) not in self.unreachable)

    def _can_lose(self) -> bool:
        lost = sum(member.dead or member.cancelled or member.stuck_at is not None for member in self.members)
        # One world in ten may lose more than it can do without.
        return lost < self.spare or (lost < len(self.members) and self.rng.random() < 0.1)

    def _lose(self) -> None:
        node = self.rng.choice([node for node, member in enumerate(self.members) if not member.dead])
        self._kill(node)

    def _withdraw(self) -> None:
        """The time of a node that was told to leave is over; it may be gone already, and is soon."""
        node = self.rng.choice([node for node, member in enumerate(self.members) if not member.cancelled])
        self._tell(Withdrawn(node))
        assert node in self.out or self.machine.over
        assert node not in self.machine.active
        if not self.members[node].dead:
            self.messages.append(Lost(node))

    def _kill_stuck(self) -> bool:
        stuck = [node for node, member in enumerate(self.members) if member.stuck_at is not None and not member.dead]
        if stuck:
            self._kill(stuck[0])
        return bool(stuck)

    def _kill(self, node: int) -> None:
        self.disturbed = True
        self.members[node].dead = True
        if self.rng.random() < 0.5:
            self.burnt.add(node)
        self.messages.append(Lost(node))

    # --- the controller -------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self.log.append(event)
        if isinstance(event, Lost):
            self.out.add(event.node)
        for decision in self.machine.handle(event):
            self.log.append(decision)
            assert self.ended is None, "a decision after the end"
            self._perform(decision)

    def _perform(self, decision: Decision) -> None:
        match decision:
            case Measure(seq, part, by, members):
                assert by not in self.out
                assert members
                self.members[by].calls.append((decision, {}))
            case Secure(seq, part, by, members):
                assert by not in self.out
                assert members or self.plans[seq].wants is not None
                self.parts[seq, part] = Part(by)
                self.members[by].calls.append((decision, {part: self.parts[seq, part]}))
            case Deliver(seq, nodes, _, makers):
                assert not self.out & set(nodes)
                refs = {part: self.parts[seq, part] for part in range(len(makers))}
                assert all(part.maker == maker for part, maker in zip(refs.values(), makers, strict=True))
                for node in nodes:
                    self.members[node].calls.append((decision, refs))
            case Advance():
                self._advance(decision)
            case Cancel(node):
                assert node not in self.out
                self.disturbed = True
                self.out.add(node)
                self.members[node].cancelled = True
            case GiveUp():
                pass
            case Diverged(healed=True):
                assert self.healed is None
                self.healed = decision
            case Abort() | Commit() | Diverged() | ProgramsDiverge():
                self.ended = decision

    def _advance(self, decision: Advance) -> None:
        seq, nodes, closed = decision.seq, decision.nodes, decision.closed
        plan = self.plans[seq]
        assert closed == tuple(sorted(closed))
        assert self.closed.setdefault(seq, closed) == closed, "two closed sets for one exchange"
        assert all(plan.part_nbytes[node] is not None for node in closed)
        assert all(plan.inline[node] for node in closed) or not decision.inline
        assert not self.out & set(nodes)
        receivers = {node for node in self.machine.active if plan.part_nbytes[node] is None}
        assert len(receivers.union(closed)) >= self.need
        if not decision.inline:
            # Nobody runs on before all that are active hold the result, and it is made of the closed set.
            for node in self.machine.active:
                held = self.members[node].held[seq]
                if plan.is_gather:
                    assert held.keys() >= plan.wanted(node, closed)
                else:
                    assert held.keys() == set(range(len(plan.result_nbytes)))
                    assert set(held.values()) == {frozenset(closed)}
        for node in nodes:
            assert seq not in self.members[node].received
            self.members[node].received[seq] = closed
            self.members[node].runnable = True

    # --- how it may end -------------------------------------------------------------------------------------------

    def _check_end(self) -> None:
        assert not isinstance(self.ended, ProgramsDiverge)
        if isinstance(self.ended, Diverged):
            self._check_groups(self.ended)
            return
        speechless = any(all(sizes is None for sizes in plan.part_nbytes) for plan in self.plans)
        if isinstance(self.ended, Abort):
            assert self.disturbed or speechless
            return
        assert isinstance(self.ended, Commit)
        committed = self.ended.members
        assert len({self.digests[node] for node in committed}) == 1
        if self.healed is not None:
            self._check_groups(self.healed)
            assert committed == self.healed.groups[0]
        assert set(committed) == self.machine.active
        assert len(committed) >= self.need
        assert self.machine.exchanges.keys() == set(range(len(self.plans)))
        assert all(exchange.phase is Phase.CLOSED for exchange in self.machine.exchanges.values())
        for node in committed:
            assert self.members[node].received == self.closed
            spoke = {seq for seq, plan in enumerate(self.plans) if plan.part_nbytes[node] is not None}
            assert spoke == {seq for seq, closed in self.closed.items() if node in closed}
        least = sum(
            plan.nbytes(self.closed[seq], committed, disturbed=self.disturbed) for seq, plan in enumerate(self.plans)
        )
        assert self.machine.payload_nbytes >= least
        if not self.disturbed:
            assert self.machine.payload_nbytes == least

    def _check_groups(self, diverged: Diverged) -> None:
        """Everybody who came to the end is named once, with those of the same state; and most of them heal the rest."""
        groups = diverged.groups
        nodes = [node for group in groups for node in group]
        assert len(nodes) == len(set(nodes))
        assert self.machine.active <= set(nodes)
        assert len({self.digests[group[0]] for group in groups}) == len(groups) > 1
        assert all(self.digests[node] == self.digests[group[0]] for group in groups for node in group)
        assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)
        most = len(groups[0])
        assert diverged.healed == (self.heal and 2 * most > len(nodes) and most >= self.need)
        if diverged.healed:
            assert self.out >= {node for group in groups[1:] for node in group}

    def _state(self) -> str:
        return "\n".join([f"need {self.need}", *map(str, self.plans), *map(str, self.members), *map(str, self.log)])


def run_world(rng: random.Random) -> World:
    world = World(rng)
    world.run()
    return world


@given(st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_any_order_of_events(rng: random.Random):
    run_world(rng)


def test_many_worlds():
    """More of them than hypothesis can look at in the same time, and enough of each kind to mean something."""
    ends: Counter[str] = Counter()
    for seed in range(3000):
        world = run_world(random.Random(seed))
        ends[type(world.ended).__name__] += 1
        ends["remade"] += any(exchange.generation > 1 for exchange in world.machine.exchanges.values())
        ends["measured again"] += any(
            exchange.measures and exchange.generation > 2 for exchange in world.machine.exchanges.values()
        )
        ends["shrunk"] += isinstance(world.ended, Commit) and len(world.ended.members) < len(world.members)
        ends["equal"] += not world.disturbed
        ends["healed"] += world.healed is not None
        ends["left"] += any(isinstance(entry, Withdrawn) for entry in world.log)
    assert ends["Commit"] > 1500
    rare = ("Abort", "Diverged", "healed", "left", "measured again", "remade", "shrunk", "equal")
    assert min(ends[one] for one in rare) > 60, ends


@pytest.mark.parametrize("kind", ["more", "less", "other"])
def test_programs_that_differ_are_found_out(kind: str):
    """One node's program has one operation more, or less, or another one: the round fails, and never hangs."""
    for seed in range(100):
        rng = random.Random(seed)
        size = rng.randint(2, 6)
        plans = [World(rng)._plan(size) for _ in range(rng.randint(1, 4))]
        plans = [replace(plan, overlaps=False, close=None) for plan in plans]
        odd = rng.randrange(size)
        programs: list[deque[Event]] = []
        for node in range(size):
            posts = [plan.post(node, seq) for seq, plan in enumerate(plans)]
            if node == odd and kind == "more":
                posts.append(changed(posts[0], seq=len(posts)))
            elif node == odd and kind == "less":
                posts.pop()
            elif node == odd:
                place = rng.randrange(len(posts))
                posts[place] = changed(posts[place], signature=Signature("AllReduce", "another", None))
            programs.append(deque([*posts, returned(node, len(posts), "d")]))
        (end,) = [one for one in _drive(programs, rng) if isinstance(one, Abort | Commit | ProgramsDiverge)]
        if isinstance(end, ProgramsDiverge):
            assert odd in (end.first, end.second)
        else:
            assert isinstance(end, Abort)
            assert "nobody contributes" in end.reason


def _drive(programs: list[deque[Event]], rng: random.Random) -> list[Decision]:
    """Run programs of posts to their ends, in random order, with everything else done at once."""
    machine = Rendezvous(range(len(programs)), 1)
    decisions: list[Decision] = []
    waiting: set[int] = set()
    while not machine.over:
        node = rng.choice([node for node, program in enumerate(programs) if program and node not in waiting])
        queue = deque([programs[node].popleft()])
        waiting.add(node)
        while queue:
            for decision in machine.handle(queue.popleft()):
                decisions.append(decision)
                match decision:
                    case Advance(_, nodes):
                        waiting.difference_update(nodes)
                    case Measure(seq, part, by, members, generation):
                        got = frozenset(members)
                        queue.append(Measured(seq, part, by, got, generation, measure_of(got)))
                    case Secure(seq, part, by, members, generation):
                        queue.append(Secured(seq, part, by, frozenset(members), generation))
                    case Deliver(seq, nodes, _, _, generation):
                        queue.extend(Delivered(seq, one, generation) for one in nodes)
                    case _:
                        pass
    return decisions
