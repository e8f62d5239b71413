"""Fault histories: the shortest one of each kind of fault that was found, and a slice of ``make soak``."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from starling.algorithms.api import SERVER, AllGather, AllReduce, Node, Train
from starling.orchestrator.config.schema import parse
from starling.orchestrator.protocol.faults import Faults
from starling.orchestrator.protocol.mailboxes import Delivery, Mailroom
from starling.orchestrator.protocol.pool import Pool
from starling.orchestrator.runtimes.simulator.processes import SimulatedProcesses
from starling.orchestrator.runtimes.simulator.state import End
from tests.soak.histories import algorithms, draw
from tests.soak.shrink import shrink
from tests.soak.states import Watched
from tests.soak.watch import Wrong, check_last_words, live
from tests.toys import Program, attempt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

UNEQUAL = "tests.soak.programs:Unequal"


def history(algorithm: Any, *faults: tuple[str, Any, int, str], nodes: int = 3, **keys: Any) -> dict[str, Any]:
    """A configuration; ``faults`` are (kind, node, round, phase)."""
    network, cluster = ({"start_s": 0.02} | keys.pop("network", {})), ({"min": 1} | keys.pop("least", {}))
    events = [{"kind": kind, "node": node, "round": number, "phase": phase} for kind, node, number, phase in faults]
    return {
        "rounds": max((number for _, _, number, _ in faults), default=0) + 4,
        "algorithm": algorithm,
        "task": UNEQUAL,
        "tracking": "none",
        "optimizer": {"lr": 0.01},
        "evaluation": {"every_rounds": 0},
        "network": network,
        "cluster": {"nodes": cluster | {"target": nodes}} | keys.pop("cluster", {}),
        "faults": {"events": events},
    } | keys


DRAINED = ("kill", 1, 2, "post"), ("preempt", 1, 3, "secure")
"""Whoever takes the place of a node that died is told to leave before it has been given anything."""


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "diloco", "inner_steps": 2},
        {"name": "fedavg", "steps": 2},
        {"name": "dsgd", "steps": 2},
        {"name": "gradient_tracking", "steps": 2},
        {"name": "single_merge", "steps": 2, "neighbors": 2.0},
        {"name": "mezo", "lr": 0.01},
        {"name": "just_one_byte"},
    ],
    ids=lambda one: one["name"],
)
def test_a_replacement_that_is_told_to_leave_before_its_first_commit_hands_over_nothing(algorithm: dict[str, Any]):
    raw = history(algorithm, *DRAINED, network={"start_s": 0.01, "step_ms": 20})
    assert live(raw) == "finished"
    ran = attempt(raw)
    assert [event["kept_nbytes"] for event in ran.sought("left")] == [0]


def test_what_a_predecessor_handed_over_outlives_a_replacement_that_leaves_at_once():
    raw = history(
        {"name": "tests.soak.programs:Mixer"},
        ("preempt", 1, 2, "train"),
        ("preempt", 1, 3, "train"),
        network={"start_s": 0.015},
        cluster={"drain_s": 0.005},
    )
    assert live(raw) == "finished"


def test_rounds_without_a_barrier_that_are_always_late_end_the_run():
    raw = history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, network={"step_ms": 100})
    for algorithm in (raw["algorithm"], "random_walk"):
        ran = attempt(raw | {"algorithm": algorithm, "cluster": {"nodes": {"target": 3}, "round_deadline_s": 0.05}})
        assert str(ran.error) == (
            "node 0 cannot finish its round 0: it computes for longer than 0.05 s without a word, tried 10 times; "
            "raise cluster.round_deadline_s if it is only slow"
        )


def test_a_worker_that_is_always_late_does_not_end_a_run_that_goes_on():
    raw = history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, network={"speeds": {0: 0.1}}, rounds=60)
    ran = attempt(raw | {"cluster": {"nodes": {"target": 3}, "round_deadline_s": 0.05}})
    assert ran.error is None
    assert len(ran.sought("late")) > 10


def test_a_server_that_is_given_up_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    """Each that is started in its place dies as it comes."""

    def launch(processes: SimulatedProcesses, nodes: Sequence[int]) -> None:
        real(processes, nodes)
        if SERVER in nodes:
            when = processes._clock.now + processes._config.network.start_s
            processes._clock.at(when, SERVER, End(SERVER, processes._incarnations[SERVER]))

    real = SimulatedProcesses.launch
    monkeypatch.setattr(SimulatedProcesses, "launch", launch)
    ran = attempt(history({"name": "fedbuff", "buffer_size": 2, "steps": 1}, ("kill", "server", 3, "train")))
    assert str(ran.error).startswith("the server (simulated) was lost in round 3: ")
    assert str(ran.error).endswith("it has died too often to be started again, and nobody else has the model")
    assert len([event for event in ran.sought("lost") if event["node"] == SERVER]) == 6


@pytest.mark.parametrize("algorithm", [{"name": "fedbuff", "buffer_size": 3}, {"name": "async_diloco"}], ids=str)
@pytest.mark.parametrize("kind", ["kill", "preempt", "late_join"])
def test_who_joins_is_as_old_as_what_it_begins_with(algorithm: Any, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Not by the whole run: its first update counts like any other."""
    steps = {"fedbuff": {"steps": 1}, "async_diloco": {"inner_steps": 2, "lr": 0.1}}[algorithm["name"]]
    number = 20 if kind == "late_join" else 5
    found: list[int] = []

    def serve(room: Mailroom, node: int) -> list[Any]:
        handovers = real(room, node)
        found.extend(
            one.outcome.staleness for one in handovers if one.node == SERVER and isinstance(one.outcome, Delivery)
        )
        return handovers

    real = Mailroom._serve
    monkeypatch.setattr(Mailroom, "_serve", serve)
    ran = attempt(history(algorithm | steps, (kind, 1, number, "train"), nodes=4, rounds=60))
    assert ran.error is None
    assert ran.summary is not None
    assert ran.summary.nodes["joined"] == 1
    assert 0 < max(found) <= 4


