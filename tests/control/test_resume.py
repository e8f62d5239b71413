"""Going on from a checkpoint: in the simulator, where all of it is exact."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starling.orchestrator import api, driver
from starling.orchestrator.checkpoints.schedule import Cadence, Checkpointing, complete
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.checkpoints.writer import CheckpointWriter
from starling.orchestrator.config.sections import CheckpointConfig
from starling.orchestrator.errors import ConfigError, LeaseError, RunDirectoryError, StarlingError
from starling.orchestrator.records.lease import Lease
from starling.orchestrator.records.observers import Observer, RoundRecord, Summary
from starling.orchestrator.runtimes.simulator.states import SimulatedStates
from tests.checkpoint_states import states
from tests.conformance import StoppedError, Stopper

DIGITS: dict[str, Any] = {
    "task": {"name": "digits", "model": {"name": "mlp", "width": 16}},
    "algorithm": {"name": "diloco", "inner_steps": 3},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "evaluation": {"every_rounds": 0},
    "tracking": "none",
    "rounds": 8,
    "cluster": {"nodes": {"target": 4}},
    "checkpoint": {"every_rounds": 2},
}
FEDBUFF = DIGITS | {"algorithm": {"name": "fedbuff", "buffer_size": 2, "steps": 2}, "optimizer": {"lr": 0.1}}


class Interrupter(Observer):
    """Ctrl-C after a round."""

    def __init__(self, last: int) -> None:
        self._last = last

    def on_round(self, record: RoundRecord) -> None:
        if record.round == self._last:
            raise KeyboardInterrupt


def stopped(path: Path, *, after: int = 4, interrupt: bool = False, raw: Any = DIGITS, **keys: Any) -> Path:
    """The directory of a run that was ended in the middle."""
    observer = Interrupter(after) if interrupt else Stopper(after)
    with contextlib.suppress(StoppedError, KeyboardInterrupt):
        api.simulate(raw | keys, run_dir=path, observers=[observer])
    return path


def lines(path: Path, name: str = "events.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole() -> Summary:
    """The undisturbed run."""
    return api.simulate(DIGITS | {"checkpoint": {"every_rounds": 0}})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _somewhere(tmp_path_factory: pytest.TempPathFactory):
    with contextlib.chdir(tmp_path_factory.mktemp("runs")):
        yield


def test_checkpoints_change_nothing(whole: Summary, tmp_path: Path):
    kept = api.simulate(DIGITS | {"checkpoint": {"every_rounds": 1, "keep": 2}}, run_dir=tmp_path / "run")
    assert kept.digest == whole.digest
    assert kept.checkpoints is not None
    assert kept.checkpoints["written"] == 8
    assert sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir()) == ["round-000006", "round-000007"]
    assert whole.checkpoints is None


def test_ctrl_c_saves_the_last_commit(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run", after=4, interrupt=True)
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["status"], summary["checkpoints"]["last_round"]) == ("interrupted", 4)
    assert api.resume(path).digest == whole.digest
    assert [event["round"] for event in lines(path) if event["event"] == "resume"] == [4]
    assert [record["round"] for record in lines(path, "metrics.jsonl")] == list(range(8))


def test_at_most_what_was_done_since_the_last_checkpoint_is_done_again(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run", after=4)
    begun: list[int] = []

    class Watch(Observer):
        def on_round(self, record: RoundRecord) -> None:
            begun.append(record.round)

    assert api.resume(path, observers=[Watch()]).digest == whole.digest
    assert begun == [4, 5, 6, 7]  # the checkpoint is of round 3
    undone = [event["round"] for event in lines(path, "undone.jsonl") if event["event"] == "commit"]
    assert undone == [4]


def test_a_run_may_be_killed_again_and_again(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run", after=2)
    for after in (4, 5, 7):
        with contextlib.suppress(StoppedError):
            api.resume(path, observers=[Stopper(after)])
    assert api.resume(path).digest == whole.digest


def test_the_checkpoint_before_the_last(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run", after=4)
    summary = api.resume(path, from_previous=True)
    assert summary.digest == whole.digest
    assert [event["round"] for event in lines(path) if event["event"] == "resume"] == [1]


def test_a_run_that_was_taken_back_never_goes_on_from_what_it_left(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run", after=6)
    for stop in (True, False):  # the first is killed before it has saved anything
        with contextlib.suppress(StoppedError):
            api.resume(path, from_previous=stop, observers=[Stopper(4)] if stop else [])
        left = sorted(one.name for one in (path / "checkpoints").iterdir())
        assert left[-1] == ("round-000003" if stop else "round-000007")
    assert json.loads((path / "summary.json").read_text())["digest"] == whole.digest
    assert [event["round"] for event in lines(path) if event["event"] == "resume"] == [3]
    assert [event["round"] for event in lines(path) if event["event"] == "commit"] == list(range(8))
    assert [record["round"] for record in lines(path, "metrics.jsonl")] == list(range(8))


def test_a_record_that_is_shorter_than_its_checkpoint_ends_with_a_whole_line(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run")
    data = (path / "events.jsonl").read_bytes()
    (path / "events.jsonl").write_bytes(data[: data.index(b'"saving"') - 20])
    assert api.resume(path).digest == whole.digest
    assert lines(path)


def test_a_finished_run_is_only_told_of_and_can_be_made_longer(whole: Summary, tmp_path: Path):
    path = tmp_path / "run"
    constant = {"optimizer": {"name": "adamw", "lr": 0.01}}
    api.simulate(DIGITS | constant | {"rounds": 5}, run_dir=path)
    before = (path / "summary.json").read_bytes()
    told = api.resume(path)
    assert (told.status, told.rounds) == ("finished", 5)
    assert (path / "summary.json").read_bytes() == before
    longer = api.resume(path, ["rounds=8"])
    assert (longer.rounds, longer.digest) == (8, whole.digest)
    with pytest.raises(ConfigError, match="rounds: 2: the checkpoint, of round 7, has 8 done already; set more"):
        api.resume(path, ["rounds=2"])


def test_more_nodes_join_and_fewer_go_on(tmp_path: Path):
    more = api.resume(stopped(tmp_path / "more"), ["cluster.nodes.target=6"])
    assert (more.status, more.nodes["joined"], more.replicas) == ("finished", 2, "identical")
    fewer = api.resume(stopped(tmp_path / "fewer"), ["cluster.nodes.target=2"])
    assert (fewer.status, fewer.nodes["lost"], fewer.replicas) == ("finished", 2, "identical")
    assert {tuple(event["view"]) for event in lines(tmp_path / "fewer") if event["event"] == "begin"} == {
        (0, 1, 2, 3),
        (0, 1),
    }


def test_hyper_parameters_may_change_and_what_the_state_is_of_may_not(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run")
    for override, message in (
        ("task.model.width=17", "task.model"),
        ("algorithm=fedavg", "algorithm.name"),
        ("optimizer=sgd", "optimizer.name"),
        ("seed=3", "seed"),
    ):
        with pytest.raises(ConfigError, match=rf"--set {message}=.*: the checkpoint is of a run with"):
            api.resume(path, [override])
    summary = api.resume(path, ["algorithm.outer.lr=0.1"])
    assert summary.status == "finished"
    assert summary.digest != whole.digest


def test_faults_that_have_happened_do_not_happen_again(tmp_path: Path):
    events = [{"kind": "kill", "node": 1, "round": 2}, {"kind": "kill", "node": 2, "round": 5}]
    faults = {"faults": {"events": events}, "network": {"step_ms": 1000}}
    path = stopped(tmp_path / "run", raw=DIGITS | faults)
    summary = api.resume(path)
    assert (summary.status, summary.nodes["lost"], summary.replicas) == ("finished", 2, "identical")
    assert [event["node"] for event in lines(path) if event["event"] == "fault"] == [1, 2]


def test_a_synchronous_resumed_run_with_losses_is_replayed(tmp_path: Path):
    faults = {"faults": {"events": [{"kind": "kill", "node": 1, "round": 2}]}, "network": {"step_ms": 1000}}
    rollback = {"optimizer": {"name": "adamw", "lr": 0.01, "rollback": True}}
    path = stopped(tmp_path / "run", raw=DIGITS | faults | rollback)
    summary = api.resume(path)
    assert api.replay(path, run_dir=tmp_path / "again").digest == summary.digest


def test_an_asynchronous_run_that_stood_still_for_checkpoints_and_was_resumed_is_replayed(tmp_path: Path):
    path = stopped(tmp_path / "run", raw=FEDBUFF, network={"bandwidth_mbps": 5, "speeds": {0: 0.4, 2: 1.7}})
    summary = api.resume(path)
    assert [event for event in lines(path) if event["event"] == "again"], "nobody was stopped in mid-round"
    assert api.replay(path, run_dir=tmp_path / "again").digest == summary.digest


def test_an_asynchronous_run_loses_no_message_to_ctrl_c(tmp_path: Path):
    path = stopped(tmp_path / "run", raw=FEDBUFF, interrupt=True, network={"bandwidth_mbps": 5, "speeds": {0: 0.4}})
    summary = api.resume(path)
    assert (summary.status, summary.rounds) == ("finished", 8)
    sent: set[tuple[int, ...]] = set()
    for event in lines(path):
        if event["event"] == "received" and isinstance(event["outcome"], list):
            name = (event["node"], *event["outcome"])
            sent.add(name)
    for sender in range(4):
        numbers = [number for node, who, number, _ in sorted(sent) if node == -1 and who == sender]
        assert numbers == list(range(len(numbers))), "the server has missed an update"


def test_what_can_be_replayed_can_be_after_a_resume(tmp_path: Path):
    config = DIGITS | {"algorithm": {"name": "just_one_byte", "lr": 0.05}, "replay": {"snapshot_every": 3}}
    path = stopped(tmp_path / "run", raw=config)
    summary = api.resume(path)
    from starling.orchestrator.records.rebuild import rebuild

    rebuilt = rebuild(path)
    assert (rebuilt.round, rebuilt.digest) == (7, summary.digest)


def test_who_cannot_be_resumed_is_told_why(tmp_path: Path):
    with pytest.raises(ConfigError, match="this is no run directory"):
        api.resume(tmp_path / "nowhere")
    path = stopped(tmp_path / "run", checkpoint={"every_rounds": 0})
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        api.resume(path)
    assert not (path / "lease.json").exists()
    kept = stopped(tmp_path / "kept")
    lease = Lease(kept)
    with pytest.raises(LeaseError, match="drives this run"):
        api.resume(kept)
    lease.release()


def test_torn_files_of_a_killed_process_do_not_matter(whole: Summary, tmp_path: Path):
    path = stopped(tmp_path / "run")
    for name in ("events.jsonl", "metrics.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"event": "comm')
    (path / "summary.json").unlink()
    assert api.resume(path).digest == whole.digest
    assert len(lines(path, "metrics.jsonl")) == 8


def test_storage_that_fails_ends_no_run(
    whole: Summary, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(CheckpointWriter.__init__.__kwdefaults__, "pauses_s", (0.01,))
    folder = tmp_path / "full"
    folder.write_text("a file where the folder should be")
    summary = api.simulate(DIGITS | {"checkpoint": {"uri": str(folder), "every_rounds": 4}}, run_dir=tmp_path / "run")
    assert summary.digest == whole.digest
    assert summary.checkpoints is not None
    assert summary.checkpoints["written"] == 0
    assert summary.checkpoints["failed"] >= 1
    assert "tried again" in caplog.text


@pytest.mark.parametrize("gone", [[0, 1, 2, 3], [0]])
def test_a_checkpoint_is_given_up_when_those_are_gone_that_it_needs(
    whole: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: list[int]
):
    """Nodes may die after they were asked, all of them or only the one that was to give the shared state."""
    snapshot = SimulatedStates.snapshot
    asked: list[int] = []

    def taken(self: SimulatedStates, nodes: Any, shared: Any, kept: Any = ()) -> Any:
        asked.append(len(asked))
        there = snapshot(self, nodes, shared, kept)
        return ((node, export) for node, export in there if len(asked) != 2 or node not in gone)

    monkeypatch.setattr(SimulatedStates, "snapshot", taken)
    path = stopped(tmp_path / "run", checkpoint={"every_rounds": 1, "keep": 9})
    (failed,) = [event for event in lines(path) if event["event"] == "checkpoint" and event["error"]]
    assert failed["round"] == 1
    assert "its data are not there: node 0 is gone, which alone was to give" in failed["error"]
    assert sorted(one.name for one in (path / "checkpoints").iterdir()) == [f"round-00000{one}" for one in (0, 2, 3)]
    assert api.resume(path).digest == whole.digest


@pytest.mark.parametrize(
    ("there", "needed", "owed"),
    [
        ([0, 1], {0}, False),
        ([1], {0}, True),
        ([], {0}, True),
        ([], set(), True),
        ([1], set(), False),
        ([0], {-1}, True),
    ],
)
def test_the_next_commit_is_saved_in_the_place_of_one_that_lost_a_node(
    tmp_path: Path, there: list[int], needed: set[int], owed: bool
):
    runtime: Any = SimpleNamespace(now=0.0, virtual=False)
    checkpoints = Checkpointing(CheckpointConfig(every_rounds=100), CheckpointStore(None, tmp_path, "r1"), runtime)
    nodes = [(node, export) for node, export in states(5) if node in there]
    checkpoints.save(0, {"seed": 5}, complete(iter(nodes), needed))
    assert checkpoints.join()
    assert checkpoints.is_due(1) == owed
    assert checkpoints.counts["failed"] == owed
    # What fails for another reason would fail again.
    checkpoints.save(1, {"seed": object()}, iter(nodes))
    assert checkpoints.join()
    assert checkpoints.counts["failed"] == owed + 1
    assert not checkpoints.is_due(2)
    checkpoints.close()


def test_checkpoints_elsewhere_are_found_from_anywhere(whole: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = stopped(tmp_path / "run", checkpoint={"uri": "kept", "every_rounds": 2})
    assert sorted(one.name for one in (tmp_path / "kept" / "run").iterdir()) == ["round-000001", "round-000003"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert api.resume(path).digest == whole.digest


@pytest.mark.parametrize("keys", [{"uri": "ftp://there"}, {"every_rounds": 3, "every_s": 4}, {"every_s": 0}])
def test_settings_that_cannot_be(keys: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"checkpoint"):
        driver.resolve(DIGITS | {"checkpoint": keys})


def test_cadences():
    rounds = Cadence(CheckpointConfig(every_rounds=3), 0.0)
    assert [number for number in range(9) if rounds.is_due(number, 0.0)] == [2, 5, 8]
    seconds = Cadence(CheckpointConfig(every_s=10), 100.0)
    assert not seconds.is_due(0, 109.0)
    assert seconds.is_due(1, 110.0)
    seconds.began(110.0)
    assert not seconds.is_due(2, 119.0)
    auto = Cadence(CheckpointConfig(), 0.0)
    assert auto.is_due(0, 0.0)
    auto.took(3600.0)
    assert not auto.is_due(1, 0.0)


def test_asynchronous_simulations_do_not_depend_on_this_machines_clock(tmp_path: Path):
    assert api.simulate(FEDBUFF | {"checkpoint": {}}, run_dir=tmp_path / "auto").checkpoints is None
    by_clock = FEDBUFF | {"checkpoint": {"every_s": 0.05}}
    one, same = (api.simulate(by_clock, run_dir=tmp_path / name) for name in "ab")
    assert one.digest == same.digest
    assert one.checkpoints is not None
    assert one.checkpoints["written"] >= 2


@pytest.mark.slow
def test_the_tracker_has_one_run(tmp_path: Path):
    from mlflow import MlflowClient

    path = stopped(tmp_path / "runs" / "one", raw=DIGITS | {"tracking": "mlflow"})
    api.resume(path)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("starling").experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {metric.step for metric in history} == set(range(8))


def test_a_directory_in_which_a_run_is_cannot_be_taken_by_another(tmp_path: Path):
    path = stopped(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="is in use"):
        api.simulate(DIGITS, run_dir=path)
    with pytest.raises(StarlingError):
        api.resume(path, ["rounds=0"])
