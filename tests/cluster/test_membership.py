"""Losses on Ray: processes that are really killed or stopped, at each phase of an exchange."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from starling import run
from starling.algorithms.topologies.exponential import Exponential
from starling.orchestrator.api import replay
from starling.orchestrator.control import run_state
from starling.orchestrator.control.samples import SampleProgress
from starling.orchestrator.records.observers import Observer
from tests.cluster.machines import Story
from tests.draws import expected, num_complete

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import RoundRecord

    Make = Callable[..., Config]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

FEDAVG: dict[str, Any] = {"name": "fedavg", "steps": 1}
APART = "cluster.nodes_per_actor=1"
LARGE = ["task.model.name=mlp", "task.model.width=20000", APART]
"""6 MB, in parts."""


def events(run_dir: Path, what: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == what]


def faults(*which: dict[str, Any]) -> str:
    return f"faults.events={json.dumps(which)}"


@pytest.mark.parametrize(
    "phase",
    [
        "secure",
        *(pytest.param(phase, marks=[pytest.mark.slow, pytest.mark.long]) for phase in ("train", "post", "deliver")),
    ],
)
def test_a_killed_node_is_replaced_and_all_end_alike(phase: str, config: Make, tmp_path: Path):
    # With all four needed the run waits for the new one, and its last rounds show that it has the others' state.
    kill = {"kind": "kill", "node": 2, "round": 1, "phase": phase}
    settings = config(FEDAVG, "rounds=5", "cluster.nodes.min=4", *LARGE, faults(kill))
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.rounds == 5
    assert summary.nodes == {"started": 4, "joined": 1, "lost": 1, "drained": 0}
    # Digests are compared at every commit: had the newcomer other bits, the run would have ended there.
    assert events(tmp_path / "run", "commit")[-1]["committed"] == [0, 1, 2, 3]
    assert [one["node"] for one in events(tmp_path / "run", "transfer")] == [2]


@pytest.mark.slow
@pytest.mark.smoke
def test_survivors_go_on_at_once(config: Make, tmp_path: Path):
    kill = {"kind": "kill", "node": 1, "round": 1, "phase": "train"}
    settings = config(FEDAVG, "rounds=3", *LARGE, faults(kill))
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.nodes["lost"] == 1
    assert events(tmp_path / "run", "abort") == []
    assert events(tmp_path / "run", "commit")[1]["committed"] == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.smoke
def test_a_stopped_process_is_ended_and_replaced(config: Make, tmp_path: Path):
    hang = {"kind": "hang", "node": 3, "round": 1, "phase": "train"}
    settings = config(
        FEDAVG,
        "rounds=3",
        "cluster.nodes.min=3",
        "cluster.round_deadline_s=2",
        "cluster.cancel_grace_s=1",
        APART,
        faults(hang),
    )
    summary = run(settings, run_dir=tmp_path / "run")
    assert summary.rounds == 3
    assert summary.nodes["lost"] == 1
    assert [one["node"] for one in events(tmp_path / "run", "late")] == [3]
    assert "within 1 s (cluster.cancel_grace_s)" in events(tmp_path / "run", "lost")[0]["reason"]


@pytest.mark.slow
def test_the_gap_of_a_killed_node_in_a_directed_graph_is_closed(config: Make, tmp_path: Path):
    kill = {"kind": "kill", "node": 3, "round": 1, "phase": "train"}
    settings = config(
        {"name": "dsgd", "steps": 1, "topology": "exponential"},
        *("rounds=3", "cluster.nodes.target=5", "cluster.nodes.min=4", APART, faults(kill)),
    )
    story = Story()
    summary = run(settings, run_dir=tmp_path / "run", observers=[story])
    assert summary.nodes["lost"] == 1
    assert [tuple(one["committed"]) for one in story.of("commit")[:2]] == [(0, 1, 2, 3, 4), (0, 1, 2, 4)]
    # The node's successors hear from its predecessors instead. Had the two cycles of offsets 1 and 2 fallen apart, as
    # they would if the gap stayed, there would be no messages but a few.
    mixing = Exponential().mixing(range(5), 1, settings.seed, {0, 1, 2, 4})
    all_there, with_gap = Exponential().mixing(range(5), 0, settings.seed).num_messages, mixing.num_messages
    assert story.rounds[1].payload_bytes * all_there == story.rounds[0].payload_bytes * with_gap
    assert all(len(mixing.in_neighbors(node)) > 1 for node in (0, 1, 2, 4))
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == summary.digest


@pytest.mark.slow
def test_each_sample_is_committed_exactly_once_per_epoch(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one node is away its part is drawn by the others; what the dead drew and did not commit is drawn again."""
    kept: list[SampleProgress] = []

    class Kept(SampleProgress):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(run_state, "SampleProgress", Kept)
    kills = [{"kind": "kill", "node": 2, "round": 3, "phase": "post"}]
    kills += [{"kind": "kill", "node": 1, "round": number, "phase": "train"} for number in range(6, 40)]
    settings = config(
        {"name": "tests.draws:Draws", "seconds": 0.1},
        "rounds=80",
        "data.batch_size=2",
        APART,
        faults(*kills),
        task="tests.draws:Numbered",
    )
    summary = run(settings, run_dir=tmp_path / "run")
    (samples,) = kept
    assert samples.ledger is not None
    drawn: dict[tuple[int, int], list[int]] = {}
    for node in range(4):
        for line in (tmp_path / f"run/logs/node-{node:03}.log").read_text().splitlines():
            numbers = line.split()
            if all(number.isdigit() for number in numbers):
                # Of several attempts at a round the last one counts.
                drawn[node, int(numbers[0])] = list(map(int, numbers[1:]))
    count: Counter[int] = Counter()
    for event in events(tmp_path / "run", "commit"):
        for node in event["committed"]:
            count.update(drawn[node, event["round"]])
    assert count == expected(samples.ledger, settings)
    assert min(count[number] for number in range(40)) >= num_complete(samples.ledger) >= 10
    assert any(one["extras"] for one in events(tmp_path / "run", "plan"))
    assert summary.nodes["lost"] >= 2
    assert summary.samples["committed"] == count.total()
    assert replay(tmp_path / "run", run_dir=tmp_path / "again").digest == summary.digest


