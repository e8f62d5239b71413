"""Values that are not finite, or whose sum is not: stopped where they arise, by the name of their node."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from starling.algorithms.aggregators.robust import Median
from starling.algorithms.api import AllGather, AllReduce, NeighborAllGather, Node, Receive, Send, Start, Train, Wait
from starling.algorithms.codecs.int8 import Int8
from starling.algorithms.topologies import Ring
from starling.orchestrator import api
from starling.orchestrator.errors import StarlingError
from tests.toys import Program, attempt, simulate

BAD = {"nan": math.nan, "infinite": math.inf, "large": 3e38}
OPERATIONS = ("reduce", "started", "encoded", "gather", "neighbors", "parameters", "buffers")


class Poisoned(Program, name="test_poisoned"):
    """Node 1 gives, in round 1, what nobody should have."""

    operation: Literal["reduce", "started", "encoded", "gather", "neighbors", "parameters", "buffers", "robust"]
    value: Literal["nan", "infinite", "large"]

    replicated = False

    async def round(self, node: Node) -> None:
        await Train(steps=1)
        bad = node.id == 1 and node.round == 1
        if bad and self.operation not in {"parameters", "buffers"}:
            node.parameters.fill_(BAD[self.value])
        given = node.parameters
        match self.operation:
            case "reduce":
                mean = (await AllReduce(given)).value
            case "started":
                mean = (await Wait(await Start(AllReduce(given)))).value
            case "encoded":
                mean = (await AllReduce(given, codec=Int8())).value
            case "robust":
                mean = (await AllReduce(given, aggregator=Median())).value
            case "gather":
                payloads = await AllGather(given)
                mean = torch.stack([*payloads.values()]).sum(dim=0) / len(payloads)
            case "neighbors":
                mean = (await NeighborAllGather(given, Ring())).mix(given)
            case _:
                mean = (await AllReduce(node.parameters)).value
                if bad:
                    (mean if self.operation == "parameters" else node.buffers)[0] = math.nan
        node.parameters.copy_(mean)


def raw(operation: str, value: str, **keys: Any) -> dict[str, Any]:
    task = {"name": "test_toy", "model": "batch_norm"}
    return {"algorithm": {"name": "test_poisoned", "operation": operation, "value": value}, "task": task} | keys


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_node_that_gives_it_is_named_and_nothing_of_it_is_committed(operation: str, value: str):
    ran = attempt(raw(operation, value), nodes=3, rounds=4)
    assert str(ran.error).startswith("node 1, round 1: ")
    assert "finite" in str(ran.error) or "overflows" in str(ran.error)
    assert [one["round"] for one in ran.sought("commit")] == [0]
    assert all(one.committed_model()[0].isfinite().all() for one in ran.replicas.values())


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_its_round_can_be_skipped_and_the_others_go_on(operation: str, value: str):
    ran = simulate(raw(operation, value, on_nan="skip"), nodes=3, rounds=4)
    assert [one["round"] for one in ran.sought("commit")] == [*range(4)]
    if operation not in {"parameters", "buffers"}:
        assert [record.contributing for record in ran.rounds] == [3, 2, 3, 3]
    assert all(one.parameters.isfinite().all() and one.buffers.isfinite().all() for one in ran.replicas.values())


def test_an_aggregator_that_bears_it_is_given_it():
    ran = simulate(raw("robust", "nan"), nodes=3, rounds=4)
    assert [record.contributing for record in ran.rounds] == [3, 3, 3, 3]


class Worker(Program, name="test_poisoned_worker"):
    """A worker sends in its round 1 what nobody should have; the server adds up."""

    value: Literal["nan", "infinite", "large"]
    synchronous = False
    replicated = False

    async def round(self, node: Node) -> None:
        bad = node.id == 1 and node.round == 1
        await Send(-1, torch.full_like(node.parameters, BAD[self.value]) if bad else node.parameters.clone())
        await Receive()

    async def server(self, node: Node) -> None:
        message: Any = await Receive()
        node.parameters.copy_(message.payload)
        await Send(message.sender, 1.0)


def test_a_message_is_held_back():
    keys: dict[str, Any] = {"task": "test_toy", "rounds": 9, "network": {"step_ms": 10, "latency_ms": 1}}
    ran = attempt({"algorithm": {"name": "test_poisoned_worker", "value": "nan"}} | keys, nodes=2)
    assert str(ran.error).startswith("node 1, round 1: what it sends to the server is not finite (NaN)")
    ran = simulate({"algorithm": {"name": "test_poisoned_worker", "value": "nan"}, "on_nan": "skip"} | keys, nodes=2)
    assert ran.replicas[-1].parameters.isfinite().all()
    assert {one["node"] for one in ran.sought("commit")} == {-1, 0, 1}


def test_a_run_that_stops_is_saved_as_it_was_before(tmp_path: Path):
    config = raw("parameters", "nan", rounds=4, tracking="none", checkpoint={"every_rounds": 1})
    config |= {"cluster": {"nodes": {"target": 3}}}
    with pytest.raises(StarlingError, match="node 1, round 1"):
        api.simulate(config, run_dir=tmp_path / "run")
    assert [one.name for one in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-000000"]
    summary = api.resume(tmp_path / "run", ["on_nan=skip"])
    assert (summary.status, summary.rounds) == ("finished", 4)


def test_who_skips_is_named_with_the_reason_when_nobody_is_left():
    task = {"name": "quadratic", "heterogeneity": 1e38}
    ran = attempt(algorithm="fedavg", task=task, on_nan="skip")
    assert "nobody contributes to exchange 0: nodes 0, 1 skip the round (on_nan: skip); node 0: " in str(ran.error)
    assert "not finite after inner step" in str(ran.error) or "loss is" in str(ran.error)
    assert "lower optimizer.lr" in str(ran.error)
