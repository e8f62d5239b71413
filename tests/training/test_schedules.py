"""The learning rate at every step of every node: in rounds, without a barrier, and for those that come later."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from starling.actors.replica.replica import Replica
from starling.actors.replica.schedule_progress import ScheduleProgress
from starling.algorithms.api import SERVER
from starling.algorithms.asynchronous.fedbuff import FedBuff
from starling.orchestrator import api
from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.config.schema import parse
from starling.orchestrator.records.observers import Observer
from tests.toys import Ran, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from starling.orchestrator.records.observers import RoundRecord

LR = 0.1

Rates = dict[int, list[tuple[int, float]]]
"""Of each node, in the order of its steps: the round of its own in which it took one, and the learning rate."""


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    found: Rates = defaultdict(list)
    owners: dict[ScheduleProgress, Replica] = {}
    begin, original = Replica.begin, ScheduleProgress.rate

    def begun(self: Replica, *arguments: Any) -> None:
        owners[self.schedule] = self
        begin(self, *arguments)

    def rate(self: ScheduleProgress, ahead: int = 0) -> float:
        value = original(self, ahead)
        if self in owners:
            found[owners[self].id].append((owners[self].round, value))
        return value

    monkeypatch.setattr(Replica, "begin", begun)
    monkeypatch.setattr(ScheduleProgress, "rate", rate)
    return found


def run(algorithm: dict[str, Any], schedule: Any, **keys: Any) -> Ran:
    # Adagrad is no optimizer that is carried out for many nodes at once: each asks for its rate at each step.
    optimizer = {"name": "adagrad", "lr": LR, "schedule": schedule}
    quick = {"task": "quadratic", "evaluation": {"every_rounds": 0}, "data": {"batch_size": 4}}
    return simulate(**(quick | keys), algorithm=algorithm, optimizer=optimizer)


def factor(place: float, total: float, warmup: int = 0) -> float:
    """Up in a line, then a cosine to 0: written down once more, from the docstring of ``Schedule``."""
    if place < warmup:
        return (place + 1) / warmup
    return (1 + math.cos(math.pi * min(1.0, (place - warmup) / (total - warmup)))) / 2


def expected(places: Sequence[float], total: float, warmup: int = 0) -> list[Any]:
    return [pytest.approx(LR * factor(place, total, warmup), rel=1e-12) for place in places]


def cosine(warmup: int = 0) -> dict[str, Any]:
    return {"name": "cosine", "warmup_steps": warmup}


def test_all_nodes_in_all_rounds_count_their_own_steps(rates: Rates):
    run({"name": "diloco", "inner_steps": 3}, cosine(warmup=5), nodes=2, rounds=4)
    for found in rates.values():
        assert [rate for _, rate in found] == expected(list(range(12)), 12, warmup=5)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_sampled_cohort_is_where_the_run_is(rates: Rates, steps: int):
    """Whoever is drawn for the first time in round 5 is past the warm-up that others had."""
    rounds, warmup = 12, 4
    run({"name": "fedavg", "steps": steps, "fraction": 0.25}, cosine(warmup), nodes=8, rounds=rounds)
    assert sum(len(found) for found in rates.values()) == 2 * steps * rounds
    assert any(found[0][0] > 2 for found in rates.values())
    for found in rates.values():
        numbers = [number for number, _ in found]
        assert len(numbers) < steps * rounds
        places = [number * steps + place for number in dict.fromkeys(numbers) for place in range(steps)]
        assert [rate for _, rate in found] == expected(places, rounds * steps, warmup)


def test_unequal_epochs_end_together(rates: Rates):
    """A node with half of the steps goes through the same schedule, two steps at a time."""
    keys: dict[str, Any] = {
        "task": "digits",
        "data": {"partition": {"name": "quantity", "alpha": 1.0}, "batch_size": 64},
    }
    ran = run({"name": "fedavg"}, cosine(warmup=9), nodes=3, rounds=3, **keys)
    own = {node: math.ceil(ran.replicas[node].num_samples / 64) for node in range(3)}
    most = max(own.values())
    assert min(own.values()) < most
    for node, found in rates.items():
        steps = own[node]
        places = [number * most + place * most / steps for number in range(3) for place in range(steps)]
        assert [rate for _, rate in found] == expected(places, 3 * most, warmup=9)


def heard(ran: Ran) -> dict[int, list[int]]:
    """The server's round from which each worker had the model of each of its rounds, found from the log."""
    found: dict[int, list[int]] = defaultdict(lambda: [0])
    for event in ran.sought("received"):
        if event["node"] != SERVER:
            found[event["node"]].append(event["outcome"][1])
    return found


