"""The simulator: the same in every run, on time to the closed forms, and clear about what goes wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from starling.algorithms.api import AllGather, AllReduce, Node, Train, View
from starling.algorithms.closing import ClosePolicy, Waited
from starling.orchestrator.config.schema import parse
from starling.orchestrator.config.sections import NetworkConfig
from starling.orchestrator.errors import DivergedError, NodeFailedError, ProgramsDivergeError, RunError
from starling.orchestrator.runtimes.network import Cast, Network
from tests.toys import Program, attempt, simulate

MIB = 1024 * 1024
MBPS = 1_000_000 / 8  # bytes per second

# --- the same in every run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["diloco", "fedavg"])
def test_same_digest_time_and_record_twice(algorithm: str):
    raw = {
        "algorithm": {"name": algorithm},
        "task": {"name": "test_toy", "model": "dropout"},
        "rounds": 3,
        "network": {"bandwidth_mbps": 10, "latency_ms": 3, "speeds": {0: 0.3, 2: 1.7}},
    }
    if algorithm == "diloco":
        raw["algorithm"]["inner_steps"] = 4
    one, other = simulate(raw, nodes=3), simulate(raw, nodes=3)
    assert one.digest == other.digest
    assert one.virtual_seconds == other.virtual_seconds > 0
    assert one.events == other.events
    assert [record.loss for record in one.rounds] == [record.loss for record in other.rounds]
    assert simulate(raw, nodes=3, seed=1).digest != one.digest


def test_time_changes_no_bits():
    calm = simulate(algorithm="fedavg", nodes=4)
    network = {"bandwidth_mbps": 1, "speeds": {1: 0.01}, "links": [{"between": [2, 3], "latency_ms": 700}]}
    assert simulate(algorithm="fedavg", nodes=4, network=network).digest == calm.digest


def test_threads_are_put_back():
    before = torch.get_num_threads()
    simulate()
    attempt(algorithm={"name": "test_failing"})
    assert torch.get_num_threads() == before


# --- virtual time ---------------------------------------------------------------------------------------------------


class Exchanging(Program, name="test_exchanging"):
    """Exchanges tensors of a given size, and trains before if asked."""

    values: int = 1
    gathers: bool = False
    steps: int = 0

    async def round(self, node: Node) -> None:
        if self.steps:
            await Train(steps=self.steps)
        tensor = torch.zeros(self.values)
        await (AllGather(tensor) if self.gathers else AllReduce(tensor))


def seconds(nodes: int, values: int, *, gathers: bool = False, steps: int = 0, **network: Any) -> float:
    """Virtual seconds of one round."""
    algorithm = {"name": "test_exchanging", "values": values, "gathers": gathers, "steps": steps}
    return simulate(algorithm=algorithm, nodes=nodes, rounds=1, network=network).virtual_seconds


@pytest.mark.parametrize("nodes", [1, 2, 4, 5])
def test_large_all_reduce(nodes: int):
    """Two phases, in each of which a node's link carries (N − 1) / N of the bytes."""
    values = nodes * MIB
    expected = 2 * ((nodes - 1) / nodes * 4 * values / (100 * MBPS) + 0.020) if nodes > 1 else 0.0
    assert seconds(nodes, values, bandwidth_mbps=100, latency_ms=20) == pytest.approx(expected, rel=1e-12)


