"""Damage to run directories, by seed: what becomes of it must be right, or one line; nothing outside is touched.

``python -m tests.damage FIRST LAST`` tries seeds and prints what is not so.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from starling.algorithms.errors import StarlingError
from starling.orchestrator import api
from starling.orchestrator.checkpoints.export import export
from starling.orchestrator.checkpoints.manifest import Manifest, checksum_of, sum_of
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.rebuild import rebuild
from starling.orchestrator.sweeps import sweep, trial_checkpoint
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.trials import TRIALS, Board, Trial
from starling.orchestrator.tracking.mlflow_tracker import folders_of
from starling.orchestrator.tracking.spool import SPOOL, STATE, TRIALS_OF, SpoolReader
from tests.conformance import StoppedError, Stopper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LIMIT_S = 120
"""No try takes so long, on a machine however busy, unless it waits."""

_BASE: dict[str, Any] = {
    "task": {"name": "quadratic"},
    "rounds": 5,
    "tracking": "none",
    "optimizer": {"lr": 0.05},
    "evaluation": {"every_rounds": 2},
    "replay": {"snapshot_every": 2},
    "cluster": {"nodes": {"target": 2}},
    "checkpoint": {"every_rounds": 1, "keep": 3},
}
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": _BASE | {"algorithm": {"name": "fedavg", "epochs": 1}},
    "just_one_byte": _BASE | {"algorithm": {"name": "just_one_byte"}, "optimizer": {"lr": 1e-4}},
    "fedbuff": _BASE | {"algorithm": {"name": "fedbuff", "buffer_size": 1, "steps": 2}},
    "diloco": _BASE | {"algorithm": {"name": "diloco", "inner_steps": 2}, "optimizer": {"name": "adamw", "lr": 0.01}},
}
_WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**400, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "1",
    "../../x", "\u0000", "é" * 50, [], {}, [1], [[]], {"a": 1}, [None] * 5, {"tensor": 9}, "x" * 10_000,
)  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A run that was stopped, the same run at its end, and what right results are."""

    name: str
    stopped: Path
    finished: Path
    sweep: Path
    digest: str


@dataclass(frozen=True)
class Tried:
    """What came of one try."""

    seed: int
    what: str
    """The run, the command and the damage."""
    outcome: str
    """``right``, ``refused`` or what is wrong."""
    text: str

    @property
    def is_good(self) -> bool:
        """Whether that is as it should be."""
        return self.outcome in ("right", "refused", "changed")


def originals(folder: Path) -> list[Original]:
    """Make the runs."""
    made: list[Original] = []
    for name, raw in RUNS.items():
        finished, stopped = folder / name / "finished/run", folder / name / "stopped/run"
        digest = api.simulate(raw, run_dir=finished).digest
        with contextlib.suppress(StoppedError):
            api.simulate(raw, run_dir=stopped, observers=[Stopper(3)])
        for path in (finished, stopped):
            (path / "undone.jsonl").write_text('{"event": "x"}\n')
            facts = {"token": 3, "host": "elsewhere", "pid": 7, "started": 1.0, "renewed": 1.0, "owner": "x"}
            (path / "lease.json").write_text(json.dumps(facts))
        assert digest is not None
        made.append(Original(name, stopped, finished, _sweep(raw, stopped, folder / name / "sweep/run"), digest))
    return made


def _sweep(raw: dict[str, Any], trial: Path, path: Path) -> Path:
    """A sweep that was interrupted in its second trial, with what a tracker has not been sent."""
    options = Options(space="fedavg", samples=3, metrics=("loss", "bytes:min"), simulate=True)
    sweep._made(parse(raw), options, path)
    board = Board(options.objectives, path)
    for number in range(2):
        board.add(Trial(number, number, 0, {"optimizer.lr": 0.1 + number}))
        board.report(number, {"rounds": 2, "loss": 0.5, "bytes": 10})
    board.close(0, "finished", {"status": "finished"})
    board.change(1, {"optimizer.lr": 0.2})
    board.reopen(1, keep=1)
    board.release()
    shutil.copytree(trial, path / TRIALS / "trial-0001")
    (path / TRIALS / "trial-0001/origin.json").write_text('{"run_id": "trial-0000"}')
    for folder in (path, path / TRIALS_OF / "trial-0000", path / TRIALS_OF / "trial-0001"):
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"op": "begin", "name": "x", "tags": {"a": "b"}},
            {"op": "metrics", "step": 1, "values": {"loss": 0.5}},
        ]
        (folder / SPOOL).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / STATE).write_text(json.dumps({"offset": 0, "run_id": "r", "tried": True}))
    return path


