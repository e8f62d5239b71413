"""Long random histories of nodes that die, hang, leave, come late and are replaced, with spares and without.

Whatever happens, a run ends, or says in one line why it cannot; its replicas are equal; its books are right; and the
same history leads to the same end.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.algorithms.api import AllGather, AllReduce, Node, Train
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError, RunError
from starling.orchestrator.protocol import pool
from tests.toys import Program, Ran, attempt

if TYPE_CHECKING:
    from collections.abc import Callable


class Busy(Program, name="test_busy"):
    """Two exchanges in a round, with work between; shared and local state."""

    def init(self, node: Node) -> None:
        node.shared["rounds"] = 0
        node.local["mine"] = 0

    async def round(self, node: Node) -> None:
        await Train(steps=1)
        mean = await AllReduce(node.parameters)
        node.parameters.copy_(mean.value)
        await Train(steps=1)
        seen = await AllGather(node.parameters[:1].clone())
        rounds: Any = node.shared["rounds"]
        node.shared["rounds"] = rounds + 1
        node.parameters.fill_(sum(float(one[0]) for one in seen.values()) / len(seen))


TASK = {"name": "quadratic", "dimension": 40, "condition": 2, "samples_per_node": 1}
LARGE = {"name": "digits", "model": {"name": "mlp", "width": 300}}
"""Travels in parts, through the steps of large exchanges."""

SYNCHRONOUS: tuple[tuple[Any, Any], ...] = (
    ("test_busy", TASK),
    ({"name": "fedavg", "steps": 2, "fraction": 0.6}, TASK),
    ({"name": "fedavg", "steps": 1}, LARGE),
    ({"name": "diloco", "inner_steps": 2}, TASK),
    ({"name": "scaffold", "steps": 2}, TASK),
    ({"name": "dsgd", "steps": 1}, TASK),
    ({"name": "gradient_tracking", "steps": 1}, TASK),
)
PHASES = ("train", "post", "secure", "deliver", "commit", "transfer")


def history(rng: random.Random, phases: tuple[str, ...], *, has_server: bool = False) -> dict[str, Any]:
    """The keys of a configuration in which much goes wrong."""
    nodes, rounds = rng.randint(2, 6), rng.randint(10, 30)
    late = rng.sample(range(nodes), rng.choice([0, 0, 1, nodes // 2]))
    events = [{"kind": "late_join", "node": node, "round": rng.randrange(rounds)} for node in late[: nodes - 1]]
    # Bad times come together: what happens while a loss is being made good is what nobody thinks of.
    times = [rng.randrange(rounds) for _ in range(rng.randint(1, 4))]
    for _ in range(rng.randint(0, 16)):
        node = rng.choice([*range(nodes), *(["server"] if has_server else [])])
        number = min(rounds - 1, rng.choice(times) + rng.choice([0, 0, 0, 1, 1, 2]))
        kind = rng.choice(["kill", "kill", "hang", "preempt"])
        events.append({"kind": kind, "node": node, "round": number, "phase": rng.choice(phases)})
    least = rng.choice([1, 1, 1, 2, nodes])
    return {
        "rounds": rounds,
        "faults": {"events": events},
        "cluster": {
            "nodes": {"min": min(least, nodes - len(late)), "target": nodes},
            "warm_spares": rng.choice([0, 0, 1, 2]),
            "round_deadline_s": rng.choice([0.3, 2]),
            "cancel_grace_s": rng.choice([0.05, 0.5]),
            "drain_s": rng.choice([0.03, 0.2, 2]),
            "min_nodes_timeout_s": 60,
        },
        "network": {
            "start_s": rng.choice([0, 0.02, 0.15]),
            "adopt_s": rng.choice([0, 0.01]),
            "step_ms": rng.choice([5, 20]),
            "speeds": {0: rng.choice([0.2, 1.0])},
            "bandwidth_mbps": rng.choice([None, None, 20]),
            "latency_ms": rng.choice([0, 3]),
        },
        "evaluation": {"every_rounds": 0, "max_batches": 1},
        "optimizer": {"name": "sgd", "lr": 0.05},
    }


def live(raw: dict[str, Any], check: Callable[[Ran], None]) -> Ran:
    """Live through a history twice, and check its end."""
    ran, again = attempt(raw), attempt(raw)
    assert again.events == ran.events
    assert str(again.error) == str(ran.error)
    assert isinstance(ran.error, RunError | None), ran.error
    assert ran.summary is not None
    check_books(ran)
    check(ran)
    if ran.error is None:
        assert again.digest == ran.digest
        assert ran.summary.rounds == len(ran.rounds) == raw["rounds"]
    else:
        assert "\n" not in str(ran.error)
        assert str(ran.error)
    return ran


def check_books(ran: Ran) -> None:
    """Everybody comes before they go, and the sums say who is there."""
    assert ran.summary is not None
    alive: set[int] = set()
    counts: Counter[str] = Counter()
    for event in ran.events:
        match event["event"]:
            case "start":
                alive.update(event["nodes"])
                counts["started"] += len(event["nodes"])
            case "up":
                assert event["node"] not in alive
                alive.add(event["node"])
                counts["joined"] += 1
            case "lost" | "left":
                assert event["node"] in alive
                alive.discard(event["node"])
                counts["lost" if event["event"] == "lost" else "drained"] += 1
            case "transfer":
                assert event["node"] in alive
            case _:
                pass
    nodes = ran.summary.nodes
    assert nodes == {"joined": 0, "lost": 0, "drained": 0} | counts
    assert nodes["started"] + nodes["joined"] - nodes["lost"] - nodes["drained"] == len(alive)


def check_synchronous(ran: Ran) -> None:
    """Every round is committed once, in order, by members of its view that are alive; donors have the last."""
    at = -1
    view: set[int] = set()
    alive: set[int] = set()
    committed: set[int] = set()
    given: set[int] = set()
    for event in ran.events:
        match event["event"]:
            case "start":
                alive.update(event["nodes"])
            case "up":
                alive.add(event["node"])
            case "lost" | "left":
                alive.discard(event["node"])
                given.discard(event["node"])
            case "begin":
                assert event["round"] == at + 1
                view = set(event["view"])
                assert view <= alive
                assert len(view) >= ran.config.cluster.nodes.min
                need = event["need"]
            case "commit":
                assert event["round"] == at + 1
                at, committed, given = event["round"], set(event["committed"]), set[int]()
                assert committed <= view & alive
                assert len(committed) >= need
            case "transfer" if event["donor"] != event["node"]:
                assert event["donor"] in committed | given
                given.add(event["node"])
            case _:
                pass
    assert ran.summary is not None
    assert at == ran.summary.rounds - 1
    if ran.config.algorithm.replicated and ran.error is None:
        struck = {event["node"] for event in ran.sought("fault") if (event["round"], event["phase"]) == (at, "commit")}
        sound = committed & alive - struck
        assert len({ran.replicas[node].shared.digest() for node in sound}) <= 1


def check_asynchronous(ran: Ran) -> None:
    """Every node commits its rounds one after the other, through all its lives."""
    rounds: Counter[int] = Counter()
    alive: set[int] = set()
    for event in ran.events:
        match event["event"]:
            case "start":
                alive.update(event["nodes"])
            case "up":
                alive.add(event["node"])
            case "lost" | "left":
                alive.discard(event["node"])
            case "commit":
                assert event["node"] in alive
                assert event["round"] == rounds[event["node"]]
                rounds[event["node"]] += 1
            case _:
                pass


def synchronous(rng: random.Random) -> Ran | None:
    algorithm, task = rng.choice(SYNCHRONOUS)
    return _lived({"algorithm": algorithm, "task": task} | history(rng, PHASES), check_synchronous)


def asynchronous(rng: random.Random) -> Ran | None:
    algorithm = {"name": "fedbuff", "buffer_size": rng.randint(1, 3), "steps": 1}
    phases = ("train", "receive", "commit", "transfer")
    return _lived({"algorithm": algorithm, "task": TASK} | history(rng, phases, has_server=True), check_asynchronous)


def _lived(raw: dict[str, Any], check: Callable[[Ran], None]) -> Ran | None:
    base = {"tracking": "none", "on_nan": "stop"}
    try:
        parse(base | raw)
    except ConfigError:
        return None  # no such run
    return live(base | raw, check)


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_any_synchronous_history(rng: random.Random):
    synchronous(rng)


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_any_asynchronous_history(rng: random.Random):
    asynchronous(rng)


@pytest.mark.slow
@pytest.mark.parametrize("which", [synchronous, asynchronous])
def test_many_histories(which: Callable[[random.Random], Ran | None]):
    """More than hypothesis can look at in the same time, and enough of each kind to mean something."""
    ends: Counter[str] = Counter()
    for seed in range(24):
        ran = which(random.Random(seed))
        if ran is None:
            continue
        assert ran.summary is not None
        ends["failed" if ran.error else "finished"] += 1
        ends.update(f"had {what}" for what, count in ran.summary.nodes.items() if count)
        ends.update({event["event"] for event in ran.events})
    assert ends["finished"] > 12
    assert min(ends[one] for one in ("had joined", "had lost", "had drained", "transfer", "late")) > 1, ends
    if which is synchronous:
        assert ends["failed"] > 1
    else:
        assert ends["failed"] == 0, "its server is brought back each time, and who is there waits for it"


# --- what such histories have shown -----------------------------------------------------------------------------------

FEDAVG: dict[str, Any] = {"algorithm": {"name": "fedavg", "steps": 2}, "task": TASK}


def fault(node: int, number: int, phase: str = "train", kind: str = "kill") -> dict[str, Any]:
    return {"kind": kind, "node": node, "round": number, "phase": phase}


@pytest.mark.parametrize("phase", ["train", "secure"])
def test_a_round_that_nobody_can_finish_is_given_up_and_begun_again(phase: str):
    """One hangs, and is needed."""
    ran = attempt(
        FEDAVG | {"task": LARGE},
        nodes=3,
        rounds=5,
        faults={"events": [fault(1, 2, phase, "hang")]},
        cluster={"nodes": {"min": 3, "target": 3}, "round_deadline_s": 5, "min_nodes_timeout_s": 20},
    )
    assert ran.error is None
    (abort,) = ran.sought("abort")
    assert abort["reason"].startswith("2 of 3 members are left, 3 are needed")
    assert [one["node"] for one in ran.sought("lost")] == [1]
    assert [one["round"] for one in ran.sought("commit")] == [*range(5)]
    assert ran.sought("commit")[-1]["committed"] == (0, 1, 2)


def test_a_round_takes_as_long_as_it_takes_while_nobody_waits():
    slow = FEDAVG | {"algorithm": {"name": "fedavg", "steps": 100}, "network": {"step_ms": 1000}}
    cluster = {"nodes": {"target": 2}, "round_deadline_s": 5, "min_nodes_timeout_s": 20}
    ran = attempt(slow, nodes=2, rounds=3, cluster=cluster)
    assert ran.error is None
    assert ran.virtual_seconds == pytest.approx(300)


def test_who_is_only_slow_fails_the_second_time_when_others_cannot_do_without():
    slow = FEDAVG | {"algorithm": {"name": "fedavg", "steps": 100}, "network": {"step_ms": 1000, "speeds": {1: 10}}}
    cluster = {"nodes": {"min": 2, "target": 2}, "round_deadline_s": 5, "min_nodes_timeout_s": 20}
    ran = attempt(slow, nodes=2, rounds=3, cluster=cluster)
    assert isinstance(ran.error, RunError)
    assert "raise round_deadline_s if they are only slow" in str(ran.error)
    assert len(ran.sought("abort")) == 2


def test_the_last_who_has_the_model_may_leave():
    """One dies; the other, while it gives that one's replacement its state, is told to leave, and does."""
    ran = attempt(
        FEDAVG | {"network": {"start_s": 0.1, "bandwidth_mbps": 1}},
        nodes=2,
        rounds=6,
        faults={"events": [fault(1, 2, "commit"), fault(0, 3, "transfer", "preempt")]},
        cluster={"nodes": {"min": 2, "target": 2}},
    )
    assert ran.error is None
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 2, "joined": 2, "lost": 1, "drained": 1}
    transfers = [(one["node"], one["donor"]) for one in ran.sought("transfer")]
    assert transfers == [(0, 0), (1, 0)]
    assert [one["round"] for one in ran.sought("commit")] == [*range(6)]