def test_all_reduce_in_fewer_parts_than_nodes():
    """1.5 MiB make two parts: their makers' links carry three contributions in, and then three results out."""
    values = 3 * MIB // 8
    part = 4 * values / 2
    expected = 3 * part / (100 * MBPS) + 3 * part / (100 * MBPS)
    assert seconds(4, values, bandwidth_mbps=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gathers", [False, True])
def test_inline(gathers: bool):
    """Everybody sends to everybody: N − 1 contributions on each link, one phase."""
    expected = 3 * 4000 / (10 * MBPS) + 0.007
    assert seconds(4, 1000, gathers=gathers, bandwidth_mbps=10, latency_ms=7) == pytest.approx(expected, rel=1e-12)


def test_large_gather():
    expected = 3 * 4 * MIB / (10 * MBPS) + 0.007
    assert seconds(4, MIB, gathers=True, bandwidth_mbps=10, latency_ms=7) == pytest.approx(expected, rel=1e-12)


def test_without_a_network_only_training_takes_time():
    assert seconds(3, MIB) == 0.0
    assert seconds(3, MIB, steps=7) == pytest.approx(7 * 0.010)
    assert seconds(3, MIB, latency_ms=30) == pytest.approx(0.060)


def test_the_slowest_is_waited_for():
    network = {"step_ms": 100, "speeds": {0: 2.0, 2: 0.25}, "latency_ms": 5}
    algorithm = {"name": "test_exchanging", "steps": 3}
    ran = simulate(algorithm=algorithm, nodes=3, rounds=2, network=network)
    assert ran.virtual_seconds == pytest.approx(2 * (3 * 0.1 / 0.25 + 0.005))
    record = ran.rounds[1]
    assert record.train_seconds == pytest.approx(1.2)
    assert record.exchange_seconds == pytest.approx(0.005)
    assert record.seconds == pytest.approx(1.205)


def test_a_slow_pair():
    """The pair (0, 1) carries a quarter of the contribution each way, four times as slowly as all three may go in."""
    values = 4 * MIB
    part = 4 * values / 4
    network = {"bandwidth_mbps": 100, "links": [{"between": [1, 0], "bandwidth_mbps": 10, "latency_ms": 40}]}
    expected = 2 * (part / (10 * MBPS) + 0.040)
    assert seconds(4, values, **network) == pytest.approx(expected, rel=1e-12)


def test_a_pair_with_a_latency_of_its_own_does_not_delay_others():
    """Results arrive at different times; who has one runs on, and may be done before others have theirs."""

    links = [{"between": [2, 3], "latency_ms": 500}]
    ran = simulate(algorithm="test_clock", nodes=4, rounds=1, network={"latency_ms": 10, "links": links})
    assert [ran.replicas[node].local["now"] for node in range(4)] == pytest.approx([0.01, 0.01, 0.5, 0.5])
    # All have the mean of what was sent, although the first to have it has written over what it sent.
    assert {float(ran.replicas[node].local["mean"]) for node in range(4)} == {1.5}  # type: ignore[arg-type]


class Clock(Program, name="test_clock"):
    """Exchanges its parameters themselves, and writes to them as soon as it can."""

    async def round(self, node: Node) -> None:
        node.parameters.fill_(float(node.id))
        mean = await AllReduce(node.parameters)
        node.local["now"] = node.now
        node.local["mean"] = float(mean.value[0])
        node.parameters.fill_(-100.0)


def test_a_link_that_is_busy_delays_the_next_phase():
    network = Network(NetworkConfig(bandwidth_mbps=8, latency_ms=100))
    assert network.arrivals(0.0, [Cast({0: 1_000_000}, [1])]) == {1: pytest.approx(1.1)}
    assert network.arrivals(0.5, [Cast({0: 1_000_000}, [2])]) == {
        2: pytest.approx(2.1)
    }  # behind the first, on 0's way out
    assert network.arrivals(0.5, [Cast({3: 1_000_000}, [1])]) == {1: pytest.approx(2.1)}  # on 1's way in
    assert network.arrivals(0.5, [Cast({1: 1_000_000}, [0])]) == {0: pytest.approx(1.6)}  # other ways are free
    assert network.arrivals(9.0, [Cast({0: 0}, [1])]) == {1: pytest.approx(9.1)}


def test_what_stays_where_it_is_takes_no_time():
    network = Network(NetworkConfig(bandwidth_mbps=1, latency_ms=100))
    assert network.arrivals(1.0, [Cast({0: 1_000_000}, [0])]) == {}
    assert network.arrivals(1.0, [Cast({0: 125_000, 1: 125_000}, [0, 1])]) == pytest.approx({0: 2.1, 1: 2.1})


def test_pairs_carry_the_sum_of_a_phase_and_are_busy_too():
    links: Any = [{"between": [0, 1], "bandwidth_mbps": 8}]
    network = Network(NetworkConfig(links=links))
    assert network.arrivals(0.0, [Cast({0: 1_000_000}, [1]), Cast({0: 1_000_000}, [1, 2])]) == pytest.approx(
        {1: 2.0, 2: 0.0}
    )
    assert network.arrivals(1.0, [Cast({0: 1_000_000}, [1])]) == pytest.approx({1: 3.0})
    assert network.arrivals(1.0, [Cast({1: 1_000_000}, [0])]) == pytest.approx({0: 2.0})


def test_a_slow_pair_is_as_far_as_others_unless_it_says_so():
    links: Any = [{"between": [0, 1], "bandwidth_mbps": 8}, {"between": [0, 2], "bandwidth_mbps": 8, "latency_ms": 0}]
    network = Network(NetworkConfig(latency_ms=100, links=links))
    assert network.arrivals(0.0, [Cast({0: 1_000_000}, [1, 2])]) == pytest.approx({1: 1.1, 2: 1.0})


def test_casts_are_sums_of_flows():
    """A cast of many to many, against its flows one by one."""
    rng = torch.Generator().manual_seed(0)
    links: Any = [{"between": [1, 2], "bandwidth_mbps": 0.5, "latency_ms": 30}, {"between": [0, 3], "latency_ms": 1}]
    for _ in range(20):
        phase = []
        for _ in range(3):
            sizes = torch.randint(0, 100_000, (6,), generator=rng).tolist()
            chosen = torch.randperm(6, generator=rng).tolist()
            phase.append(Cast({node: sizes[node] for node in chosen[:4]}, chosen[1:]))
        flows = [
            Cast({source: nbytes}, [target])
            for cast in phase
            for source, nbytes in cast.sources.items()
            for target in cast.targets
        ]
        config = NetworkConfig(bandwidth_mbps=2, latency_ms=10, links=links)
        assert Network(config).arrivals(1.0, phase) == pytest.approx(Network(config).arrivals(1.0, flows))


# --- what a program sees --------------------------------------------------------------------------------------------


class Looking(Program, name="test_looking"):
    """Keeps what it sees."""

    def participants(self, view: View, rng: torch.Generator) -> tuple[int, ...]:
        return (int(torch.randint(len(view.members), (), generator=rng)),)

    async def round(self, node: Node) -> None:
        gathered = await AllGather({"id": node.id, "in": node.participates})
        sent = {"mine": torch.full((3,), float(node.id))} if node.participates else None
        reduced = await AllReduce(sent, weight=2.5)
        seen: Any = node.local.get("seen", [])
        entry = {
            "round": node.round,
            "members": list(node.view.members),
            "joined": list(node.view.joined),
            "changed": node.view.changed,
            "participates": node.participates,
            "incarnation": node.incarnation,
            "samples": node.num_samples,
            "now": node.now,
            "gathered": [[member, payload["id"], payload["in"]] for member, payload in gathered.items()],
            "closed": list(reduced.members),
            "weight": reduced.weight,
            "value": reduced.value["mine"].tolist(),
        }
        node.local["seen"] = [*seen, entry]


def test_what_a_program_sees():
    ran = simulate(algorithm="test_looking", nodes=3, rounds=4, network={"latency_ms": 5})
    seen: Any = {node: ran.replicas[node].local["seen"] for node in range(3)}
    chosen = []
    for number in range(4):
        at = [seen[node][number] for node in range(3)]
        (participant,) = [node for node in range(3) if at[node]["participates"]]
        chosen.append(participant)
        for one in at:
            assert one["round"] == number
            assert one["members"] == [0, 1, 2]
            assert one["joined"] == ([0, 1, 2] if number == 0 else [])
            assert one["changed"] == (number == 0)
            assert (one["incarnation"], one["samples"]) == (0, 16)
            # The only contributor has what it needs without waiting for anybody.
            assert one["now"] == pytest.approx(0.010 * number + (0.005 if one["participates"] else 0.010))
            assert one["gathered"] == [[node, node, node == participant] for node in range(3)]
            assert (one["closed"], one["weight"]) == ([participant], 2.5)
            assert one["value"] == [float(participant)] * 3
    assert len(set(chosen)) > 1
    assert ran.rounds[0].contributing == 1


def test_results_are_the_nodes_own():
    """Writing to a result changes nobody else's, small or large."""
    for values in (10, MIB):
        ran = simulate(algorithm={"name": "test_writing", "values": values}, nodes=3, rounds=1)
        assert [ran.replicas[node].local["seen"] for node in range(3)] == [[2.0, 1.0, 2.0]] * 3


class Writing(Program, name="test_writing"):
    values: int

    async def round(self, node: Node) -> None:
        reduced = await AllReduce(torch.full((self.values,), 2.0))
        gathered = await AllGather(torch.ones(self.values))
        named = await AllReduce({"a": torch.full((self.values,), 2.0)})
        for tensor in (reduced.value, named.value["a"], *gathered.values()):
            assert tensor.max() <= 2.0
        seen: Any = [float(reduced.value[0]), float(gathered[1][0]), float(named.value["a"][0])]
        reduced.value.fill_(9.0)
        gathered[1].fill_(9.0)
        named.value["a"].fill_(9.0)
        node.local["seen"] = seen


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_nan_is_skipped():
    raw = {"algorithm": "fedavg", "task": {"name": "test_toy", "poison": 3}, "rounds": 3, "on_nan": "skip"}
    ran = simulate(raw, nodes=4)
    assert [record.contributing for record in ran.rounds] == [3, 3, 3]
    assert [record.nodes for record in ran.rounds] == [4, 4, 4]
    assert all(record.loss is not None and math.isfinite(record.loss) for record in ran.rounds)
    assert ran.parameters.isfinite().all()
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_nan_stops():
    ran = attempt(algorithm="fedavg", task={"name": "test_toy", "poison": 3}, nodes=4)
    assert isinstance(ran.error, NodeFailedError)
    assert "round 0: loss is nan after inner step" in str(ran.error)
    assert ran.error.traceback is None


def test_nan_everywhere():
    task = {"name": "quadratic", "heterogeneity": 1e38}
    ran = attempt(algorithm="fedavg", task=task, on_nan="skip")
    assert isinstance(ran.error, RunError)
    assert "round 0 cannot be finished: nobody contributes" in str(ran.error)


class Differing(Program, name="test_differing"):
    kind: str

    async def round(self, node: Node) -> None:
        await AllReduce(torch.zeros(2))
        if self.kind == "operation" and node.id == 1:
            await AllGather(torch.zeros(3))
        elif self.kind == "shape":
            await AllReduce(torch.zeros(3 + node.id))
        elif self.kind != "length" or node.id != 1:
            await AllReduce(torch.zeros(3))


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("operation", ["AllGather", "AllReduce(tensor float32[3])"]),
        ("shape", ["float32[3]", "float32[4]"]),
        ("length", ["the end of the program", "float32[3]"]),
    ],
)
def test_programs_that_diverge(kind: str, texts: list[str]):
    ran = attempt(algorithm={"name": "test_differing", "kind": kind})
    assert isinstance(ran.error, ProgramsDivergeError)
    text = str(ran.error)
    assert re.match("round 0, exchange 1: nodes (0 and 1|1 and 0) await different things: ", text)
    assert all(part in text for part in texts)


