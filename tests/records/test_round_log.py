"""The log of sealed rounds: what is written is read, what is damaged refused, and models are rebuilt from it (Z2)."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from starling import simulate
from starling.algorithms.errors import ProgramError
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError, DivergedError
from starling.orchestrator.records import round_log
from starling.orchestrator.records.rebuild import rebuild
from starling.orchestrator.records.round_log import Entry, MembersEntry, RunEnd, Sealed, SealedLog, Snapshot, read
from starling.orchestrator.records.run_directory import RunDirectory
from starling.orchestrator.runtimes.events import FinalModel
from starling.orchestrator.safe_files import Folder
from tests import toys

DIGEST = "ab" * 32
ENTRIES: list[Entry] = [
    MembersEntry(0, (0, 1, 2)),
    Sealed(0, b"abc"),
    Sealed(1, b""),
    Snapshot(1, DIGEST),
    MembersEntry(1, (0, 2)),
    Sealed(2, bytes(range(40))),
    RunEnd(DIGEST),
]
ALGORITHM: dict[str, Any] = {"name": "just_one_byte", "lr": 0.05, "samples": 2, "verify_every": 3}
CONFIG: dict[str, Any] = {
    "algorithm": ALGORITHM,
    "task": f"{toys.__name__}:Toy",
    "rounds": 10,
    "replay": {"snapshot_every": 4},
    "cluster": {"nodes": {"target": 3}},
    "tracking": "none",
}


def written(entries: list[Entry], run_id: str = "one") -> bytes:
    log = SealedLog(run_id)
    return b"".join(log.append(entry) for entry in entries)


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(written(ENTRIES))
    assert list(read(path)) == list(read(path, "one")) == ENTRIES


def test_members_are_written_when_they_change():
    assert written([*ENTRIES[:2], ENTRIES[0], *ENTRIES[2:]]) == written(ENTRIES)


def test_a_round_takes_thirteen_bytes_and_its_record():
    assert len(written(ENTRIES[:2])) - len(written(ENTRIES[:1])) == 13 + 3


@given(place=st.integers(0, len(written(ENTRIES)) - 1), bit=st.integers(0, 7))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_no_bit_can_be_another(place: int, bit: int, tmp_path_factory: pytest.TempPathFactory):
    data = bytearray(written(ENTRIES))
    data[place] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        list(read(path, "one"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", range(1, 6))
def test_nothing_can_be_left_out(missing: int, tmp_path: Path):
    frames = [written(ENTRIES[: place + 1])[len(written(ENTRIES[:place])) :] for place in range(len(ENTRIES))]
    path = tmp_path / "log"
    path.write_bytes(b"".join(frame for place, frame in enumerate(frames) if place != missing))
    with pytest.raises(ConfigError, match="bad checksum; the log is damaged from here on"):
        list(read(path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{}\n", "this is no log of rounds"),
        (b"", "this is no log of rounds"),
        (b"starling rounds 1\n[]\n", "this is no log of rounds"),
        (written([]) + written(ENTRIES, "other"), "the log is that of run other, and not of one"),
        (written([MembersEntry(0, (0,)), Sealed(1, b"")]), r"round 1 is next; the log has a hole"),
        (written(ENTRIES)[:-50], r"the log ends within an entry; --to 1 is the last that is whole"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, words: str, tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        list(read(path, "one"))
    assert "\n" not in str(caught.value)


def test_an_entry_of_another_version_is_named(tmp_path: Path):
    data = written(ENTRIES[:1])
    framed = struct.pack("<cI", b"Z", 0)
    path = tmp_path / "log"
    path.write_bytes(data + framed + struct.pack("<I", zlib.crc32(framed, zlib.crc32(data[:-4]))))
    with pytest.raises(ConfigError, match=r"an entry of an unknown kind b'Z'; written by another version\?"):
        list(read(path))


# --- rebuilding -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    simulate(CONFIG, run_dir=path)
    return path


def summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


def test_the_log_gives_the_runs_model(run_dir: Path, tmp_path: Path):
    """Z2: from the first model, and from any snapshot."""
    whole = rebuild(run_dir, save=tmp_path / "model.safetensors")
    assert whole.digest == summary(run_dir)["digest"]
    assert (whole.round, whole.replayed, whole.since, whole.checked) == (9, 10, None, 3)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(run_dir / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for since, rounds in ((3, 6), (6, 6), (7, 2), (99, 2)):
        later = rebuild(run_dir, since=since)
        assert (later.digest, later.replayed) == (whole.digest, rounds)


def test_the_log_gives_the_model_of_any_round(run_dir: Path, tmp_path: Path):
    for rounds in (1, 4, 7):
        shorter = simulate(CONFIG | {"rounds": rounds}, run_dir=tmp_path / f"run-{rounds}")
        assert rebuild(run_dir, rounds - 1).digest == shorter.digest
    assert rebuild(run_dir, 3).checked == 1


def test_a_run_that_lost_nodes_is_rebuilt_too(tmp_path: Path):
    faults = {"events": [{"kind": "kill", "node": 1, "round": 2}, {"kind": "kill", "node": 0, "round": 5}]}
    ran = simulate(CONFIG | {"faults": faults}, run_dir=tmp_path / "run")
    assert rebuild(tmp_path / "run").digest == ran.digest
    views = [entry.members for entry in read(tmp_path / "run" / round_log.NAME) if isinstance(entry, MembersEntry)]
    assert len(views) > 1


@pytest.mark.parametrize(
    "algorithm",
    [
        {"layerwise": True},
        {"distribution": "rademacher", "normalizer": "sqrt", "weight_decay": 0.1, "clip": 0.5},
        {"code": {"name": "log8", "rounding": "stochastic"}, "one_sided": True},
        {"name": "mezo", "lr": 0.01},
        {"code": "fp16", "verify_every": 0},
    ],
    ids=str,
)
def test_all_options_are_replayed(algorithm: dict[str, Any], tmp_path: Path):
    ran = simulate(CONFIG | {"algorithm": ALGORITHM | algorithm, "rounds": 4}, run_dir=tmp_path / "run")
    assert rebuild(tmp_path / "run").digest == ran.digest


def test_a_record_is_a_few_bytes(run_dir: Path):
    records = [entry.record for entry in read(run_dir / round_log.NAME) if isinstance(entry, Sealed)]
    assert [len(record) for record in records] == [18 + 3 * (4 + 2) + 32 * (number % 3 == 2) for number in range(10)]


def test_the_last_snapshots_are_kept_and_any_round_is_rebuilt(tmp_path: Path):
    keys = CONFIG | {"replay": {"snapshot_every": 2, "keep": 2}}
    ran = simulate(keys, run_dir=tmp_path / "run")
    names = sorted(file.name for file in (tmp_path / "run/snapshots").iterdir())
    assert names == ["round-000007.safetensors", "round-000009.safetensors"]
    whole = rebuild(tmp_path / "run")
    assert (whole.digest, whole.checked) == (ran.digest, 6), "the log has all digests, and the run's end"
    for since, begun, rounds in ((9, 9, 0), (8, 7, 2), (6, None, 10)):
        later = rebuild(tmp_path / "run", since=since)
        assert (later.since, later.replayed, later.digest) == (begun, rounds, ran.digest)


def test_of_snapshots_nothing_is_removed_but_what_this_run_wrote(tmp_path: Path):
    run = RunDirectory(parse(CONFIG | {"replay": {"keep": 2}}), tmp_path / "run")
    others = ["notes.txt", "round-1.safetensors", "round-0000001.safetensors", "round-00000x.safetensors"]
    (tmp_path / "run/snapshots").mkdir()
    # Of rounds that a resumed run does again: until it gets there, these are another attempt's.
    for name in (*others, "round-000003.safetensors", "round-000008.safetensors", "round-1000000.safetensors"):
        (tmp_path / "run/snapshots" / name).touch()
    for number in (4, 5):
        run.on_snapshot(number, FinalModel(DIGEST, b"model"))
    run._close()
    names = {file.name for file in (tmp_path / "run/snapshots").iterdir()}
    assert names == {*others, "round-000004.safetensors", "round-000005.safetensors"}


def test_a_disk_that_is_full_takes_no_snapshot_and_removes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = RunDirectory(parse(CONFIG | {"replay": {"keep": 1}}), tmp_path / "run")
    assert run.on_snapshot(3, FinalModel(DIGEST, b"model")) is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Folder, "write", full)
    assert run.on_snapshot(7, FinalModel(DIGEST, b"model")) is None
    assert [file.name for file in (tmp_path / "run/snapshots").iterdir()] == ["round-000003.safetensors"]
    run._close()
    assert "round-000007.safetensors cannot be written: No space left on device; the run goes on" in caplog.text


def copied(run_dir: Path, tmp_path: Path) -> Path:
    for file in run_dir.rglob("*"):
        if file.is_file():
            target = tmp_path / "copy" / file.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def test_a_directory_may_be_moved_but_not_its_log(run_dir: Path, tmp_path: Path):
    path = copied(run_dir, tmp_path)
    assert rebuild(path).digest == rebuild(run_dir).digest
    simulate(CONFIG | {"seed": 1}, run_dir=tmp_path / "other")
    (path / round_log.NAME).write_bytes((tmp_path / "other" / round_log.NAME).read_bytes())
    with pytest.raises(ConfigError, match=r"the log is that of run other, and not of whole$"):
        rebuild(path)


def test_another_configuration_gives_other_digests(run_dir: Path, tmp_path: Path):
    path = copied(run_dir, tmp_path)
    config = path / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("seed: 0\n", "seed: 7\n", 1))
    with pytest.raises(
        ProgramError, match=r"^round 2 cannot be replayed: it gives parameters with digest [0-9a-f]{64}, the"
    ):
        rebuild(path)
    config.write_text(text.replace("seed: 0\n", "seed: 7\n", 1).replace("verify_every: 3", "verify_every: 0"))
    with pytest.raises(
        ProgramError, match=r"round 2 cannot be replayed: its record has 68 bytes, and not those of codes of 2 bytes"
    ):
        rebuild(path)
    config.write_text(text.replace("seed: 0\n", "seed: 7\n", 1))
    (path / "snapshots/round-000003.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(DivergedError, match=r"round-000003.safetensors: the log gives a model with digest"):
        rebuild(path, since=5)


def test_what_cannot_be_rebuilt_is_said(run_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rounds.log: there is no round 10; the last one is 9"):
        rebuild(run_dir, 10)
    with pytest.raises(ConfigError, match=r"nothing: this is no run directory \(it has no config.yaml\)"):
        rebuild(tmp_path / "nothing")
    simulate(CONFIG | {"algorithm": f"{toys.__name__}:Silent", "rounds": 1}, run_dir=tmp_path / "silent")
    assert not (tmp_path / "silent" / round_log.NAME).exists()
    with pytest.raises(
        ConfigError, match="rounds of tests.toys:Silent cannot be replayed: they are more than their log"
    ):
        rebuild(tmp_path / "silent")
    path = copied(run_dir, tmp_path)
    (path / round_log.NAME).unlink()
    with pytest.raises(ConfigError, match="No such file or directory; only algorithms whose rounds can be replayed"):
        rebuild(path)
    path = copied(run_dir, tmp_path)
    (path / "snapshots/round-000007.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match=r"round-000007.safetensors: cannot be read as a snapshot of this run"):
        rebuild(path, since=8)


def test_a_log_that_was_cut_off_serves_up_to_there(run_dir: Path, tmp_path: Path):
    path = copied(run_dir, tmp_path)
    log = path / round_log.NAME
    log.write_bytes(log.read_bytes()[:-60])
    with pytest.raises(ConfigError, match=r"--to 8 is the last that is whole"):
        rebuild(path)
    assert rebuild(path, 8).digest == rebuild(run_dir, 8).digest


def test_the_command_line(run_dir: Path, tmp_path: Path):
    from typer.testing import CliRunner

    from starling.orchestrator.cli.main import app

    def command(*arguments: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, ["rebuild", *arguments, "--json"])
        return result.exit_code, json.loads(result.stdout.splitlines()[-1])

    code, answer = command(str(run_dir), "--to", "4", "--since", "4", "--save", str(tmp_path / "saved"))
    assert (code, answer["round"], answer["since"], answer["replayed"], answer["error"]) == (0, 4, 3, 1, None)
    assert answer["digest"] == rebuild(run_dir, 4).digest
    assert (tmp_path / "saved").exists()
    code, answer = command(str(run_dir), "--to", "77")
    assert (code, answer["status"]) == (2, "failed")
    assert answer["error"].endswith("rounds.log: there is no round 77; the last one is 9")
    path = copied(run_dir, tmp_path)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("seed: 0\n", "seed: 7\n", 1))
    assert command(str(path))[0] == 3