def test_the_only_donor_may_leave_while_it_gives_to_a_late_node():
    """Node 0 was late in the first round: node 1 alone has the model, and is told to leave as it gives it to node 0."""
    ran = attempt(
        {
            "algorithm": "ddp",
            "task": {"name": "tests.soak.programs:Unequal", "width": 3000},
            "data": {"batch_size": 16},
        },
        nodes=2,
        rounds=2,
        network={"start_s": 0, "bandwidth_mbps": 2},
        faults={"events": [fault(1, 1, "transfer", "preempt")]},
        cluster={"nodes": {"min": 1, "target": 2}, "quorum_fraction": 0.5, "round_deadline_s": 0.02, "drain_s": 2},
    )
    assert ran.error is None
    assert [one["node"] for one in ran.sought("late")] == [0, 0]
    assert [(one["node"], one["donor"]) for one in ran.sought("transfer")] == [(1, 1), (0, 1)]


def test_faults_at_one_moment_are_one_loss():
    twice = attempt(FEDAVG, nodes=3, rounds=4, faults={"events": [fault(1, 1), fault(1, 1), fault(1, 1, kind="hang")]})
    assert twice.error is None
    assert twice.summary is not None
    assert twice.summary.nodes["lost"] == 1


def test_what_the_dead_have_contributed_outlives_their_replacement():
    """Who takes the place is there before the exchange is over."""
    ran = attempt(
        FEDAVG | {"task": LARGE, "network": {"start_s": 0, "latency_ms": 50, "bandwidth_mbps": 10}},
        nodes=3,
        rounds=4,
        faults={"events": [fault(0, 1, "secure"), fault(0, 2, "post"), fault(1, 3, "deliver")]},
    )
    assert ran.error is None
    assert [one["round"] for one in ran.sought("commit")] == [*range(4)]