def test_updates_of_workers_that_come_back_count_though_all_were_lost():
    """Also while the server does not know yet that anybody is there."""
    faults = [("kill", node, number, "receive") for node in (0, 1) for number in (2, 3)]
    for rule in ("delayed_nesterov", "delayed_sgd"):
        algorithm = {"name": "async_diloco", "inner_steps": 2, "lr": 0.1, "rule": rule}
        assert live(history(algorithm, *faults, nodes=2, rounds=20)) == "finished"


def test_a_first_member_that_comes_late_begins_no_second_walk():
    ran = attempt(history("random_walk", ("late_join", 0, 2, "train"), rounds=12))
    assert ran.error is None
    received = [
        tuple(event["outcome"]) for event in ran.sought("received") if isinstance(event["outcome"], list | tuple)
    ]
    commits = [event for event in ran.sought("commit") if event["node"] >= 0]
    assert {event["node"] for event in commits} == {0, 1, 2}
    assert len(received) == len(set(received))
    # One token: each step is done once, one after the other.
    assert len({event["at_s"] for event in commits}) == len(commits)


def test_what_was_received_in_a_round_that_is_begun_again_is_received_again():
    """A walk's token is not lost where its holder is slow."""
    network = {"step_ms": 10, "speeds": {1: 0.15}}
    ran = attempt(
        history("random_walk", network=network, rounds=12)
        | {"cluster": {"nodes": {"target": 3}, "round_deadline_s": 0.05}}
    )
    assert str(ran.error).startswith("node 1 cannot finish its round")
    assert len(ran.sought("late")) == 10


def test_steps_of_an_exchange_that_was_given_up_do_not_reach_the_next_attempt():
    raw = history(
        {"name": "fedavg", "steps": 2},
        ("kill", 3, 2, "secure"),
        nodes=4,
        task={"name": UNEQUAL, "width": 3000},
        network={"latency_ms": 400},
        cluster={"quorum_fraction": 1},
    )
    assert live(raw) == "finished"
    assert attempt(raw).sought("abort")


def test_a_dead_node_is_not_given_a_result():
    raw = history(
        {"name": "fedavg", "steps": 2},
        ("late_join", 3, 10, "train"),
        ("kill", 1, 10, "post"),
        ("preempt", 0, 10, "train"),
        nodes=4,
        network={"step_ms": 20, "latency_ms": 3, "start_s": 5},
        cluster={"drain_s": 0.03},
    )
    assert live(raw) == "finished"


def test_who_is_late_in_a_replay_is_who_was_late():
    """A transfer takes longer there, as it holds a model where the run had a few records."""
    raw = history(
        {"name": "mezo", "verify_every": 1},
        ("late_join", 1, 1, "train"),
        nodes=2,
        task={"name": UNEQUAL, "width": 3000},
        network={"start_s": 0, "bandwidth_mbps": 2},
        cluster={"round_deadline_s": 0.3},
    )
    assert live(raw) == "finished"


