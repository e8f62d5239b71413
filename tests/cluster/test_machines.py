"""Machines that die, are taken away, announced to be, or come in the middle of a run: several raylets on this one."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import ray

from starling import run
from starling.actors.host.compatibility import versions
from starling.actors.remote.messages import Setup
from starling.actors.remote.node_actor import remote_class
from starling.actors.wire.tickets import Failed
from starling.algorithms.api import SERVER
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import RunError
from starling.orchestrator.runtimes.cluster.runtime import Cluster
from tests.cluster.machines import Machines, Story, wait_until_gone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starling.orchestrator.records.observers import Summary

    Go = Callable[..., Summary]

# A process is connected to one Ray at a time: machines of one worker serve them all.
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)),
    pytest.mark.xdist_group("machines"),
]

PACED = "tests.cluster.programs:Paced"
FEDAVG: dict[str, Any] = {"name": "fedavg", "steps": 1}
LARGE = ["task.model.name=mlp", "task.model.width=20000"]
"""6 MB, in parts."""


@pytest.fixture
def story() -> Iterator[Story]:
    """What happens in the test's run; no process of it is left afterwards."""
    told = Story()
    yield told
    assert told.processes
    assert wait_until_gone(told.processes) == set()


@pytest.fixture
def until(tmp_path: Path) -> Path:
    """Rounds take a while until this file is there."""
    return tmp_path / "until"


@pytest.fixture
def go(story: Story, until: Path, tmp_path: Path) -> Go:
    """Runs a configuration, rounds that take a while by default, each node in a process of its own with one CPU."""

    def start(*overrides: str, algorithm: object = None, rounds: int = 60) -> Summary:
        raw = {
            "rounds": rounds,
            "algorithm": algorithm or {"name": PACED, "until": str(until)},
            "task": "digits",
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluation": {"every_rounds": 0},
            "cluster": {"address": "auto", "num_cpus": 1, "drain_s": 60},
            "tracking": "none",
        }
        settings = resolve(raw, overrides)
        try:
            return run(settings, run_dir=tmp_path / "run", observers=[story])
        finally:
            for event in story.events:  # for those who look into a failure
                if event["event"] not in ("begin", "commit", "seen") or event.get("joined") or event.get("left"):
                    print(json.dumps(event))  # noqa: T201

    return start


def hurry_when(story: Story, until: Path, what: str, nodes: set[int]) -> None:
    """Let the rest of the rounds take no time as soon as all of ``nodes`` have had such an event."""
    for node in nodes:
        story.when(what, lambda: until.touch() if nodes <= set(story.nodes(what)) else None, node=node)


def last_committed(story: Story) -> list[int]:
    return list(story.of("commit")[-1]["committed"])


def faults(*which: dict[str, Any]) -> str:
    return f"faults.events={json.dumps(which)}"