class Failing(Program, name="test_failing"):
    """Breaks in one way or another, on node 1 in round 1."""

    how: str = "raise"

    def init(self, node: Node) -> None:
        node.shared["x"] = torch.zeros(2)

    async def round(self, node: Node) -> None:
        x: Any = node.shared["x"]
        await AllReduce(x)
        if node.id != 1 or node.round != 1:
            return
        match self.how:
            case "raise":
                raise KeyError("boom")
            case "write":
                x.add_(1)
            case "alias":
                node.shared["y"] = {"z": node.parameters[:2]}
            case "await":
                await _Foreign()  # type: ignore[misc]
            case "payload":
                await AllReduce({"a": torch.zeros(1), "b": "text"})  # type: ignore[dict-item]
            case "weight":
                await AllReduce(x, weight=math.nan)


class _Foreign:
    def __await__(self) -> Any:
        return (yield 3)


@pytest.mark.parametrize(
    ("how", "text", "traced"),
    [
        ("raise", "node 1, round 1: KeyError: 'boom'", True),
        ("write", "node 1, round 1: node.shared['x'] was written in place; assign a new tensor instead", False),
        ("alias", "node 1, round 1: node.shared['y/z'] shares memory with the parameters; assign a clone()", False),
        ("await", "node 1, round 1: the program awaits a int; it may only await operations of the api", False),
        ("payload", "node 1, round 1: 'b' in a payload is a str; only tensors, numbers and flat", False),
        ("weight", "node 1, round 1: ValueError: AllReduce takes a weight above 0", True),
    ],
)
def test_errors_name_node_and_round(how: str, text: str, traced: bool):
    ran = attempt(algorithm={"name": "test_failing", "how": how}, rounds=3, nodes=3)
    assert isinstance(ran.error, NodeFailedError)
    assert str(ran.error).startswith(text)
    assert (ran.error.traceback is not None) == traced
    if traced:
        assert "in round" in str(ran.error.traceback)
    assert len(ran.rounds) == 1
    # What the broken round had sent is in the ledger all the same.
    assert ran.summary is not None
    assert ran.summary.bytes["payload"] == 2 * (3 * 2 * 8)


