"""Catching up by the log of rounds: a joiner applies what it has missed, and has the members' bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from starling.actors.data import Position
from starling.actors.replica.catch_up import Transcript, catch_up
from starling.algorithms.errors import ProgramError
from starling.algorithms.zeroth_order.just_one_byte import JustOneByte
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.run_directory import RunDirectory
from starling.orchestrator.runtimes.simulator.runtime import Simulator
from tests import toys
from tests.toys import Ran, begin, replica, simulate

if TYPE_CHECKING:
    from pathlib import Path

ALGORITHM = JustOneByte(lr=0.05, samples=2, verify_every=3)
KEYS: dict[str, Any] = {
    "algorithm": {"name": "just_one_byte", "lr": 0.05, "samples": 2, "verify_every": 3},
    "task": "test_toy",
    "network": {"step_ms": 100, "start_s": 0.2},
}


def trained(rounds: int) -> tuple[list[bytes], dict[int, torch.Tensor]]:
    """The records of rounds of one node, and its parameters after each."""
    records, models = list[bytes](), dict[int, torch.Tensor]()
    one = replica(algorithm=ALGORITHM)
    ALGORITHM.init(one)
    one.commit()
    for number in range(rounds):
        begin(one, number)
        codes = ALGORITHM.code.encode([0.5 * number - 1, 0.25], one.rng("rounding"))
        ALGORITHM._step(one, {0: codes}, ALGORITHM.lr).apply(one.parameters)
        records.append(ALGORITHM.sealed(one))
        one.stage()
        one.commit()
        models[number] = one.parameters.clone()
    return records, models


def fresh() -> Any:
    one = replica(node=0, algorithm=ALGORITHM)
    ALGORITHM.init(one)
    one.commit()
    return one


def test_all_rounds_from_the_initial_state():
    records, models = trained(7)
    one = fresh()
    nbytes = catch_up(one, Transcript(0, tuple(records)), position=Position(2, 5))
    assert torch.equal(one.parameters, models[6])
    assert torch.equal(one.committed, models[6])
    assert one.committed_round == 6
    assert one.data.position == Position(2, 5)
    assert nbytes == sum(map(len, records))


def test_only_what_is_missing_is_applied():
    records, models = trained(7)
    one = fresh()
    catch_up(one, Transcript(0, tuple(records[:4])))
    one.parameters.fill_(9.0)  # of a round that was cancelled
    nbytes = catch_up(one, Transcript(2, tuple(records[2:])))
    assert torch.equal(one.parameters, models[6])
    assert nbytes == sum(map(len, records[4:]))
    assert catch_up(one, Transcript(2, tuple(records[2:]))) == 0


def test_from_the_model_before():
    records, models = trained(7)
    one = fresh()
    tensors = {entry.name: models[3][entry.start : entry.stop].view(entry.shape) for entry in one.layout.entries}
    base = save(tensors)
    assert catch_up(one, Transcript(4, tuple(records[4:])), lambda: base) == len(base) + sum(map(len, records[4:]))
    assert torch.equal(one.parameters, models[6])
    just = fresh()
    assert catch_up(just, Transcript(4, ()), lambda: base) == len(base)
    assert torch.equal(just.parameters, models[3])
    assert just.committed_round == 3


def test_without_the_model_before_it_says_so():
    records, _ = trained(3)
    assert catch_up(fresh(), Transcript(1, tuple(records[1:]))) is None


def test_another_model_is_refused():
    with pytest.raises(ProgramError, match=r"^the model to begin with has no tensor 0\.weight of shape \[8, 6\]$"):
        catch_up(fresh(), Transcript(1, ()), lambda: save({"x": torch.zeros(2)}))


# --- in a run -------------------------------------------------------------------------------------------------------


def lost(every: int, **keys: Any) -> Ran:
    faults = {"events": [{"kind": "kill", "node": 1, "round": 3}]}
    return simulate(KEYS | keys, nodes=3, rounds=12, replay={"snapshot_every": every}, faults=faults)


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("perturb", ["copy", "on_use"])
def test_a_replacement_catches_up_without_a_donors_state(every: int, perturb: str):
    ran = lost(every, algorithm=KEYS["algorithm"] | {"perturb": perturb})
    (transfer,) = ran.sought("transfer")
    assert transfer["node"] == 1
    record = 18 + 2 * (4 + 2)
    if not every:  # rounds 0 to 2 had three members; 2 and the last, if it was verified, a digest of 32 bytes
        rounds = transfer["round"]
        assert transfer["nbytes"] == rounds * record + 3 * 6 + 32 * (rounds // 3)
    assert ran.sought("commit")[-1]["committed"] == (0, 1, 2)
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1
    assert len({one.shared.digest() for one in ran.replicas.values()}) == 1
    assert ran.digest == lost(99).digest


def test_snapshots_lie_in_the_run_directory_and_not_in_the_controllers_memory(tmp_path: Path):
    config = parse(
        {"rounds": 5, "replay": {"snapshot_every": 2}, "tracking": "none", "cluster": {"nodes": {"target": 2}}}
        | {key: KEYS[key] for key in ("algorithm", "task")}
    )
    directory = RunDirectory(config, tmp_path / "run")
    runtime = Simulator(config)
    controller = Controller(config, runtime, directory, run_id="run", run_dir=str(directory.path))
    directory.on_end(controller.run())
    runtime.close()
    sealed = controller._state.sealed
    found = sealed.transcript(4)
    assert found is not None
    transcript, base = found
    assert (transcript.first, len(transcript.records)) == (4, 1)
    assert base == (directory.path / "snapshots/round-000003.safetensors").read_bytes()
    assert not any(isinstance(value, bytes) for value in vars(sealed).values())
    (directory.path / "snapshots/round-000003.safetensors").unlink()
    assert sealed.transcript(4) is None, "a donor's state is given instead"


def test_it_ends_as_a_run_in_which_a_donor_gave_its_state(monkeypatch: pytest.MonkeyPatch):
    by_log = lost(0)
    monkeypatch.setattr("starling.orchestrator.control.sealed_rounds.SealedRounds.transcript", lambda *_: None)
    by_donor = lost(0)
    assert by_donor.sought("transfer")[0]["nbytes"] > by_log.sought("transfer")[0]["nbytes"]
    assert by_donor.digest == by_log.digest


def test_who_was_late_applies_the_round_that_it_missed():
    network = {"step_ms": 1000, "speeds": {2: 0.2}}
    cluster = {"nodes": {"target": 4}, "round_deadline_s": 5}
    ran = simulate(KEYS, nodes=4, rounds=4, network=network, cluster=cluster)
    assert [event["node"] for event in ran.sought("late")] == [2] * 4
    transfers = ran.sought("transfer")
    assert [event["nbytes"] for event in transfers] == [18 + 3 * 6 + 32 * (number == 2) for number in range(3)]
    assert len({ran.replicas[node].model_digest() for node in (0, 1, 3)}) == 1


def test_a_joiner_whose_records_do_not_serve_is_given_a_donors_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("starling.orchestrator.runtimes.simulator.states.catch_up", lambda *_: None)
    ran = lost(0)
    (transfer,) = ran.sought("transfer")
    assert transfer["nbytes"] >= 4 * ran.replicas[0].layout.num_values
    assert len({one.model_digest() for one in ran.replicas.values()}) == 1


def test_other_algorithms_have_no_records():
    ran = simulate({"algorithm": f"{toys.__name__}:Silent"}, nodes=2)
    assert ran.summary is not None