# --- commands --------------------------------------------------------------------------------------------------------


def _resume(path: Path) -> str | None:
    return api.resume(path).digest


def _resume_previous(path: Path) -> str | None:
    return api.resume(path, from_previous=True).digest


def _export(path: Path) -> str | None:
    return export(path, to=path.parent / "exported.safetensors").digest


def _export_inside(path: Path) -> str | None:
    return export(path).digest


def _export_round(path: Path) -> str | None:
    return export(path, 4, to=path.parent / "exported.safetensors").digest


def _rebuild(path: Path) -> str | None:
    return rebuild(path, save=path.parent / "saved.safetensors").digest


def _replay(path: Path) -> str | None:
    return api.replay(path, run_dir=path.parent / "again").digest


def _simulate(path: Path) -> str | None:
    return api.simulate(path / "config.yaml", run_dir=path.parent / "again").digest


def _load_model(path: Path) -> str | None:
    api.load_model(path)
    return None


def _resume_sweep(path: Path) -> str | None:
    """All that ``sweep --resume`` does before it trains: reads the sweep, and what each of its trials goes on from."""
    folder, config, _, board = sweep.reopen(path)
    with patch.object(trial_checkpoint, "_WAIT_S", 0.0):
        for trial in board.trials.values():
            if trial.end is None:
                _, lease, _, _ = trial_checkpoint.opened(config, folder / TRIALS / trial.name, picture=False)
                if lease is not None:
                    lease.release()
    return None


def _track(path: Path) -> str | None:
    """All that ``track`` does but send: each operation that is left is read, and noted as sent."""
    readers = [SpoolReader(folder) for folder in folders_of(path)]
    for reader in readers:
        if reader.problem is not None:
            raise ConfigError(reader.problem)
        while (read := reader.read())[0]:
            reader.note(offset=read[1][-1])
        reader.note(ended=True)
        reader.forget()
    return None


COMMANDS: dict[str, tuple[str, Callable[[Path], str | None]]] = {
    "resume": ("stopped", _resume),
    "resume --from-previous": ("stopped", _resume_previous),
    "resume, finished": ("finished", _resume),
    "export": ("finished", _export),
    "export inside": ("finished", _export_inside),
    "export --round": ("finished", _export_round),
    "rebuild": ("finished", _rebuild),
    "simulate --replay": ("finished", _replay),
    "simulate RUN/config.yaml": ("finished", _simulate),
    "load_model": ("finished", _load_model),
    "sweep --resume": ("sweep", _resume_sweep),
    "track": ("sweep", _track),
}


# --- damage ----------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file() and not one.is_symlink())


def _bytes_damage(rng: random.Random, file: Path, run: Path) -> str:
    data = bytearray(file.read_bytes())
    kind = rng.choice(["truncate", "flip", "empty", "garbage", "swap", "delete", "double", "insert", "not UTF-8"])
    match kind:
        case "truncate":
            data = data[: rng.randrange(len(data) + 1)]
        case "flip" if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "empty":
            data = bytearray()
        case "garbage":
            data = bytearray(rng.randbytes(rng.randrange(1, 300)))
        case "swap":
            other = rng.choice(_files(run))
            data = bytearray(other.read_bytes())
            kind += f" with {other.relative_to(run)}"
        case "double":
            data = data * 2
        case "insert":
            place = rng.randrange(len(data) + 1)
            data[place:place] = rng.randbytes(3)
        case "not UTF-8":
            data[rng.randrange(len(data) + 1) :] = b"\xff\xfe\n"
        case _:
            file.unlink()
            return kind
    file.write_bytes(data)
    return kind