def test_a_server_that_is_killed_as_it_is_to_leave_is_lost_once():
    events = [{"kind": "preempt", "node": "server", "round": 3}]
    events += [{"kind": "kill", "node": "server", "round": number, "phase": "commit"} for number in (3, 4)]
    ran = attempt(
        {"algorithm": {"name": "fedbuff", "buffer_size": 2, "steps": 1}, "task": TASK, "network": {"start_s": 0}},
        nodes=3,
        rounds=12,
        faults={"events": events},
    )
    assert ran.error is None
    check_books(ran)
    check_asynchronous(ran)


def test_a_run_without_hope_ends_at_once():
    """All who have the model are gone, and too few come back to find that out."""
    ran = attempt(
        FEDAVG | {"network": {"start_s": 50, "step_ms": 10}},
        nodes=3,
        rounds=6,
        faults={"events": [fault(node, 2) for node in range(3)] + [fault(node, 2, "commit") for node in range(3)]},
        cluster={"nodes": {"min": 3, "target": 3}, "min_nodes_timeout_s": 500},
    )
    assert str(ran.error) == "round 2: no node is left that has the model of round 1"
    assert ran.virtual_seconds < 50


WALK = {"algorithm": {"name": "random_walk"}, "task": TASK}
FEDBUFF = {"algorithm": {"name": "fedbuff", "buffer_size": 1, "steps": 1}, "task": TASK}


