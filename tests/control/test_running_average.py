"""Running averages of iterates: their closed forms, and that they survive all that the model survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from starling import simulate
from starling.actors.replica.average import Average, Ema, Tail
from starling.actors.tasks.quadratic import Quadratic
from starling.orchestrator import api
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from tests.control.test_resume import stopped
from tests.toys import simulate as in_memory

DIGITS: dict[str, Any] = {
    "task": {"name": "digits", "model": {"name": "mlp", "width": 16}},
    "algorithm": {"name": "fedavg", "steps": 2},
    "evaluation": {"every_rounds": 0, "average": {"name": "ema", "decay": 0.75}},
    "rounds": 6,
    "cluster": {"nodes": {"target": 3}},
    "tracking": "none",
}
DSGD = DIGITS | {"algorithm": {"name": "dsgd", "steps": 2}}
FEDBUFF = DIGITS | {"algorithm": {"name": "fedbuff", "buffer_size": 2, "steps": 2}}
BYTES = DIGITS | {"algorithm": {"name": "just_one_byte", "perturb": "on_use"}}
FAULTS = {
    "events": [
        {"kind": "late_join", "node": 2, "round": 1},
        {"kind": "kill", "node": 1, "round": 2, "phase": "post"},
        {"kind": "preempt", "node": 0, "round": 3},
    ]
}


class Halves(Average):
    """One of a user's own."""

    def weight(self, number: int, num_rounds: int) -> float:
        return 1.0 if number < num_rounds // 2 else 0.5


def test_weights():
    assert [Ema(decay=0.9).weight(number, 4) for number in range(3)] == [pytest.approx(0.1)] * 3
    assert [Tail(fraction=1).weight(number, 4) for number in range(4)] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [Tail(fraction=0.01).weight(number, 4) for number in range(4)] == [1, 1, 1, 1]
    assert [Tail(start=2).weight(number, 99) for number in range(5)] == [1, 1, 1, 1 / 2, 1 / 3]


@pytest.mark.parametrize(("average", "wanted"), [({"name": "ema", "decay": 0.8}, "ema"), ("tail", "tail")])
def test_on_a_quadratic_it_is_the_closed_form(average: Any, wanted: str):
    # From zero, with all samples in each batch and curvature 1: x_t = (1 - ρ^(t+1)) c, with ρ = 1 - η.
    task = {"name": "quadratic", "dimension": 3, "condition": 1.0, "noise": 0.0}
    ran = in_memory(
        nodes=1,
        task=task,
        algorithm={"name": "local_sgd", "inner_steps": 1},
        optimizer={"lr": 0.25, "precision": "fp64"},
        rounds=6,
        evaluation={"average": average},
    )
    center = Quadratic.model_validate(task).center(0)
    shares = [1 - 0.75 ** (number + 1) for number in range(6)]
    ema = shares[0]
    for share in shares[1:]:
        ema = 0.8 * ema + 0.2 * share
    share = ema if wanted == "ema" else sum(shares[3:]) / 3
    (average_model, _) = ran.replicas[0].averaged_model()
    torch.testing.assert_close(average_model, share * center.to(average_model.dtype))
    loss = Quadratic.model_validate(task).objective(average_model, 1)
    assert ran.summary is not None
    assert ran.summary.metrics[f"{wanted}_loss"] == pytest.approx(loss)
    assert ran.summary.metrics["loss"] != pytest.approx(loss)


@pytest.mark.parametrize("raw", [DIGITS, DSGD, FEDBUFF, BYTES], ids=["fedavg", "dsgd", "fedbuff", "just_one_byte"])
def test_decay_0_is_the_model_itself_and_no_average_changes_it(raw: Any):
    plain = simulate(raw | {"evaluation": {"every_rounds": 2}})
    found = simulate(raw | {"evaluation": {"every_rounds": 2, "average": {"name": "ema", "decay": 0}}})
    assert plain.average_digest is None
    assert found.digest == plain.digest == found.average_digest
    assert found.bytes["payload"] == plain.bytes["payload"]
    assert found.metrics == plain.metrics | {f"ema_{name}": value for name, value in plain.metrics.items()}


def test_buffers_are_averaged_too():
    ran = in_memory(
        nodes=2,
        task={"name": "test_toy", "model": "batch_norm"},
        algorithm={"name": "local_sgd", "inner_steps": 2},
        rounds=3,
        evaluation={"average": {"name": "tail", "fraction": 1}},
    )
    model, buffers = ran.replicas[0].averaged_model()
    assert not torch.equal(model, ran.parameters)
    assert not torch.equal(buffers, ran.replicas[0].buffers)
    assert torch.equal(model, ran.replicas[1].averaged_model()[0])


@pytest.mark.parametrize("raw", [DIGITS, DSGD, BYTES], ids=["fedavg", "dsgd", "just_one_byte"])
def test_it_survives_churn_and_replay(raw: Any, tmp_path: Path):
    found = simulate(raw | {"faults": FAULTS}, run_dir=tmp_path / "run")
    assert found.average_digest not in (None, found.digest)
    again = api.replay(tmp_path / "run", run_dir=tmp_path / "again")
    assert (again.digest, again.average_digest) == (found.digest, found.average_digest)


def test_members_that_came_and_went_have_one_average():
    ran = in_memory(DIGITS | {"faults": FAULTS}, nodes=3)
    averages = [one.averaged_model()[0] for one in ran.replicas.values()]
    assert len(averages) == 3
    assert all(torch.equal(one, averages[0]) for one in averages)


@pytest.mark.parametrize("raw", [DIGITS, DSGD, FEDBUFF], ids=["fedavg", "dsgd", "fedbuff"])
def test_it_is_in_the_checkpoint(raw: Any, tmp_path: Path):
    raw |= {"checkpoint": {"every_rounds": 2}}
    whole = simulate(raw, run_dir=tmp_path / "whole")
    resumed = api.resume(stopped(tmp_path / "run", after=3, raw=raw))
    assert (resumed.average_digest, resumed.metrics) == (whole.average_digest, whole.metrics)
    one, other = (load_file(tmp_path / name / "average.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_saved_and_recorded(tmp_path: Path):
    raw = DIGITS | {"evaluation": {"average": "tests.control.test_running_average:Halves"}}
    found = simulate(raw, run_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "halves_loss"} <= line["metrics"].keys() for line in lines)
    assert lines[2]["metrics"]["halves_loss"] == lines[2]["metrics"]["loss"]
    assert lines[3]["metrics"]["halves_loss"] != lines[3]["metrics"]["loss"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["average_digest"] == found.average_digest
    task = DIGITS["task"] | {"init_from": str(tmp_path / "run/average.safetensors")}
    begun = simulate(raw | {"task": task, "rounds": 1, "optimizer": {"lr": 1e-30}})
    assert begun.metrics["loss"] == pytest.approx(found.metrics["halves_loss"])


def test_where_no_node_has_the_models_of_all_rounds_it_is_refused():
    with pytest.raises(ConfigError, match="evaluation.average: random_walk is asynchronous without a server"):
        parse(DIGITS | {"algorithm": "random_walk"})
    with pytest.raises(ConfigError, match="no average is called 'swa'"):
        parse(DIGITS | {"evaluation": {"average": "swa"}})
    with pytest.raises(ConfigError, match=r"evaluation.average.decay"):
        parse(DIGITS | {"evaluation": {"average": {"name": "ema", "decay": 1}}})
