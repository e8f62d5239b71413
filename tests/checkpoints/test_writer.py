"""The writer: beside training, which stops for nothing that may happen to the storage or to the data."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.checkpoints.writer import CheckpointWriter
from starling.orchestrator.errors import NodeGoneError
from tests.checkpoint_states import ObjectStore, export_of, is_of, states
from tests.paths import PYTHONPATH

LONG_S = 60
"""A limit that is never reached."""


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, what: str, facts: Any) -> None:
        self.events.append((what, dict(facts)))

    @property
    def names(self) -> list[str]:
        return [what.removeprefix("checkpoint_") for what, _ in self.events]


@pytest.fixture
def objects() -> ObjectStore:
    return ObjectStore()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def store(objects: ObjectStore) -> CheckpointStore:
    return CheckpointStore(None, Path(), "r1", storage=objects.storage(), file_bytes=200)


@pytest.fixture
def writer(store: CheckpointStore, heard: Heard) -> Any:
    writer = CheckpointWriter(store, heard, pauses_s=(0.001, 0.002, 0.004))
    yield writer
    assert writer.close(LONG_S)


def test_checkpoints_are_written_in_order(writer: CheckpointWriter, store: CheckpointStore, heard: Heard):
    assert not writer.busy
    assert writer.take() == []
    assert writer.join(0)
    for seed in (1, 2, 3):
        writer.submit(seed, {"seed": seed}, iter(states(seed)))
    assert writer.join(LONG_S)
    assert not writer.busy
    assert is_of(store.read(), 3)
    outcomes = writer.take()
    assert [(one["round"], one["error"], one["retries"]) for one in outcomes] == [(n, None, 0) for n in (1, 2, 3)]
    assert all(one["nbytes"] > 1000 and one["untidy"] is None for one in outcomes)
    assert writer.seconds_writing == sum(one["seconds"] for one in outcomes)
    assert (writer.num_written, writer.num_failed, writer.num_retries) == (3, 0, 0)
    assert writer.take() == []
    assert heard.events == [("checkpoint_written", outcome) for outcome in outcomes]


def test_it_works_while_its_data_are_being_fetched(writer: CheckpointWriter, store: CheckpointStore):
    arrived = threading.Event()

    def nodes() -> Any:
        assert threading.current_thread().name == "checkpoint-writer"
        yield states(1)[0]
        assert arrived.wait(LONG_S)
        yield states(1)[1]

    writer.submit(1, {"seed": 1}, nodes())
    assert writer.busy
    assert not writer.join(0.01)
    assert store.rounds() == []
    arrived.set()
    assert writer.join(LONG_S)
    assert is_of(store.read(), 1)


def test_what_the_storage_refuses_is_tried_again(
    writer: CheckpointWriter, store: CheckpointStore, objects: ObjectStore, heard: Heard
):
    objects.failures = {5: "refused", 12: "refused"}
    consumed: list[int] = []

    def nodes() -> Any:
        for node, export in states(1):
            consumed.append(node)
            yield node, export

    writer.submit(1, {"seed": 1}, nodes())
    assert writer.join(LONG_S)
    assert consumed == [0, 1]  # once, although it was needed three times
    assert is_of(store.read(), 1)
    (outcome,) = writer.take()
    assert (outcome["error"], outcome["retries"]) == (None, 2)
    assert (writer.num_written, writer.num_failed, writer.num_retries) == (1, 0, 2)
    assert heard.names == ["retry", "retry", "written"]
    what, facts = heard.events[0]
    assert what == "checkpoint_retry"
    assert facts["round"] == 1
    assert facts["pause_s"] == 0.001
    assert facts["error"].startswith("checkpoint mock://bucket/runs/r1/round-000001 cannot be written: When ")


def test_a_storage_that_takes_nothing_is_asked_once_for_each_checkpoint(
    writer: CheckpointWriter, objects: ObjectStore, heard: Heard
):
    objects.dead_from = 0
    for number in (1, 2, 3):
        writer.submit(number, {}, states(1))
        assert writer.join(LONG_S)
    assert [(one["retries"], one["given_up"]) for one in writer.take()] == [(3, 1), (0, 2), (0, 3)]
    assert heard.names == ["retry", "retry", "retry", "failed", "failed", "failed"]
    assert [facts["is_first"] for _, facts in heard.events[:3]] == [True, False, False]
    objects.heal()
    for number in (4, 5):
        writer.submit(number, {}, states(1))
        assert writer.join(LONG_S)
    assert [(one["error"], one["given_up"]) for one in writer.take()] == [(None, 3), (None, 0)]
    objects.failures = {objects.operations + 3: "refused"}
    writer.submit(6, {}, states(1))
    assert writer.join(LONG_S)
    assert (writer.take()[0]["error"], writer.num_retries) == (None, 4)  # it is patient again


def test_who_waits_for_the_end_waits_for_no_pause(store: CheckpointStore, objects: ObjectStore, heard: Heard):
    objects.dead_from = 0
    writer = CheckpointWriter(store, heard, pauses_s=(10 * LONG_S,))
    writer.submit(1, {}, states(1))
    while "retry" not in heard.names:
        pass
    writer.hasten()
    assert writer.join(LONG_S)
    writer.submit(2, {}, states(1))
    assert writer.join(LONG_S)
    assert [one["retries"] for one in writer.take()] == [0, 0]
    assert writer.close(LONG_S)


def test_what_cannot_be_written_is_given_up_and_the_next_one_is_not(
    writer: CheckpointWriter, store: CheckpointStore, objects: ObjectStore, heard: Heard
):
    writer.submit(1, {"seed": 1}, states(1))
    assert writer.join(LONG_S)
    objects.dead_from = objects.operations
    writer.submit(2, {"seed": 2}, states(2))
    assert writer.join(LONG_S)
    objects.heal()
    assert is_of(store.read(), 1)
    writer.submit(3, {"seed": 3}, states(3))
    assert writer.join(LONG_S)
    assert is_of(store.read(), 3)
    assert [(one["round"], bool(one["error"]), one["retries"], one["nbytes"] > 0) for one in writer.take()] == [
        (1, False, 0, True),
        (2, True, 3, False),
        (3, False, 0, True),
    ]
    assert (writer.num_written, writer.num_failed, writer.num_retries) == (2, 1, 3)
    assert heard.names == ["written", "retry", "retry", "retry", "failed", "written"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("the object is lost"), "its data are not there: the object is lost"),
        (NodeGoneError(3, "node 3 was lost"), "its data are not there: node 3 was lost"),
        (OSError(5, "Input/output error"), "its data are not there: OSError: [Errno 5] Input/output error"),
        (KeyError("x"), "its data are not there: KeyError: 'x'"),
    ],
)
def test_without_data_there_is_no_checkpoint(
    writer: CheckpointWriter, store: CheckpointStore, heard: Heard, error: Exception, said: str
):
    def nodes() -> Any:
        yield from states(2)[:1]
        raise error

    writer.submit(1, {"seed": 1}, states(1))
    writer.submit(2, {"seed": 2}, nodes())
    assert writer.join(LONG_S)
    assert is_of(store.read(), 1)
    outcome = writer.take()[1]
    assert (outcome["error"], outcome["retries"]) == (f"checkpoint of round 2: {said}", 0)
    assert heard.names == ["written", "failed"]


def test_a_mistake_of_ours_ends_no_run(writer: CheckpointWriter, store: CheckpointStore):
    writer.submit(1, {"x": object()}, states(1))
    writer.submit(2, {"seed": 2}, states(2))
    assert writer.join(LONG_S)
    assert is_of(store.read(), 2)
    assert "TypeError" in writer.take()[0]["error"]


def test_who_is_told_may_fail(objects: ObjectStore, store: CheckpointStore, caplog: pytest.LogCaptureFixture):
    def say(what: str, facts: Any) -> None:
        raise ValueError("closed file")

    writer = CheckpointWriter(store, say)
    writer.submit(1, {"seed": 1}, states(1))
    assert writer.join(LONG_S)
    assert writer.close(LONG_S)
    assert writer.num_written == 1
    assert "checkpoint_written could not be reported: ValueError: closed file" in caplog.text


def test_closing_interrupts_a_pause_and_gives_up_what_waits(store: CheckpointStore, objects: ObjectStore):
    in_pause = threading.Event()
    writer = CheckpointWriter(store, lambda what, facts: in_pause.set(), pauses_s=(LONG_S * 1000,))
    objects.dead_from = 0
    writer.submit(1, {}, states(1))
    writer.submit(2, {}, states(2))
    assert in_pause.wait(LONG_S)
    assert writer.close(LONG_S)
    assert [(one["round"], one["retries"]) for one in writer.take()] == [(1, 0), (2, 0)]
    assert writer.num_failed == 2
    assert writer.join(0)
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(3, {}, states(3))
    assert writer.close(0)


def test_closing_waits_for_what_is_being_written(store: CheckpointStore, heard: Heard):
    began, go_on = threading.Event(), threading.Event()

    def nodes() -> Any:
        began.set()
        assert go_on.wait(LONG_S)
        yield from states(1)

    writer = CheckpointWriter(store, heard)
    writer.submit(1, {"seed": 1}, nodes())
    assert began.wait(LONG_S)
    threading.Timer(0.05, go_on.set).start()
    assert writer.close(LONG_S)
    assert is_of(store.read(), 1)
    assert CheckpointWriter(store, heard).close(0)


def test_closing_gives_up_what_takes_too_long(tmp_path: Path, heard: Heard):
    began, go_on = threading.Event(), threading.Event()

    def nodes() -> Any:
        began.set()
        assert go_on.wait(LONG_S)
        yield from states(2)

    store = CheckpointStore(None, tmp_path, "r1", file_bytes=1)
    writer = CheckpointWriter(store, heard)
    writer.submit(1, {"seed": 1}, states(1))
    writer.submit(2, {"seed": 2}, nodes())
    assert began.wait(LONG_S)
    assert not writer.close(0.01)
    go_on.set()
    assert writer.close(LONG_S)
    assert "cannot be written: given up, as the run has ended" in writer.take()[1]["error"]
    assert heard.names == ["written", "failed"]
    assert is_of(CheckpointStore(None, tmp_path, "r1").read(), 1)


def test_what_was_written_is_let_go(writer: CheckpointWriter):
    exports = [(0, export_of(torch.ones(3)))]
    alive = weakref.ref(exports[0][1])
    writer.submit(1, {}, exports)
    del exports
    assert writer.join(LONG_S)
    gc.collect()
    assert alive() is None


@settings(max_examples=40)
@given(failures=st.dictionaries(st.integers(0, 120), st.sampled_from(["refused", "unheard"]), max_size=25))
def test_whatever_fails_the_last_one_that_is_said_to_be_written_is(failures: dict[int, str]):
    objects = ObjectStore(failures=failures)
    store = CheckpointStore(None, Path(), "r1", storage=objects.storage(), keep=2, file_bytes=200)
    writer = CheckpointWriter(store, lambda what, facts: None, pauses_s=(0, 0))
    for seed in range(4):
        writer.submit(seed, {"seed": seed}, states(seed))
    assert writer.join(LONG_S)
    assert writer.close(LONG_S)
    objects.heal()
    outcomes = writer.take()
    assert [one["round"] for one in outcomes] == [0, 1, 2, 3]
    written = [one["round"] for one in outcomes if one["error"] is None]
    assert (writer.num_written, writer.num_failed) == (len(written), 4 - len(written))
    assert writer.num_retries == sum(one["retries"] for one in outcomes)
    rounds = store.rounds()
    assert set(written[-2:]) <= set(rounds)
    for number in rounds:
        assert is_of(store.read(number=number), number)


AT_EXIT = """
import sys, threading
from pathlib import Path
from starling.orchestrator.checkpoints.writer import CheckpointWriter
from starling.orchestrator.checkpoints.store import CheckpointStore
from tests.checkpoint_states import states

store = CheckpointStore(None, Path(sys.argv[1]), "r1")
writer = CheckpointWriter(store, lambda what, facts: print(what))
began = threading.Event()

def nodes():
    yield from states(1)
    began.set()
    threading.Event().wait(0.3)  # the interpreter is ending meanwhile

writer.submit(1, {"seed": 1}, nodes())
assert began.wait(60)
"""


def test_a_process_that_ends_finishes_what_it_writes(tmp_path: Path):
    script = tmp_path / "at_exit.py"
    script.write_text(AT_EXIT)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
        env={"PYTHONPATH": PYTHONPATH},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "checkpoint_written\n", "")
    assert is_of(CheckpointStore(None, tmp_path, "r1").read(), 1)