def _places(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*here, key))
    elif isinstance(data, list):
        for place, value in enumerate(data[:8]):
            yield from _places(value, (*here, place))


def _field_damage(rng: random.Random, data: Any) -> tuple[Any, str]:
    place = rng.choice(list(_places(data)))
    kind = rng.choice(["value", "value", "value", "delete", "rename"])
    wrong = rng.choice(_WRONG)
    if not place:
        return wrong, f"= {str(wrong)[:20]}"
    owner = data
    for step in place[:-1]:
        owner = owner[step]
    if kind == "delete" or (kind == "rename" and not isinstance(owner, dict)):
        del owner[place[-1]]
        return data, f"{place} deleted"
    if kind == "rename":
        owner[f"{place[-1]}x"] = owner.pop(place[-1])
        return data, f"{place} renamed"
    owner[place[-1]] = wrong
    return data, f"{place} = {str(wrong)[:20]}"


def _json_damage(rng: random.Random, run: Path) -> str:
    """A field in one of the files of JSON; a checkpoint's manifest then vouches for it all the same."""
    there = [one for one in _files(run) if one.suffix in (".json", ".jsonl")]
    # What all that follows is made from, more often than the others.
    states = [one for one in there if one.name.startswith("state")]
    file = rng.choice(states[-2:] if states and rng.random() < 0.5 else there)
    text = file.read_text()
    if file.suffix == ".jsonl":
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        data, what = _field_damage(rng, json.loads(lines[place]))
        lines[place] = json.dumps(data)
        file.write_text("\n".join(lines) + "\n")
    else:
        data, what = _field_damage(rng, json.loads(text))
        if rng.random() < 0.7:
            _sum_again(data)
        file.write_text(json.dumps(data))
    reseal(file)
    return f"{file.relative_to(run)}: {what}"


def _sum_again(data: Any) -> None:
    """Let a state's own checksums be right."""
    with contextlib.suppress(Exception):
        data["sums"] = {node: sum_of(one) for node, one in data["nodes"].items()} | {
            "controller": sum_of(data["controller"])
        }


def reseal(file: Path) -> None:
    """Let the manifest of a checkpoint vouch for a file that was changed."""
    manifest = file.with_name("manifest.json")
    if not manifest.exists():
        return
    with contextlib.suppress(Exception):
        known = json.loads(manifest.read_text())
        if file.name in known["files"]:
            data = file.read_bytes()
            known["files"][file.name] |= {"bytes": len(data)}
            if file.suffix == ".json":
                known["files"][file.name]["checksum"] = checksum_of(data)
        known.pop("checksum", None)
        manifest.write_bytes(Manifest.model_validate(known).sealed().to_bytes())


def _odd_damage(rng: random.Random, run: Path, outside: Path) -> str:
    """Something else in the place of a file or a folder."""
    there = sorted(path for path in run.rglob("*") if not path.is_symlink())
    new = ["undone.jsonl", "exported", "logs", ".config.yaml.partial", "export", "curves.png", ".metrics.jsonl.partial"]
    there += [run / name for name in new if not (run / name).exists()]
    place = rng.choice(there)
    kind = rng.choice(["fifo", "link", "link to a folder", "loop", "folder", "sparse", "header", "gone", "copy's link"])
    source = place.read_bytes() if place.is_file() else None
    if place.is_dir():
        if kind == "link to a folder" and rng.random() < 0.7:
            shutil.copytree(place, outside / "copy")  # as it was, and elsewhere
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(place)
        case "link":
            place.symlink_to(outside / rng.choice(["precious", "not there"]))
        case "copy's link":
            (outside / "same").write_bytes(source or b"")
            place.symlink_to(outside / "same")
        case "link to a folder":
            place.symlink_to(outside / "copy" if (outside / "copy").exists() else outside)
        case "loop":
            place.symlink_to(place)
        case "folder":
            place.mkdir()
            (place / "file").write_text("x")
        case "sparse" | "header":
            size = rng.choice([4 * 2**40, 2**62 // 1024])
            with place.open("wb") as file:
                if kind == "header":
                    shape = [size // 4]
                    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}})
                    file.write(struct.pack("<Q", len(header)) + header.encode())
                    size = 4 * shape[0] + file.tell()
                with contextlib.suppress(OSError):
                    file.truncate(size)
        case _:
            pass
    return f"{place.relative_to(run)}: {kind}"


