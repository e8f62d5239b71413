"""Metrics that programs report: of which round, of whom, and where they are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from starling import resume, simulate
from starling.algorithms.api import SERVER, Message, Node, Receive, Send, Train
from starling.algorithms.errors import ProgramError
from starling.orchestrator.control.round_records import spread_of
from starling.orchestrator.errors import NodeFailedError
from starling.orchestrator.records.observers import RoundRecord
from starling.orchestrator.tracking.mlflow_tracker import metrics_of
from tests.control.test_membership import fault
from tests.toys import Program, attempt, replica
from tests.toys import simulate as simulate_toy

HERE = __name__


class Telling(Program, name="test_telling"):
    """Reports a number that depends on node and round, and one of the first node's alone."""

    async def round(self, node: Node) -> None:
        node.report(place=99.0)
        await Train(steps=1)
        node.report(place=10.0 * node.round + node.id)
        if node.id == node.view.members[0]:
            node.report(first=1)


class Wrong(Program, name="test_telling_wrong"):
    async def round(self, node: Node) -> None:
        text: Any = "0.5"
        node.report(share=text)


class Asking(Program, name="test_telling_server"):
    """Asynchronous: the server reports how many it has answered."""

    replicated: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False

    async def round(self, node: Node) -> None:
        node.report(own=float(node.id))
        await Send(SERVER, 1.0)
        await Receive()

    async def server(self, node: Node) -> None:
        answered = 0
        while answered < 2:
            got = await Receive()
            if isinstance(got, Message):
                await Send(got.sender, 1.0)
                answered += 1
        node.report(answered=answered)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_round_has_mean_and_span_over_its_nodes():
    ran = simulate_toy(algorithm="test_telling", nodes=3, rounds=2)
    assert [one.reported for one in ran.rounds] == [
        {"first": {"mean": 1.0, "min": 1.0, "max": 1.0}, "place": {"mean": first + 1, "min": first, "max": first + 2}}
        for first in (0.0, 10.0)
    ]
    assert [one.node_reported for one in ran.rounds] == [None, None]


def test_a_lost_node_and_a_round_that_is_given_up_report_nothing():
    ran = simulate_toy(
        algorithm="test_telling", nodes=3, rounds=4, network={"start_s": 5}, faults={"events": [fault(2, 1, "train")]}
    )
    assert ran.rounds[1].reported["place"] == {"mean": 10.5, "min": 10.0, "max": 11.0}


def test_each_nodes_value_is_kept_on_demand_and_tracked():
    ran = simulate_toy(algorithm="test_telling", nodes=2, rounds=1, evaluation={"per_node": True})
    (record,) = ran.rounds
    assert record.node_reported == {0: {"place": 0.0, "first": 1.0}, 1: {"place": 1.0}}
    tracked = {name: value for name, value in metrics_of(record).items() if name.startswith("algorithm/")}
    assert tracked == {
        "algorithm/first": 1.0,
        "algorithm/first_min": 1.0,
        "algorithm/first_max": 1.0,
        "algorithm/place": 0.5,
        "algorithm/place_min": 0.0,
        "algorithm/place_max": 1.0,
        "algorithm/nodes/0/place": 0.0,
        "algorithm/nodes/0/first": 1.0,
        "algorithm/nodes/1/place": 1.0,
    }


def test_a_server_reports_too_and_its_rounds_do_not_count_as_training():
    ran = simulate_toy(algorithm="test_telling_server", nodes=2, rounds=2)
    assert [one.reported["answered"]["mean"] for one in ran.rounds] == [2.0, 2.0]
    assert all(one.contributing <= 2 for one in ran.rounds)
    assert any("own" in one.reported for one in ran.rounds)


def test_what_is_no_number_is_refused():
    ran = attempt(algorithm="test_telling_wrong")
    assert isinstance(ran.error, NodeFailedError)
    assert "node.report(share=…): a str, and not a number; of a tensor, give its .item()" in str(ran.error)


def test_a_name_that_a_tracker_would_refuse_is_refused():
    with pytest.raises(ProgramError, match=r"node.report\('a b:c'=…\): a name has letters, digits"):
        replica().report(**{"a b:c": 1.0})


@pytest.mark.parametrize("values", [(math.inf, -math.inf), (1e308, 1e308), (math.nan, 1.0)])
def test_no_value_is_too_odd_for_a_mean(values: tuple[float, ...]):
    found = spread_of([(node, {"x": value}) for node, value in enumerate(values)])
    assert not math.isfinite(found["x"]["mean"])


@pytest.mark.pictures
def test_it_is_in_the_run_directory_after_a_resume_too_and_drawn(tmp_path: Path):
    config = {
        "algorithm": f"{HERE}:Telling",
        "task": "digits",
        "rounds": 4,
        "tracking": "none",
        "checkpoint": {"every_rounds": 1},
        "cluster": {"nodes": {"target": 2}},
    }
    simulate(config | {"rounds": 2}, run_dir=tmp_path / "run")
    resume(tmp_path / "run", ["rounds=4"])
    assert [one["reported"]["place"]["mean"] for one in lines(tmp_path / "run")] == [0.5, 10.5, 20.5, 30.5]
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000


def test_a_record_without_reports_draws_and_tracks_nothing_of_it():
    ran = simulate_toy(nodes=2)
    record: RoundRecord = ran.rounds[0]
    assert record.reported == {}
    assert not [name for name in metrics_of(record) if name.startswith("algorithm/")]