class Unequal(Program, name="test_unequal"):
    """Shared state that is not shared."""

    early: bool

    def init(self, node: Node) -> None:
        node.shared["x"] = torch.tensor([1.0 if self.early and node.id == 2 else 0.0])

    async def round(self, node: Node) -> None:
        if not self.early and node.round == 1:
            node.shared["x"] = torch.tensor([float(node.id == 2)])


@pytest.mark.parametrize("early", [True, False])
def test_state_that_differs_is_never_a_silent_drift(early: bool):
    ran = attempt(algorithm={"name": "test_unequal", "early": early}, nodes=4, rounds=3)
    assert isinstance(ran.error, DivergedError)
    number = 0 if early else 1
    expected = f"round {number}: the shared state of replicas differs: nodes 0, 1, 3 against nodes 2; "
    assert str(ran.error) == f"{expected}on_divergence: heal would go on with what most have"
    assert ran.sought("diverged")[0]["groups"] == ((0, 1, 3), (2,))


@pytest.mark.parametrize(
    ("nodes", "least", "fraction", "need"),
    [(2, 1, 0.5, 1), (3, 1, 0.5, 2), (4, 3, 0.5, 3), (20, 1, 0.55, 11), (30, 1, 0.1, 3), (7, 1, 1.0, 7)],
)
def test_need(nodes: int, least: int, fraction: float, need: int):
    cluster = {"nodes": {"min": least, "target": nodes}, "quorum_fraction": fraction}
    assert parse({"algorithm": "fedavg", "task": "digits", "cluster": cluster}).need == need


