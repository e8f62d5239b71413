"""The fingerprint of data: what differs is named, what does not is alike, and no random generator notices."""

from __future__ import annotations

import itertools
import random
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from starling.actors.data import contents
from starling.actors.data.files import forget
from starling.actors.data.fingerprint import difference, fingerprint
from starling.actors.remote.messages import Ready
from starling.actors.tasks import TensorSamples
from starling.actors.tasks.parquet import Parquet
from starling.algorithms.api import Layout
from starling.orchestrator import api
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError, DataError
from starling.orchestrator.runtimes.cluster.actors import ActorPool
from starling.orchestrator.runtimes.cluster.placement import Placement
from starling.orchestrator.runtimes.cluster.processes import ClusterProcesses, SameData
from starling.orchestrator.runtimes.events import NotUp
from tests.conformance import StoppedError, Stopper
from tests.fake_actors import Fakes

if TYPE_CHECKING:
    from pathlib import Path

    from starling.actors.data.fingerprint import Fingerprint

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


# --- contents --------------------------------------------------------------------------------------------------------


def test_a_value_anywhere_in_memory_counts():
    other = X.clone()
    other[101, 1] += 1e-3  # of 200 samples, one that is not at an end
    assert difference(fingerprint(samples(), samples()), fingerprint(samples(other), samples())) is not None


def table(folder: Path, rows: int, files: int = 1) -> Parquet:
    """Files without sums or compression: nothing but their bytes tells them apart."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(files):
        columns = {"x": rng.random(rows, dtype=np.float32), "y": rng.integers(0, 2, rows)}
        pq.write_table(
            pa.table(columns),
            folder / f"{number}.parquet",
            row_group_size=rows // 4,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
    forget()
    return Parquet(path=str(folder), label="y", classes=2)


def of(task: Parquet) -> Fingerprint:
    forget()
    return fingerprint(task.train_samples(1), task.validation_samples(1))


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.8])
def test_an_edit_of_equal_length_inside_of_a_file_is_noticed(tmp_path: Path, place: float):
    task = table(tmp_path / "here", 4000, files=2)
    was = of(task)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    assert of(Parquet(path=str(tmp_path / "elsewhere"), label="y", classes=2)) == was
    file = tmp_path / "here/1.parquet"
    flip(file, int(place * file.stat().st_size))
    assert "content of the training samples differ" in str(difference(was, of(task)))


def test_of_large_files_blocks_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contents, "MOST_BYTES", 16_000)
    monkeypatch.setattr(contents, "BLOCK_BYTES", 2000)
    task, read = table(tmp_path / "here", 40_000), 0
    file = tmp_path / "here/0.parquet"
    size = file.stat().st_size
    looked = contents.places(size, 16_000)
    was = of(task)
    read = sum(map(len, contents.of_files(LocalFileSystem(), [str(file)])))
    assert 16_000 <= read <= 18_000 < size
    (start, length), inside = looked[3], (looked[3][0] + looked[4][0]) // 2
    assert start + length < inside
    flip(file, inside)  # that nobody has looked at
    assert difference(was, of(task)) is None
    flip(file, start + 7)
    assert "content" in str(difference(was, of(task)))


@given(size=st.integers(0, 10**12), most=st.integers(1, 10**9), reads=st.integers(1, 3000))
def test_what_is_looked_at_is_bounded_and_reaches_both_ends(size: int, most: int, reads: int):
    block, found = contents.BLOCK_BYTES, contents.places(size, most, reads)
    assert sum(length for _, length in found) <= max(most, block)
    assert len(found) <= reads
    assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(found))
    assert sum(found[-1]) == size
    assert found[0][0] == 0 or len(found) == 1


def test_of_many_files_some_are_looked_at(tmp_path: Path):
    paths = [tmp_path / f"{number:04}" for number in range(contents._LOCAL_READS + 100)]
    for path in paths:
        path.write_bytes(b"x")
    pieces = list(contents.of_files(LocalFileSystem(), [str(path) for path in paths]))
    assert len(pieces) == 2 * contents._LOCAL_READS


def test_a_run_does_not_go_on_with_other_data(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    from starling.actors.tasks.digits import Digits

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
    one: Any = SimpleNamespace(fingerprint={"training samples": 100}, place="pid 1 on a")
    other: Any = SimpleNamespace(fingerprint={"training samples": 90}, place="pid 2 on b")
    same_data = SameData("mine")
    same_data.compare((0,), one)
    same_data.compare((1,), one)
    with pytest.raises(
        DataError, match=r"task mine: the data of node 2, 3 \(pid 2 on b\) .* pid 1 on a: training samples: 100 and 90"
    ):
        same_data.compare((2, 3), other)


def test_a_replacement_with_other_data_is_refused_alone_and_its_machine_avoided():
    """Before the run has begun it is the run that cannot begin; afterwards the others are at one, and go on."""
    fakes, config = Fakes(), parse({"algorithm": "fedavg", "task": "digits", "tracking": "none"})
    pool = ActorPool(fakes.loop, lambda _: None, lambda _: [])
    placement = Placement(config)
    processes = ClusterProcesses(config, fakes.loop, pool, placement)
    first: Any = SimpleNamespace(fingerprint={"x": "a"}, place="pid 1 on a")
    processes.same_data.compare((0,), first)
    actor = fakes.add(pool, 2)
    actor.ready = None
    layout = Layout((), torch.float32)
    ready = Ready("pid 2 on b", {2: "cpu"}, (), {2: 1}, layout, {}, (), 2, None, {"x": "b"}, "b")
    with pytest.raises(DataError, match="x differ"):
        processes.on_setup(actor, ready)
    assert placement.strategy() == "SPREAD"
    processes.begun = True
    processes.on_setup(actor, ready)
    assert actor.ready is None
    (lost,) = fakes.at(0.0)
    assert isinstance(lost, NotUp)
    assert "node 2 (pid 2 on b)" in lost.reason
    soft: Any = placement.strategy().soft
    assert [(one.key, one.operator.values) for one in soft] == [("ray.io/node-id", ["b"])]
    assert not ray.is_initialized(), "ending a process without a connection to Ray has started a Ray"