def test_who_is_told_to_leave_twice_is_ended_once():
    """The second notice is not for who takes its place."""
    faults = [("preempt", 1, 3, "train"), ("preempt", 1, 3, "secure")]
    ran = attempt(history({"name": "fedavg", "steps": 2}, *faults, rounds=40, cluster={"drain_s": 0.2}))
    assert ran.error is None
    assert ran.summary is not None
    assert ran.summary.nodes == {"started": 3, "joined": 1, "lost": 0, "drained": 1}


def test_a_worker_that_is_to_leave_while_it_is_being_given_a_model():
    raw = history(
        {"name": "fedbuff", "buffer_size": 4},
        ("preempt", 0, 1, "transfer"),
        ("hang", 0, 1, "train"),
        nodes=2,
        rounds=2,
        task={"name": UNEQUAL, "width": 3000},
        network={"start_s": 0, "bandwidth_mbps": 2},
        cluster={"drain_s": 0.2, "round_deadline_s": 2, "cancel_grace_s": 0.5},
    )
    assert live(raw) == "finished"


def test_who_is_lost_before_an_exchange_closes_does_not_take_others_along_in_a_replay():
    """One dies before the first exchange closes, another is late for the second: it is in the first."""
    raw = history(
        {"name": "tests.soak.programs:Overlapping", "close": {"name": "grace", "after": 1, "seconds": 0}},
        ("kill", 1, 2, "post"),
        nodes=4,
        network={"start_s": 0.5, "step_ms": 5, "speeds": {2: 0.1, 3: 0.1}},
    )
    ran = attempt(raw)
    (commit,) = (one for one in ran.sought("commit") if one["round"] == 2)
    assert any(set(nodes) - set(commit["committed"]) - {1} for nodes in commit["closed"].values())
    assert live(raw) == "finished"
    assert live(raw | {"soak": {"killed": 2}}) == "finished"


class Receiving(Program, name="test_receiving"):
    """One node only receives in the first exchange, and contributes to the second."""

    async def round(self, node: Node) -> None:
        mean = await AllReduce(None if node.id == 2 else node.parameters)
        seen = await AllGather(node.parameters[:1] + node.id)
        await Train(steps=20 if (node.id, node.round) == (2, 2) else 1)
        await AllReduce(node.parameters)
        node.parameters.copy_(mean.value + 0.1 * sum(float(one[0]) for one in seen.values()))


def test_who_only_received_and_was_late_then_has_contributed_in_a_replay():
    raw = history("test_receiving", network={"step_ms": 10}, rounds=5)
    raw["cluster"] = {"nodes": {"target": 3}, "round_deadline_s": 0.1}
    (commit,) = (one for one in attempt(raw).sought("commit") if one["round"] == 2)
    assert commit["closed"] == {0: (0, 1), 1: (0, 1, 2), 2: (0, 1)}
    assert commit["committed"] == (0, 1)
    assert live(raw) == "finished"


def test_a_server_goes_on_while_all_workers_are_away():
    """What their parts still held was to be handed out, and nobody was there: an IndexError."""
    events = ("kill", 1, 1, "receive"), ("kill", 0, 4, "train")
    chatter = {"name": "tests.soak.programs:Chatter", "patience_s": 0.02}
    keys: dict[str, Any] = {"network": {"start_s": 0.15, "step_ms": 0}, "rounds": 5, "data": {"batch_size": 16}}
    assert live(history(chatter, *events, nodes=2, task={"name": UNEQUAL, "num_samples": 37}, **keys)) == "finished"


def test_who_gets_kept_state_for_a_second_time_is_told_again_what_it_draws():
    """It was late in the round in which it had been told, and drew on from where it had been kept."""
    events = ("preempt", 0, 7, "train"), ("kill", 0, 7, "secure"), ("kill", 0, 8, "post"), ("preempt", 1, 10, "train")
    drawing = {"name": "tests.soak.programs:Drawing", "large": True, "topology": "exponential"}
    drawing |= {"close": {"name": "grace", "after": 2, "seconds": 0.01}, "codec": {"name": "top_k"}}
    keys: dict[str, Any] = {
        "seed": 25,
        "rounds": 12,
        "task": {"name": UNEQUAL, "num_samples": 12},
        "data": {"batch_size": 5},
        "optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.01, "on_join": "donor", "grad_clip": 1.0},
        "on_divergence": "heal",
        "network": {"start_s": 0.02, "adopt_s": 0.01, "step_ms": 100, "bandwidth_mbps": 20, "latency_ms": 0},
        "cluster": {"quorum_fraction": 0.5, "warm_spares": 1, "round_deadline_s": 0.02, "drain_s": 0.001},
    }
    keys["cluster"]["cancel_grace_s"] = 0.001
    assert live(history(drawing, *events, nodes=2, **keys)) == "finished"