@pytest.fixture
def with_its_machine(machines: Machines, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scheduled kills take the whole machine."""

    def kill(_: Cluster, node: int) -> None:
        # A process outlives its raylet for a moment, in which a whole run may pass.
        machine = machines.of(story.pids[node])
        os.kill(story.pids[node], signal.SIGKILL)
        machines.kill(machine)

    monkeypatch.setattr(Cluster, "kill", kill)


# --- machines that die, and that are taken away -----------------------------------------------------------------------


@pytest.mark.smoke
def test_the_nodes_of_a_machine_that_dies_while_they_train_go_on_elsewhere(
    machines: Machines, story: Story, until: Path, go: Go
):
    machines.provide(2, 2, 2)
    victims: set[int] = set()

    def strike() -> None:
        machine = machines.of(story.pids[3])
        victims.update(node for node in range(4) if machines.of(story.pids[node]) is machine)
        hurry_when(story, until, "recovered", victims)
        machines.kill(machine)

    story.when("begin", strike, round=2)
    summary = go("cluster.nodes={min: 2, target: 4}")
    assert summary.nodes == {"started": 4, "joined": len(victims), "lost": len(victims), "drained": 0}
    assert set(story.nodes("lost")) == victims
    assert story.of("abort") == []
    assert set(story.of("commit")[2]["committed"]) == set(range(4)) - victims
    assert last_committed(story) == [0, 1, 2, 3]
    assert summary.replicas == "identical"
    assert summary.rounds == 60


@pytest.mark.parametrize("phase", ["post", "secure", "deliver"])
@pytest.mark.usefixtures("with_its_machine")
@pytest.mark.long
def test_a_machine_that_dies_during_an_exchange_stops_nobody(
    phase: str, machines: Machines, story: Story, until: Path, go: Go
):
    machines.provide(1, 1, 1, 1)
    hurry_when(story, until, "recovered", {1})
    kill = {"kind": "kill", "node": 1, "round": 1, "phase": phase}
    summary = go("cluster.nodes={min: 2, target: 3}", *LARGE, faults(kill))
    assert summary.nodes == {"started": 3, "joined": 1, "lost": 1, "drained": 0}
    assert story.of("abort") == []
    assert {0, 2} <= set(story.of("commit")[1]["committed"])
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


@pytest.mark.long
def test_the_nodes_of_a_machine_that_is_removed_go_on_elsewhere(machines: Machines, story: Story, until: Path, go: Go):
    machines.provide(1, 1, 1, 1)
    hurry_when(story, until, "recovered", {2})
    story.when("begin", lambda: machines.remove(machines.of(story.pids[2])), round=2)
    summary = go("cluster.nodes={min: 2, target: 3}")
    # Ray ends its processes in its own way; whether there was time for a notice is not ours to say.
    assert summary.nodes["lost"] + summary.nodes["drained"] == 1
    assert summary.nodes["joined"] == 1
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


# --- notices ----------------------------------------------------------------------------------------------------------


def test_a_drained_machine_loses_nothing(machines: Machines, story: Story, until: Path, go: Go):
    machines.provide(1, 1, 1, 1)
    hurry_when(story, until, "recovered", {2})
    old: list[Any] = []

    def drain() -> None:
        old.append(machines.of(story.pids[2]))
        machines.drain(old[0], seconds=60)

    story.when("begin", drain, round=2)
    # It is gone before anybody takes its node's place: what that had lies elsewhere by then.
    story.when("left", lambda: machines.kill(old[0]), node=2)
    summary = go("cluster.nodes={min: 2, target: 3}")
    assert summary.nodes == {"started": 3, "joined": 1, "lost": 0, "drained": 1}
    assert "taken away" in story.of("notice")[0]["reason"]
    assert 0 < story.of("notice")[0]["left_s"] <= 60
    handed = next(one for one in story.of("transfer") if one["node"] == 2)
    assert handed["donor"] == 2
    # Its own count goes on; only rounds in which it was not there are missing.
    done = [line.split() for line in story.lines[2] if line.startswith("done ")]
    away = story.rounds[-1].round + 1 - sum(2 in one["committed"] for one in story.of("commit"))
    assert int(done[-1][1]) == 60 - away
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


@pytest.mark.long
def test_sigterm_is_a_notice(machines: Machines, story: Story, until: Path, go: Go):
    machines.provide(1, 1, 1, 1)
    hurry_when(story, until, "recovered", {1})
    story.when("begin", lambda: story.terminate(1), round=2)
    summary = go("cluster.nodes={min: 2, target: 3}")
    assert summary.nodes == {"started": 3, "joined": 1, "lost": 0, "drained": 1}
    assert "SIGTERM" in story.of("notice")[0]["reason"]
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


# --- machines that come -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "late"),
    [("{min: 2, target: 4}", {2, 3}), ("{min: 2, target: auto, max: 4}", {2, 3})],
    ids=["target", "auto"],
)
def test_a_machine_that_is_added_is_used_at_a_later_round(
    nodes: str, late: set[int], machines: Machines, story: Story, until: Path, go: Go
):
    machines.provide(1, 1)
    hurry_when(story, until, "recovered", late)
    # In the middle of one round, and never more than there is to be.
    story.when("begin", lambda: (machines.add(2), machines.add(1)), round=2)
    summary = go(f"cluster.nodes={nodes}")
    assert summary.nodes == {"started": 2, "joined": 2, "lost": 0, "drained": 0}
    assert story.of("begin")[0]["view"] == (0, 1)
    assert last_committed(story) == [0, 1, 2, 3]
    assert summary.replicas == "identical"
    assert story.of("abort") == []
    if "auto" in nodes:
        # The data are divided among the two that were there; those that come are handed some of theirs.
        planned = {one["node"] for one in story.of("plan")}
        assert late < planned <= {0, 1, 2, 3}
        assert {one["node"] for one in story.of("plan") if one["extras"]} >= late


@pytest.mark.long
def test_a_fresh_node_never_goes_on_alone(machines: Machines, story: Story, go: Go):
    first, second = machines.provide(1, 1)

    def wipe() -> None:
        # A process outlives its raylet for a moment, and might give the fresh node its state in it.
        for node in (0, 1):
            os.kill(story.pids[node], signal.SIGKILL)
        machines.kill(first)
        machines.kill(second)

    story.when("begin", lambda: machines.add(1), round=2)
    story.when("up", wipe, node=2)
    with pytest.raises(RunError, match=r"no node is left that has the model of round \d+"):
        go("cluster.nodes={min: 1, target: 3}", "cluster.min_nodes_timeout_s=60", rounds=1000)
    assert story.of("transfer") == []
    assert all(2 not in one["committed"] for one in story.of("commit"))


# --- transfers, servers, spares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 2], ids=["donor", "joiner"])
@pytest.mark.usefixtures("with_its_machine")
@pytest.mark.long
def test_a_machine_that_dies_during_a_transfer_is_made_up_for(victim: int, machines: Machines, story: Story, go: Go):
    machines.provide(1, 1, 1, 1, 1)
    # All three are needed: round 1 waits for the newcomer, and its transfer belongs to it.
    kills = [
        {"kind": "kill", "node": 2, "round": 1, "phase": "train"},
        {"kind": "kill", "node": victim, "round": 1, "phase": "transfer"},
    ]
    summary = go("cluster.nodes={min: 3, target: 3}", *LARGE, faults(*kills), algorithm=FEDAVG, rounds=4)
    assert summary.rounds == 4
    assert summary.nodes == {"started": 3, "joined": 2, "lost": 2, "drained": 0}
    assert story.nodes("lost") == [2, victim]
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


@pytest.mark.usefixtures("with_its_machine")
@pytest.mark.long
def test_a_server_that_dies_with_its_machine_goes_on_elsewhere(machines: Machines, story: Story, go: Go):
    machines.provide(1, 1, 1, 1)
    kill = {"kind": "kill", "node": "server", "round": 4, "phase": "receive"}
    fedbuff = {"name": "fedbuff", "buffer_size": 2, "steps": 2}
    summary = go("cluster.nodes={min: 1, target: 2}", faults(kill), algorithm=fedbuff, rounds=12)
    assert summary.rounds == 12
    assert story.nodes("lost") == [SERVER]
    assert summary.nodes == {"started": 3, "joined": 1, "lost": 1, "drained": 0}
    # Its own state, which lay on another machine, and no round of it is missing.
    assert {(one["node"], one["donor"]) for one in story.of("transfer")} == {(SERVER, SERVER)}
    assert {one["round"] for one in story.of("commit") if one["node"] == SERVER} == set(range(12))


@pytest.mark.parametrize("comes_up", ["before", "after"])
@pytest.mark.long
def test_a_spare_takes_the_place_of_a_node_whose_machine_died(
    comes_up: str, machines: Machines, story: Story, until: Path, go: Go
):
    # The spare has the only place that is left, whether it is up before the machine dies or after that.
    machines.provide(1, 1, 1, 1)
    hurry_when(story, until, "recovered", {1})
    story.when("begin", lambda: machines.kill(machines.of(story.pids[1])), round=3 if comes_up == "after" else 40)
    summary = go("cluster.nodes={min: 2, target: 3}", "cluster.warm_spares=1", rounds=100)
    assert summary.nodes == {"started": 3, "joined": 1, "lost": 1, "drained": 0}
    assert last_committed(story) == [0, 1, 2]
    assert summary.replicas == "identical"


@pytest.mark.long
def test_a_machine_that_has_just_died_keeps_no_run_from_beginning(machines: Machines, story: Story, go: Go):
    *_, dead = machines.provide(1, 1, 1)
    machines.kill(dead)
    summary = go("cluster.nodes={min: 2, target: 3}", algorithm=FEDAVG, rounds=3)
    assert summary.rounds == 3
    assert summary.replicas == "identical"


@pytest.mark.long
def test_a_process_with_another_version_is_refused(machines: Machines):
    machines.provide(1)
    config = resolve({"algorithm": "fedavg", "task": "digits", "tracking": "none"})
    raw = config.dump()
    setup = Setup(
        nodes=(0,),
        num_nodes=1,
        algorithm=raw["algorithm"],
        task=raw["task"],
        data=raw["data"],
        optimizer=raw["optimizer"],
        seed=0,
        rounds=1,
        skip_nan=False,
        fetch_timeout_s=10,
        drain_s=10,
        versions=versions(),
    )
    actor = remote_class().options(num_cpus=1).remote()
    try:
        for what, theirs in (("torch", "2.12.1"), ("Starling", "0.0.9 (sources 01234567)")):
            other = replace(setup, versions=versions() | {what: theirs})
            refused = ray.get(actor.setup.remote(other), timeout=60)
            assert isinstance(refused, Failed)
            assert "cannot take part" in refused.message
            assert f"{what} {versions()[what]}, and the controller {theirs}" in refused.message
            assert "\n" not in refused.message
            assert refused.traceback is None
        assert not isinstance(ray.get(actor.setup.remote(setup), timeout=60), Failed)
    finally:
        ray.kill(actor)