@pytest.mark.parametrize("raw", [FEDAVG, WALK, FEDBUFF], ids=["barrier", "no server", "server"])
def test_a_run_ends_at_once_when_too_few_can_come_any_more(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "_MAX_CRASHES", 0)
    ran = attempt(
        raw | {"network": {"start_s": 50, "step_ms": 10}},
        nodes=3,
        rounds=60,
        faults={"events": [fault(1, 2)]},
        cluster={"nodes": {"min": 3, "target": 3}, "min_nodes_timeout_s": 500},
    )
    said = "2 nodes are there, and cluster.nodes.min is 3; the others have failed too often to be started again"
    assert str(ran.error).removeprefix("round 2: ") == said
    assert ran.virtual_seconds < 50


def test_a_node_that_joins_later_is_waited_for_without_a_barrier(monkeypatch: pytest.MonkeyPatch):
    """Rounds go on meanwhile, and the one in which it joins comes; with a barrier it would not."""
    monkeypatch.setattr(pool, "_MAX_CRASHES", 0)
    keys: dict[str, Any] = {
        "nodes": 4,
        "rounds": 30,
        "faults": {"events": [fault(1, 2), {"kind": "late_join", "node": 3, "round": 20}]},
        "cluster": {"nodes": {"min": 3, "target": 4}, "min_nodes_timeout_s": 500},
    }
    assert attempt(FEDBUFF | {"network": {"start_s": 0, "step_ms": 10}}, **keys).error is None
    ran = attempt(FEDAVG | {"network": {"start_s": 0, "step_ms": 10}}, **keys)
    assert "failed too often" in str(ran.error)