class _Drift(Observer):
    """Lets data be read differently from a round on, and as before when a process was refused for it so often.

    ``refused``: a file that is there from the first refusal on.
    """

    def __init__(self, marker: Path, times: int, refused: Path) -> None:
        self._marker, self._times, self._refused = marker, times, refused
        self.said: list[str] = []

    def on_round(self, record: RoundRecord) -> None:
        if record.round == 0:
            self._marker.touch()

    def on_log(self, node: int, lines: Sequence[str]) -> None:
        found = [line for line in lines if "are not those of" in line]
        self.said += found
        if self.said:
            self._refused.touch()
        if len(self.said) == self._times:
            self._marker.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "times", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.smoke]), pytest.param(10**9, marks=pytest.mark.slow)]
)
def test_a_replacement_with_other_data_is_refused_and_the_others_go_on(times: int, config: Make, tmp_path: Path):
    """It is tried again, elsewhere if there is another machine; that fails for good here in the second case."""
    refused = tmp_path / "refused"
    drift = _Drift(tmp_path / "marker", times, refused)
    kill = {"kind": "kill", "node": 2, "round": 1, "phase": "train"}
    task = {"name": "tests.cluster.programs:Drifting", "marker": str(tmp_path / "marker")}
    # The rounds last until a process was refused: without that they would be over before one has begun.
    paced = {"name": "tests.cluster.programs:Paced", "until": str(refused)}
    least = 3 if times > 1 else 4
    settings = config(paced, "rounds=300", f"cluster.nodes.min={least}", APART, faults(kill), task=task)
    summary = run(settings, run_dir=tmp_path / "run", observers=[drift])
    assert summary.status == "finished"
    assert summary.nodes["joined"] == (0 if times > 1 else 1)
    assert all(
        "the data of node 2 (pid " in line and "values of the training samples differ" in line for line in drift.said
    )
    assert drift.said[0].endswith("it is started again")
    assert len(drift.said) >= 1
