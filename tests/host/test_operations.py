"""Every operation, in the simulator: what it gives, what it costs, and how it is misused."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from starling.algorithms.api import (
    SERVER,
    AllReduce,
    Gradient,
    Handle,
    NeighborAllGather,
    Node,
    Receive,
    Send,
    Start,
    Train,
    Wait,
)
from starling.algorithms.topologies import Ring
from starling.algorithms.topologies.complete import Complete
from starling.orchestrator.errors import NodeFailedError, ProgramsDivergeError, RunError
from tests import operations
from tests.toys import Program, attempt, simulate

HERE = operations.__name__
LARGE = 40_000
"""Values that do not travel inline."""


def run(program: str, nodes: int = 4, *, network: dict[str, Any] | None = None, rounds: int = 2, **fields: Any):
    return simulate(algorithm={"name": f"{HERE}:{program}"} | fields, nodes=nodes, network=network or {}, rounds=rounds)


# --- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [3, LARGE])
def test_neighbours_mix_with_the_topologys_weights(values: int):
    ran = run("Gossiping", 5, rounds=1, values=values)
    weights = Ring().mixing(tuple(range(5)), 0, 0).matrix()
    mixed = torch.from_numpy(weights) @ torch.arange(5.0, dtype=torch.float64)
    for node, replica in ran.replicas.items():
        x: Any = replica.local["x"]
        assert float(x[0]) == pytest.approx(float(mixed[node]))
        assert replica.local["senders"] == sorted({(node - 1) % 5, (node + 1) % 5})
    assert ran.rounds[0].payload_bytes == 10 * 4 * values


def test_a_complete_graph_is_the_mean_and_costs_as_much_as_all_to_all():
    ran = run("Gossiping", 4, topology="complete", rounds=1)
    assert Complete().num_messages(4) == 12
    assert ran.rounds[0].payload_bytes == 12 * 12
    assert {float(one.parameters[0]) for one in ran.replicas.values()} == {1.5}


def test_the_run_ends_with_the_mean_of_models_that_differ():
    ran = run("Gossiping", 4, rounds=1)
    mean = torch.stack([one.parameters for one in ran.replicas.values()]).mean(0)
    assert ran.digest == ran.replicas[0].model_digest(mean, ran.replicas[0].buffers)
    assert len({float(one.parameters[0]) for one in ran.replicas.values()}) > 1


def test_gossip_takes_the_time_of_its_edges():
    slow = {"bandwidth_mbps": 8, "latency_ms": 100}
    ran = run("Gossiping", 5, rounds=1, values=LARGE, network=slow)
    # 160 kB to each of two neighbours at 1 MB/s, and a latency.
    assert ran.virtual_seconds == pytest.approx(0.32 + 0.1)


# --- start and wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [4, LARGE])
def test_started_exchanges_give_what_awaited_ones_give(values: int):
    ran = run("Overlapping", values=values)
    x: Any = ran.replicas[2].shared["x"]
    assert x.tolist() == [1.5] * values
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_a_started_exchange_overlaps_with_training():
    class Sequential(Program):
        async def round(self, node: Node) -> None:
            await AllReduce(torch.zeros(LARGE))
            await Train(steps=1)

    class Parallel(Program):
        async def round(self, node: Node) -> None:
            handle = await Start(AllReduce(torch.zeros(LARGE)))
            await Train(steps=1)
            await Wait(handle)

    network = {"bandwidth_mbps": 8, "step_ms": 1000}
    seconds = [
        simulate(algorithm=kind(), nodes=2, rounds=1, network=network).virtual_seconds
        for kind in (Sequential, Parallel)
    ]
    # 160 kB to where they are reduced, and back, at 1 MB/s.
    assert seconds == [pytest.approx(1.32), pytest.approx(1.0)]


def test_a_small_started_exchange_is_on_its_way_while_the_node_trains():
    network = {"latency_ms": 400, "step_ms": 1000}
    ran = run("Overlapping", 2, network=network, rounds=1)
    # A second of training hides both exchanges; then come two more, one after the other.
    assert ran.virtual_seconds == pytest.approx(1.8)


class Misusing(Program, name="test_misusing"):
    """Handles, used as they must not be."""

    how: str

    def init(self, node: Node) -> None:
        node.shared["x"] = torch.zeros(2)

    async def round(self, node: Node) -> None:
        x = torch.zeros(2)
        match self.how:
            case "twice":
                handle = await Start(AllReduce(x))
                await Wait(handle)
                await Wait(handle)
            case "other round":
                await Wait(Handle(0, node.round - 1))
            case "never":
                await Start(AllReduce(x))
            case "written":
                handle = await Start(AllReduce(x))
                x.add_(1)
                await Wait(handle)
            case "train":
                await Start(Train(steps=1))
            case "foreign":
                await Wait(Handle(3, node.round))
            case "mailbox":
                await Send(7, object())  # type: ignore[arg-type]
            case _:
                raise AssertionError


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("twice", "Wait(exchange 0): it was waited for already; keep the result"),
        ("other round", "Wait(exchange 0 of round -1): a handle belongs to its round alone"),
        ("foreign", "Wait(exchange 3 of round 0): a handle belongs to its round alone"),
        ("never", "the round ends while exchange 0 (AllReduce) is in flight; Wait for it"),
        ("written", "what was contributed to exchange 0 was written to between Start and Wait; Start a clone()"),
        ("train", "Start takes an AllReduce, AllGather or NeighborAllGather, not a Train"),
        ("mailbox", "a payload is a object; only tensors, numbers and flat mappings of them can travel"),
    ],
)
def test_misuse_is_named(how: str, text: str):
    ran = attempt(algorithm={"name": "test_misusing", "how": how})
    assert isinstance(ran.error, NodeFailedError)
    assert str(ran.error) == f"node 0, round 0: {text}"
    assert ran.error.traceback is None


def test_members_that_await_different_operations_are_named_with_both():
    class Differing(Program):
        async def round(self, node: Node) -> None:
            own = torch.zeros(1)
            await (NeighborAllGather(own, Ring()) if node.id else AllReduce(own))

    ran = attempt(algorithm=Differing())
    assert isinstance(ran.error, ProgramsDivergeError)
    assert all(part in str(ran.error) for part in ("nodes 0 and 1", "AllReduce(", "NeighborAllGather("))


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [3, LARGE])
def test_messages_within_rounds(values: int):
    ran = run("Mailing", 3, values=values)
    assert [one.local["from"] for one in ran.replicas.values()] == [2, 0, 1]
    assert [record.payload_bytes for record in ran.rounds] == [3 * (4 * values + 8)] * 2
    assert len(ran.sought("received")) == 12
    assert ran.virtual_seconds == pytest.approx(0.4)


def test_who_waits_for_what_never_comes_is_told_so():
    class Waiting(Program):
        async def round(self, node: Node) -> None:
            await Receive()

    ran = attempt(algorithm=Waiting(), nodes=3)
    assert isinstance(ran.error, RunError)
    assert str(ran.error) == "round 0: nodes 0, 1, 2 all wait for messages, and none is on its way"


def test_pings_are_answered_by_who_is_there_and_near():
    ran = run("Pinging", 3, network={"links": [{"between": [0, 2], "latency_ms": 400}]}, rounds=1)
    assert [one.local["answered"] for one in ran.replicas.values()] == [[0, 1], [0, 1, 2], [1, 2]]
    assert ran.rounds[0].seconds == pytest.approx(0.5)
    assert ran.rounds[0].payload_bytes == 0


def test_compute_operations():
    ran = run("Computing", 3)
    parts: list[Any] = [one.local["part"] for one in ran.replicas.values()]
    assert all(torch.equal(parts[0], part) for part in parts)
    # 50 ms of sleep, a gradient of 10 ms, and three forward passes of a third.
    assert ran.rounds[0].seconds == pytest.approx(0.05 + 0.01 + 3 * 0.01 / 3)


# --- close policies -------------------------------------------------------------------------------------------------


def test_the_first_suffice_and_the_others_come_back():
    ran = run("Hasty", 4, first=3, rounds=3)
    assert [one["committed"] for one in ran.sought("commit")] == [(0, 1, 2)] * 3
    assert ran.replicas[0].shared["count"] == 9
    assert ran.virtual_seconds < 1
    assert [(one["node"], one["round"]) for one in ran.sought("transfer")] == [(3, 1), (3, 2)]


def test_a_view_change_is_repaired_before_the_round():
    ran = run("Changing", 3)
    assert ran.replicas[0].shared["changes"] == 0


# --- asynchronous ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [0, LARGE])
def test_an_asynchronous_run_ends_with_its_servers_rounds(large: int):
    ran = run("Counting", 3, rounds=9, large=large)
    assert len(ran.rounds) == 9
    commits = ran.sought("commit")
    assert [one["node"] for one in commits].count(SERVER) == 9
    assert ran.digest == ran.replicas[SERVER].model_digest()
    nbytes = 4 * (3 + large)
    updates, answers = (
        sum(1 for one in ran.sought("received") if (one["node"] == SERVER) == to) for to in (True, False)
    )
    sent = updates * (nbytes + 16) + answers * nbytes
    assert ran.summary is not None
    # What is still on its way at the end was sent too.
    assert sent <= ran.summary.bytes["payload"] <= sent + 3 * (nbytes + 16)


def test_an_asynchronous_run_is_deterministic_and_depends_on_speeds():
    network = {"speeds": {0: 0.3, 2: 3.0}, "latency_ms": 1}
    digests = [run("Counting", 3, rounds=9, network=one).digest for one in (network, network, {})]
    assert digests[0] == digests[1] != digests[2]


def test_a_token_ends_with_its_last_holder():
    ran = run("Passing", 3, rounds=4)
    assert len(ran.rounds) == 4
    assert [one["node"] for one in ran.sought("commit")] == [0, 1, 2] * 4
    assert ran.digest == ran.replicas[2].model_digest()
    assert float(ran.replicas[2].parameters[0]) == 11.0


def test_asynchronous_programs_that_wait_for_one_another_are_told_so():
    class Silent(operations.Passing):
        async def round(self, node: Node) -> None:
            await Receive()

    ran = attempt(algorithm=Silent(), nodes=2)
    assert str(ran.error).startswith("every node waits for a message, and none is on its way")


def test_an_asynchronous_program_has_no_barrier():
    class Meeting(operations.Passing):
        async def round(self, node: Node) -> None:
            await AllReduce(torch.zeros(1))

    ran = attempt(algorithm=Meeting(), nodes=2)
    assert "an asynchronous program awaits AllReduce" in str(ran.error)


def test_the_server_meets_the_others_in_mailboxes_alone():
    class Joining(operations.Counting):
        async def server(self, node: Node) -> None:
            await AllReduce(torch.zeros(1))

    ran = attempt(algorithm=Joining(), nodes=2)
    assert str(ran.error).startswith("server, round 0: the server awaits AllReduce")


def test_the_server_owns_no_data():
    class Training(operations.Counting):
        async def server(self, node: Node) -> None:
            await Gradient()

    ran = attempt(algorithm=Training(), nodes=2)
    assert str(ran.error).startswith("server, round 0: ")
    assert "no training data" in str(ran.error)


class Synchronous(Program):
    async def server(self, node: Node) -> None:
        await Receive()


class Replicated(Program):
    synchronous: ClassVar[bool] = False


@pytest.mark.parametrize("form", [Synchronous, Replicated])
def test_forms_that_cannot_be_are_refused(form: type[Program]):
    with pytest.raises(Exception, match=f"{form.__name__} .*synchronous"):
        attempt(algorithm=form())


# --- a part of the model --------------------------------------------------------------------------------------------


def test_some_parameters_are_trained_and_the_distance_is_reported():
    ran = run("Training", 3)
    assert [one.reported["node"] for one in ran.rounds] == [{"mean": 1.0, "min": 0.0, "max": 2.0}] * 2
    assert all(one.reported["moved"]["min"] > 0 for one in ran.rounds)