def test_without_a_server_a_run_ends_at_once_when_all_who_had_the_model_are_gone():
    ran = attempt(
        WALK | {"network": {"start_s": 50, "step_ms": 10}},
        nodes=2,
        rounds=60,
        faults={"events": [fault(0, 2), fault(1, 2)]},
        cluster={"nodes": {"min": 2, "target": 2}, "min_nodes_timeout_s": 500},
    )
    assert "no node is left that has a model that was trained" in str(ran.error)
    assert ran.virtual_seconds < 50


@pytest.mark.parametrize("fraction", [1.0, 0.8])
def test_a_round_with_too_few_for_its_aggregator_begins_again_when_they_are_there(fraction: float):
    algorithm = {"name": "fedavg", "steps": 2, "fraction": fraction, "aggregator": {"name": "trimmed_mean", "trim": 1}}
    ran = attempt(
        {"algorithm": algorithm, "task": TASK, "network": {"start_s": 5, "step_ms": 10}},
        nodes=4,
        rounds=5,
        faults={"events": [fault(1, 2), fault(2, 2), fault(3, 4, "commit")]},
        cluster={"nodes": {"min": 1, "target": 4}, "quorum_fraction": 0.1},
    )
    assert ran.error is None
    assert ran.sought("abort")[0]["reason"].endswith("and its aggregator needs 3")
    assert all(record.contributing >= 3 for record in ran.rounds)
    assert [one["round"] for one in ran.sought("commit")] == [*range(5)]


def test_an_aggregator_that_never_has_enough_is_refused():
    algorithm = {"name": "fedavg", "fraction": 0.5, "aggregator": {"name": "trimmed_mean", "trim": 1}}
    with pytest.raises(ConfigError, match="algorithm.aggregator: trimmed_mean needs 3 contributions, and of 4 nodes"):
        parse({"algorithm": algorithm, "task": TASK, "cluster": {"nodes": {"target": 4}}})
