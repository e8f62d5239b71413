"""The fingerprint of data: what differs is named, what does not is alike, and no random generator notices."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.data.fingerprint import difference, fingerprint
from actors.tasks import TensorSamples
from orchestrator import api
from orchestrator.errors import ConfigError, DataError
from orchestrator.processes import Processes
from tests.conformance import StoppedError, Stopper

X = torch.arange(600.0).reshape(200, 3)
Y = torch.arange(200) % 4


def samples(x: torch.Tensor = X, y: torch.Tensor = Y) -> TensorSamples:
    return TensorSamples(x, y, labels=y)


class Drawing:
    """Samples that are not in memory, and have noise added when they are read."""

    owners = None

    def __len__(self) -> int:
        return 5

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise = random.random() + np.random.random() + torch.rand(()).item()  # noqa: NPY002
        return (indices + noise,)


def test_the_same_data_have_the_same():
    assert fingerprint(samples(), samples()) == fingerprint(samples(X.clone(), Y.clone()), samples())
    assert difference(fingerprint(Drawing(), Drawing()), fingerprint(Drawing(), Drawing())) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (samples(X[:150], Y[:150]), "training samples: 200 and 150"),
        (samples(X, Y.flip(0)), "labels of the training samples differ"),
        (samples(X.flip(0), Y), "values of the training samples differ"),
        (samples(X.double(), Y), "values of the training samples differ"),
        (Drawing(), "training samples: 200 and 5"),
    ],
)
def test_others_differ_and_it_is_said_in_what(other: Any, said: str):
    assert said in str(difference(fingerprint(samples(), samples()), fingerprint(other, samples())))
    held_out = difference(fingerprint(samples(), samples()), fingerprint(samples(), other))
    assert said.replace("training", "held-out") in str(held_out)


def test_generators_are_as_they_were():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    found = fingerprint(Drawing(), Drawing())
    assert set(found) > {"values of the training samples"}
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_cannot_be_read_is_left_to_who_trains_on_it():
    broken = Drawing()
    broken.batch = lambda _: 1 / 0
    assert fingerprint(broken, broken) == {"training samples": 5, "held-out samples": 5}
    assert fingerprint(None, samples()).keys().isdisjoint({"training samples"})


def test_a_run_does_not_go_on_with_other_data(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    from actors.tasks.digits import Digits

    raw = {
        "task": {"name": "digits", "model": {"name": "mlp", "width": 4}},
        "algorithm": "fedavg",
        "rounds": 3,
        "tracking": "none",
        "evaluation": {"every_rounds": 0},
        "checkpoint": {"every_rounds": 1},
        "cluster": {"nodes": {"target": 2}},
    }
    with pytest.raises(StoppedError):
        api.simulate(raw, run_dir=tmp_path / "run", observers=[Stopper(1)])
    whole = Digits.train_samples

    def fewer(self: Digits, num_nodes: int) -> TensorSamples:
        known: Any = whole(self, num_nodes)
        return TensorSamples(*(one[:1000] for one in known.tensors), labels=known.labels[:1000])

    monkeypatch.setattr(Digits, "train_samples", fewer)
    with pytest.raises(ConfigError, match=r"data of task digits are not those of then: training samples: \d+ and 1000"):
        api.resume(tmp_path / "run")
    assert (tmp_path / "run/config.yaml").is_file()
    assert api.resume(tmp_path / "run", accept_changes=True).status == "finished"


def test_processes_with_other_data_are_refused_by_name():
    one = SimpleNamespace(fingerprint={"training samples": 100}, place="pid 1 on a")
    other = SimpleNamespace(fingerprint={"training samples": 90}, place="pid 2 on b")
    processes: Any = SimpleNamespace(_first=None, _config=SimpleNamespace(task=SimpleNamespace(name="mine")))
    Processes._compare(processes, SimpleNamespace(nodes=(0,)), one)
    Processes._compare(processes, SimpleNamespace(nodes=(1,)), one)
    with pytest.raises(
        DataError, match=r"task mine: the data of node 2, 3 \(pid 2 on b\) .* pid 1 on a: training samples: 100 and 90"
    ):
        Processes._compare(processes, SimpleNamespace(nodes=(2, 3)), other)


def test_a_replacement_with_other_data_is_refused_alone_and_its_machine_avoided():
    """Before the run has begun it is the run that cannot begin; afterwards the others are at one, and go on."""
    calls: list[tuple[Any, str]] = []
    actor = SimpleNamespace(nodes=(2,), ready=None)
    ready = SimpleNamespace(fingerprint={"x": "b"}, place="pid 2 on b", machine="b", devices={2: "cpu"})
    processes: Any = SimpleNamespace(
        _first=SimpleNamespace(fingerprint={"x": "a"}, place="pid 1 on a"),
        _config=SimpleNamespace(task=SimpleNamespace(name="mine")),
        _begun=False,
        _avoided=set(),
        _lost=lambda actor, error: calls.append((actor, str(error))),
    )
    processes._compare = lambda *both: Processes._compare(processes, *both)
    with pytest.raises(DataError, match="x differ"):
        Processes._on_setup(processes, actor, ready)  # pyright: ignore[reportArgumentType]
    assert Processes._strategy(processes) == "SPREAD"
    processes._begun = True
    Processes._on_setup(processes, actor, ready)  # pyright: ignore[reportArgumentType]
    assert actor.ready is None
    assert [(one.nodes, "node 2 (pid 2 on b)" in said) for one, said in calls] == [((2,), True)]
    soft: Any = Processes._strategy(processes).soft
    assert [(one.key, one.operator.values) for one in soft] == [("ray.io/node-id", ["b"])]