@pytest.mark.parametrize(("size", "nodes"), [(10, 4), (2, 5), (3, 3)])
@pytest.mark.parametrize("speeds", [{}, {0: 0.25, 1: 3.0}], ids=["equal", "unequal"])
def test_workers_of_a_server_go_by_its_rounds(rates: Rates, size: int, nodes: int, speeds: dict[int, float]):
    steps, rounds, warmup = 4, 12, 6
    algorithm = {"name": "fedbuff", "buffer_size": size, "steps": steps}
    network = {"speeds": speeds, "latency_ms": 1}
    ran = run(algorithm, cosine(warmup), nodes=nodes, rounds=rounds, network=network)
    per_round = steps * size / nodes
    given = heard(ran)
    assert len(rates) == nodes
    for node, found in rates.items():
        places = [at * per_round + min(place, max(per_round, steps)) for at, place in _counted(found, given[node])]
        assert [rate for _, rate in found] == expected(places, rounds * per_round, warmup)
    last = [found[-1][1] for found in rates.values()]
    assert min(last) < 0.2 * LR  # it anneals, whatever K and N are


def test_a_cosine_without_a_barrier_takes_half_of_the_way_of_a_constant(rates: Rates):
    """Which is why it ends less far along: as with half of the learning rate, whatever order the updates arrive in."""
    algorithm = {"name": "fedbuff", "buffer_size": 5, "steps": 10}
    run(algorithm, cosine(), nodes=10, rounds=24, network={"speeds": {0: 0.5, 1: 2.0}, "latency_ms": 1})
    taken = [rate / LR for found in rates.values() for _, rate in found]
    assert sum(taken) / len(taken) == pytest.approx(0.5, abs=0.05)


def _counted(found: list[tuple[int, float]], given: list[int]) -> list[tuple[int, int]]:
    """The server's round that each step of a worker belongs to, and how many it has taken in that before."""
    taken: defaultdict[int, int] = defaultdict(int)
    pairs: list[tuple[int, int]] = []
    for number, _ in found:
        at = given[number]
        pairs.append((at, taken[at]))
        taken[at] += 1
    return pairs


def test_asynchronous_diloco(rates: Rates):
    nodes, rounds, steps = 4, 24, 8
    algorithm = {"name": "async_diloco", "inner_steps": steps}
    ran = run(algorithm, cosine(warmup=5), nodes=nodes, rounds=rounds, network={"speeds": {2: 0.5}, "latency_ms": 1})
    given = heard(ran)
    for node, found in rates.items():
        places = [at * steps / nodes + min(place, steps) for at, place in _counted(found, given[node])]
        assert [rate for _, rate in found] == expected(places, rounds * steps / nodes, warmup=5)


def test_a_late_joiner_of_a_server_begins_where_it_is(rates: Rates):
    faults = {"events": [{"kind": "late_join", "node": 2, "round": 6}]}
    algorithm = {"name": "fedbuff", "buffer_size": 2, "steps": 4}
    run(algorithm, cosine(warmup=4), nodes=3, rounds=20, faults=faults, network={"start_s": 0.05})
    numbers = [number for number in range(6, 20) if rates[2][0][1] == expected([number * 4 * 2 / 3], 160 / 3, 4)[0]]
    assert len(numbers) == 1
    assert [rate for _, rate in rates[2][:4]] == expected(
        [numbers[0] * 8 / 3 + place for place in range(4)], 160 / 3, 4
    )