def test_who_is_given_a_donors_state_for_a_second_time_is_told_again_what_it_draws():
    events = ("late_join", 0, 5, "train"), ("kill", 0, 9, "train"), ("kill", 1, 7, "train")
    drawing = {"name": "tests.soak.programs:Drawing", "large": True, "codec": "sign"}
    drawing |= {"close": {"name": "grace", "after": 1, "seconds": 0.01}}
    keys: dict[str, Any] = {
        "rounds": 10,
        "task": {"name": UNEQUAL, "num_samples": 37},
        "data": {"batch_size": 5},
        "network": {"start_s": 0, "step_ms": 10, "speeds": {0: 0.2, 1: 0.05}},
    }
    assert live(history(drawing, *events, nodes=2, **keys)) == "finished"


def test_a_round_that_is_begun_again_has_the_samples_of_before():
    """It had sent what it had made of them, was told to stand still for a checkpoint, and was handed others then."""
    raw = history({"name": "fedbuff", "buffer_size": 2, "steps": 2}, ("late_join", 1, 1, "train"), rounds=2)
    raw |= {"task": {"name": UNEQUAL, "num_samples": 37}, "data": {"batch_size": 16}, "soak": {"killed": 0}}
    assert live(raw | {"network": {"start_s": 0.15, "step_ms": 10}}) == "finished"


def test_messages_of_a_lost_node_and_of_its_successor_are_told_apart_in_a_checkpoint():
    """Both do round 2 and send one message in it; the checkpoint had one of them twice."""
    raw = history("tests.soak.programs:Wanderer", ("preempt", 0, 2, "train"), nodes=5, rounds=8)
    raw |= {"task": {"name": UNEQUAL, "num_samples": 37}, "data": {"batch_size": 16}, "soak": {"killed": 0}}
    raw["optimizer"] = {"name": "sgd", "momentum": 0.9, "lr": 0.01}
    raw["network"] = {"start_s": 0, "step_ms": 20, "latency_ms": 0, "speeds": {2: 0.05, 3: 0.05, 4: 0.05}}
    raw["cluster"] |= {"quorum_fraction": 0.5, "round_deadline_s": 20, "drain_s": 0.05}
    assert live(raw) == "finished"


def test_who_was_given_the_last_commit_gives_it_on_where_all_who_made_it_are_lost():
    """One hangs and one dies in the next round; the third was late, had got their state, and was asked by nobody."""
    events = ("preempt", 0, 1, "post"), ("hang", 0, 4, "transfer"), ("kill", 2, 4, "deliver")
    edit = {"name": "edit", "inner_steps": 1, "warmup_steps": 2, "outer": {"name": "nesterov", "lr": 0.5}}
    keys: dict[str, Any] = {
        "rounds": 6,
        "task": {"name": UNEQUAL, "num_samples": 37},
        "data": {"batch_size": 16},
        "network": {"start_s": 0, "step_ms": 100, "speeds": {0: 3.0, 1: 0.5, 2: 1.0}},
        "cluster": {"quorum_fraction": 0.5, "round_deadline_s": 0.1, "cancel_grace_s": 0.5, "drain_s": 0.01},
    }
    assert live(history(edit, *events, **keys)) == "finished"


def test_a_new_node_that_was_late_after_it_caught_up_is_in_a_checkpoint():
    """It has replayed round 0, and commits neither that nor round 1. Resumed, it replayed round 0 once more."""
    raw = {
        "rounds": 3,
        "algorithm": {"name": "just_one_byte", "verify_every": 1, "lr": 0.01},
        "task": {"name": "tests.soak.programs:Unequal"},
        "data": {"batch_size": 16},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "evaluation": {"every_rounds": 0},
        "network": {"start_s": 0, "adopt_s": 0, "step_ms": 100, "speeds": {0: 0.2, 1: 0.05, 2: 3.0}},
        "tracking": "none",
        "faults": {"events": [fault(0, 0)]},
        "cluster": {"nodes": {"min": 1, "target": 3}, "quorum_fraction": 0.01, "round_deadline_s": 0.3},
        "soak": {"killed": 1},
    }
    assert live(raw) == "finished"