def _config_damage(rng: random.Random, run: Path) -> str:
    lines = (run / "config.yaml").read_text().splitlines()
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    value = rng.choice(
        ["7", "x", "null", "[]", "{}", "-1", ".nan", "1e99", "true", "'", "&a [*a]", "!!python/name:os.x"]
    )
    lines[place] = f"{key}{colon} {value}"
    (run / "config.yaml").write_text("\n".join(lines) + "\n")
    return f"config.yaml: {lines[place].strip()}"


def damage(rng: random.Random, run: Path, outside: Path) -> str:
    """Do some damage, and say what."""
    kind = rng.choices(["bytes", "json", "odd", "config"], [4, 7, 4, 1])[0]
    if kind == "bytes":
        file = rng.choice(_files(run))
        return f"{file.relative_to(run)}: {_bytes_damage(rng, file, run)}"
    if kind == "json":
        return _json_damage(rng, run)
    return _odd_damage(rng, run, outside) if kind == "odd" else _config_damage(rng, run)


# --- tries -----------------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class _WaitsError(BaseException):
    pass


def _waits(*_: object) -> None:
    raise _WaitsError


def attempt(made: list[Original], seed: int, folder: Path) -> Tried:
    """One command on one damaged directory, in this process and its main thread."""
    rng = random.Random(seed)
    original = rng.choice(made)
    command = rng.choice(list(COMMANDS))
    kind, act = COMMANDS[command]
    work, outside = folder / "work", folder / "outside"
    for one in (work, outside):
        shutil.rmtree(one, ignore_errors=True)
    outside.mkdir(parents=True)
    (outside / "precious").write_text("kept")
    (outside / "round-000009").mkdir()
    (outside / "round-000009/precious").write_text("kept too")
    run = work / "run"
    shutil.copytree({"finished": original.finished, "stopped": original.stopped, "sweep": original.sweep}[kind], run)
    what = f"{original.name}, {command}: " + damage(rng, run, outside)
    before = _contents(outside)
    signal.signal(signal.SIGALRM, _waits)
    signal.alarm(_LIMIT_S)
    try:
        outcome, text = _outcome(
            act, run, original.digest, is_open="config.yaml" in what and not command.startswith("resume")
        )
    finally:
        signal.alarm(0)
    if _contents(outside) != before:
        outcome = "written outside"
    return Tried(seed, what, outcome, text)


def _outcome(act: Callable[[Path], str | None], run: Path, digest: str, *, is_open: bool) -> tuple[str, str]:
    try:
        found = act(run)
    except StarlingError as error:
        text = str(error)
        if getattr(error, "traceback", None):
            return "traceback", text
        return ("refused" if len(text.splitlines()) <= 5 and text else "long"), text
    except _WaitsError:
        return "waits", traceback.format_exc()
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        return "bug", traceback.format_exc()
    if found in (digest, None):
        return "right", ""
    return ("changed" if is_open else "wrong"), str(found)


def main(first: int, last: int) -> int:
    """Try seeds; print what is not as it should be, and how many of each kind there are."""
    import logging

    logging.disable(logging.WARNING)
    say = sys.stdout.write
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        made = originals(Path(folder) / "originals")
        for seed in range(first, last):
            tried = attempt(made, seed, Path(folder))
            counts[tried.outcome] = counts.get(tried.outcome, 0) + 1
            if not tried.is_good:
                lines = [line for line in tried.text.splitlines() if line.strip()]
                say(f"{seed} {tried.outcome} | {tried.what} | {' / '.join(lines[-5:])[:700]}\n")
    say(f"{counts}\n")
    return 0 if set(counts) <= {"right", "refused", "changed"} else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