# --- stragglers -----------------------------------------------------------------------------------------------------


def test_a_straggler_is_left_behind_and_comes_back_with_the_others_state():
    ran = simulate(
        algorithm={"name": "test_exchanging", "steps": 1},
        nodes=4,
        network={"step_ms": 1000, "speeds": {2: 0.01}},
        cluster={"nodes": {"target": 4}, "round_deadline_s": 30},
    )
    late = ran.sought("late")
    assert [(one["round"], one["node"]) for one in late] == [(0, 2), (1, 2)]
    assert late[0]["reason"] == "it had not reached exchange 0 when that closed"
    assert any("raise cluster.round_deadline_s" in line for line in ran.logs)
    (transfer,) = ran.sought("transfer")
    assert (transfer["round"], transfer["node"], transfer["donor"]) == (1, 2, 0)
    assert [one["committed"] for one in ran.sought("commit")] == [(0, 1, 3)] * 2
    assert [record.contributing for record in ran.rounds] == [3, 3]
    assert ran.summary is not None
    assert ran.summary.bytes["recovery"] == transfer["nbytes"] > 0
    assert ran.virtual_seconds == pytest.approx(60)


def test_stragglers_are_waited_for_while_the_others_are_too_few():
    ran = simulate(
        algorithm={"name": "test_exchanging", "steps": 1},
        nodes=4,
        network={"step_ms": 1000, "speeds": {2: 0.01, 3: 0.01}},
        cluster={"nodes": {"min": 3, "target": 4}, "round_deadline_s": 30},
    )
    # Two of four are enough for a quorum, and not for nodes.min.
    assert ran.sought("late") == []
    assert ran.virtual_seconds > 100


def test_rounds_longer_than_the_deadline_are_no_straggling():
    ran = simulate(
        algorithm={"name": "test_exchanging", "steps": 1},
        nodes=4,
        network={"step_ms": 1000, "speeds": {2: 0.99}},
        cluster={"nodes": {"target": 4}, "round_deadline_s": 0.4},
    )
    assert len(ran.rounds) == 2


class Patient(ClosePolicy, name="test_patient"):
    """Whoever is there after two seconds."""

    def enough(self, arrived: Any, active: Any, waited: Waited) -> bool:
        return waited.since_first_s >= 2


class Closing(Program, name="test_closing"):
    async def round(self, node: Node) -> None:
        await Train(steps=1)
        await AllReduce(torch.zeros(1), close=Patient())


def test_close_policies_are_told_how_long_it_took():
    # At 1, 2, 4 and 5 seconds: the third finds that the exchange has been open for three.
    speeds = {0: 1.0, 1: 1 / 2, 2: 1 / 4, 3: 1 / 5}
    ran = simulate(algorithm="test_closing", nodes=4, network={"step_ms": 1000, "speeds": speeds})
    assert [(one["round"], one["node"]) for one in ran.sought("late")] == [(0, 3), (1, 3)]
    assert ran.sought("late")[0]["at_s"] == pytest.approx(4.0)


def test_tensors_of_the_last_round_are_not_aliased_by_the_next():
    """What a program keeps of a result stays what it was, whatever later rounds do."""
    ran = simulate(algorithm="test_keeping", nodes=2, rounds=3)
    kept: Any = ran.replicas[1].local["kept"]
    assert [float(one[0]) for one in kept] == [0.5, 1.5, 2.5]


class Keeping(Program, name="test_keeping"):
    async def round(self, node: Node) -> None:
        node.parameters.fill_(float(node.id + node.round))
        mean = await AllReduce(node.parameters)
        kept: Any = node.local.get("kept", [])
        value: Tensor = mean.value
        node.local["kept"] = [*kept, value]