@pytest.mark.parametrize(
    ("text", "events", "kind"),
    [
        ("round 1: 2 nodes are there, and cluster.nodes.min is 3", [], None),
        ("round 1: 1 nodes are there, and cluster.nodes.min is 3", [], "the nodes are there"),
        ("round 2: no node is left that has the model of round 1", [], "a node is left that has the model"),
        (
            "round 2: no node is left that has the model of round 1",
            [{"event": "lost", "node": 0}, {"event": "left", "node": 1}],
            None,
        ),
        ("round 2: nodes 0 do not become ready; waited for 5 s", [], "nodes do not become ready"),
        ("round 2: nodes 0 do not become ready; waited for 5 s", [{"event": "up", "node": 0}], None),
    ],
)
def test_the_last_words_of_a_run_are_compared_with_its_log(text: str, events: list[dict[str, Any]], kind: str | None):
    ran = Watched(parse({"algorithm": "fedavg", "task": "digits", "cluster": {"nodes": {"min": 3, "target": 3}}}))
    ran.events = [{"event": "start", "nodes": [0, 1]}, {"event": "commit", "round": 1, "committed": [0, 1]}, *events]
    if kind is None:
        check_last_words(ran, text)
    else:
        with pytest.raises(Wrong, match=kind):
            check_last_words(ran, text)


def test_spares_that_die_and_a_run_that_is_killed_are_part_of_a_history(monkeypatch: pytest.MonkeyPatch):
    lost: list[float] = []

    def spare_lost(pool: Pool, now: float) -> bool:
        lost.append(now)
        return real(pool, now)

    real = Pool.spare_lost
    monkeypatch.setattr(Pool, "spare_lost", spare_lost)
    raw = history({"name": "diloco", "inner_steps": 1}, ("kill", 1, 3, "train"), cluster={"warm_spares": 1}, rounds=6)
    assert live(raw | {"soak": {"spares": [1, 3], "killed": 2}}) == "finished"
    assert len(lost) == 4
    assert lost[:2] == lost[2:]


def test_a_resume_that_loses_something_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Faults, "to_json", lambda _: [])  # what was still to happen is forgotten
    raw = history({"name": "diloco", "inner_steps": 1}, ("kill", 1, 3, "train"), rounds=5)
    with pytest.raises(Wrong, match="^resume: "):
        live(raw | {"soak": {"killed": 1}})


def test_every_algorithm_is_drawn_with_each_kind_of_sequence():
    """As far as it has them: a server has no late join, and a few algorithms are drawn less often."""
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(5000):
        raw = draw(random.Random(f"draw {seed}"))
        counts.update((raw["algorithm"]["name"], kind) for kind in kinds_of(raw))
    kinds = ("again and again", "late first", "straggler", "spare", "resume")
    assert {(name, kind) for name in algorithms() for kind in kinds if counts[name, kind] < 2} == set(), counts


def kinds_of(raw: dict[str, Any]) -> Iterator[str]:
    """What there is in a history of what was found to matter."""
    chains: dict[Any, list[str]] = {}
    for event in raw["faults"]["events"]:
        chains.setdefault(event["node"], []).append(event["kind"])
    if any("kill preempt kill" in " ".join(chain) for chain in chains.values()):
        yield "again and again"
    if "late_join" in chains.get(0, []):
        yield "late first"
    speeds = raw["network"]["speeds"].values()
    if raw["network"]["step_ms"] and min(speeds, default=1.0) * 10 <= max(speeds, default=1.0):
        yield "straggler"
    if raw["soak"]["spares"]:
        yield "spare"
    if "killed" in raw["soak"]:
        yield "resume"


@pytest.mark.parametrize("seed", range(2))
def test_some_random_histories(seed: int):
    lived(f"quick {seed}", 3)


def test_a_failing_history_is_made_small():
    raw = draw(random.Random(3)) | {"faults": {"events": [fault(0, 3), fault(1, 5), fault(1, 6), fault(2, 9)]}}
    raw["rounds"] = 12

    def fails(one: dict[str, Any]) -> bool:
        return any((event["node"], event["round"]) == (1, 6 - 12 + one["rounds"]) for event in one["faults"]["events"])

    small = shrink(raw, fails)
    assert len(small["faults"]["events"]) == 1
    assert small["rounds"] < 12
    assert small["network"]["latency_ms"] == 0


def fault(node: int, number: int) -> dict[str, Any]:
    return {"kind": "kill", "node": node, "round": number, "phase": "train"}


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_more_random_histories():
    ends = lived("slow", 100)
    assert ends["finished"] > 40


def lived(seed: str, number: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    for place in range(number):
        raw = draw(random.Random(f"{seed}:{place}"))
        try:
            ends[live(raw)] += 1
        except Wrong as wrong:
            pytest.fail(f"{wrong}\n{raw}")
    return ends