def test_a_late_joiner_of_rounds_begins_where_they_are(rates: Rates):
    faults = {"events": [{"kind": "late_join", "node": 2, "round": 3}]}
    run(
        {"name": "diloco", "inner_steps": 2},
        cosine(warmup=3),
        nodes=3,
        rounds=8,
        faults=faults,
        network={"start_s": 0.01},
    )
    joined = rates[2][0][0]
    assert joined >= 3
    assert [rate for _, rate in rates[2]] == expected([*map(float, range(2 * joined, 16))], 16, warmup=3)


def test_a_shorter_schedule_ends_before_the_run(rates: Rates):
    run({"name": "fedavg", "steps": 2}, cosine() | {"total_steps": 6}, nodes=2, rounds=5)
    for found in rates.values():
        assert [rate for _, rate in found] == expected(list(range(10)), 6)


@pytest.mark.parametrize("algorithm", [{"name": "fedbuff", "buffer_size": 2, "steps": 3}, "diloco"], ids=str)
def test_a_schedule_goes_on_in_a_resume_and_in_a_replay(
    algorithm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = {
        "algorithm": {"name": "diloco", "inner_steps": 3} if algorithm == "diloco" else algorithm,
        "task": "quadratic",
        "rounds": 9,
        "cluster": {"nodes": {"target": 3}},
        "network": {"speeds": {0: 0.3}, "latency_ms": 2},
        "optimizer": {"name": "sgd", "lr": 0.05, "schedule": cosine(warmup=4)},
        "checkpoint": {"every_rounds": 3},
        "tracking": "none",
    }
    whole = api.simulate(config, run_dir="whole")
    assert api.replay("whole", run_dir="again").digest == whole.digest

    class Stopper(Observer):
        def on_round(self, record: RoundRecord) -> None:
            if record.round == 4:
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        api.simulate(config, run_dir="stopped", observers=[Stopper()])
    assert api.resume("stopped").digest == whole.digest


# --- what check says ------------------------------------------------------------------------------------------------


def plan(**keys: Any) -> Any:
    base: dict[str, Any] = {"task": "quadratic", "rounds": 40, "optimizer": {"lr": LR, "schedule": "cosine"}}
    return make_plan(parse(base | keys))


@pytest.mark.parametrize(
    ("algorithm", "end"),
    [
        ({"name": "diloco", "inner_steps": 5}, 200),
        ({"name": "fedavg", "steps": 5, "fraction": 0.25}, 200),
        ({"name": "fedbuff", "buffer_size": 10, "steps": 10}, 1000),
        ({"name": "fedbuff", "buffer_size": 2, "steps": 10}, 200),
        ({"name": "async_diloco", "inner_steps": 50}, 500),
    ],
)
def test_check_says_where_the_schedule_ends(algorithm: dict[str, Any], end: int):
    assert plan(algorithm=algorithm).schedule == f"sgd, lr 0.1, cosine to 0 at step {end}, the end of the run"


def test_check_says_how_a_run_ends_before_its_schedule():
    optimizer = {"lr": LR, "schedule": {"name": "linear", "total_steps": 401}}
    found = plan(algorithm={"name": "diloco", "inner_steps": 5}, optimizer=optimizer).schedule
    assert found == "sgd, lr 0.1, linear to 0 at step 401; the run ends at step 200 with 0.0504"


@pytest.mark.parametrize("name", ["gradient_coding", "random_walk", "just_one_byte", "mezo", "cbo", "fzoos"])
def test_who_takes_no_optimizer_steps_refuses_no_schedule(name: str, rates: Rates):
    schedule = {"name": "cosine", "warmup_steps": 12}
    found = plan(algorithm=name, optimizer={"lr": LR, "schedule": schedule}).schedule
    assert found == f"none: with {name} nodes take no optimizer steps; it has a step size of its own"
    keys = {"candidates": 10, "surrogate_queries": 5, "features": 20} if name == "fzoos" else {}
    run({"name": name} | keys, schedule, nodes=2, rounds=1)
    assert not any(rates.values())


def test_a_server_does_so_many_rounds_to_one_of_a_worker():
    assert FedBuff(buffer_size=10).node_rounds(4) == 2.5
