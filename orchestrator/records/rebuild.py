"""Rebuilding a run's model, of any round, from the log of its sealed rounds: no forward pass, and the same bits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from starling.actors.host.build import build_replicas, load_data
from starling.actors.replica.catch_up import apply, load_model
from starling.algorithms.api import Algorithm
from starling.algorithms.errors import ProgramError
from starling.orchestrator.errors import ConfigError, DivergedError
from starling.orchestrator.given_path import given
from starling.orchestrator.records import identity, round_log
from starling.orchestrator.records.round_log import RunEnd, Sealed, Snapshot
from starling.orchestrator.records.run_config import configuration, directory
from starling.orchestrator.records.run_files import memory_bytes
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from starling.actors.replica.replica import Replica
    from starling.orchestrator.records.round_log import Entry


@dataclass(frozen=True)
class Rebuilt:
    """A model that was rebuilt."""

    run_id: str
    round: int
    """The last that was applied."""
    replayed: int
    """Rounds that were applied."""
    since: int | None
    """The round of the snapshot with which it began; ``None``: the initial model."""
    digest: str
    checked: int
    """Digests in the log that it was compared with, and equals."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def rebuild(
    run_dir: str | Path,
    to: int | None = None,
    *,
    since: int | None = None,
    save: Path | None = None,
    trust: bool = False,
) -> Rebuilt:
    """Rebuild the model after round ``to`` (default: the last).

    Args:
        run_dir: of the run.
        to: counted from 0.
        since: begin with the last snapshot up to this round that is kept, if one is; default: with the initial model,
            and check the digests of all snapshots.
        save: a safetensors file for the model.
        trust: its configuration may name code although somebody else wrote it.

    Raises:
        ConfigError: there is no such log or round, or the log is damaged.
        DivergedError: it ends with another digest than the run.
    """
    began = time.monotonic()
    path = directory(run_dir)
    target = None if save is None else given(save, "--save")
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise ConfigError(f"--save {target}: cannot be written: it must be a file in a folder that is there")
    config = configuration(path, trust=trust)
    if type(config.algorithm).replay is Algorithm.replay:
        raise ConfigError(f"{path}: rounds of {config.algorithm.name} cannot be replayed: they are more than their log")
    log = path / round_log.NAME
    run_id = identity.run_id(path)
    entries: list[Entry] = []
    for entry in round_log.read(log, run_id):
        entries.append(entry)
        if isinstance(entry, Sealed) and entry.round == to:
            break
    last = max((entry.round for entry in entries if isinstance(entry, Sealed)), default=-1)
    if last < 0 or (to is not None and to != last):
        raise ConfigError(f"{log}: there is no round {0 if to is None else to}; the last one is {last}")
    if not any(isinstance(entry, RunEnd) for entry in entries):
        # What belongs to the last round comes after it.
        entries += _after(log, run_id, last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = load_data(config.task, config.data, config.num_nodes, config.seed)
        (replica,) = build_replicas([0], config.replica_spec(), data, [torch.device("cpu")])
        config.algorithm.init(replica)
        replica.commit()
        place = _snapshot(path, entries, since, replica)
        checked, replayed = _apply(path, entries, place, replica)
        digest = replica.model_digest()
        if target is not None:
            _save(replica, target)
    finally:
        torch.set_num_threads(threads)
    return Rebuilt(run_id, last, replayed, place, digest, checked, round(time.monotonic() - began, 3))


def _save(replica: Replica, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file(replica.model_tensors(), partial)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--save {target}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _after(log: Path, run_id: str, last: int) -> list[Entry]:
    """The digests in the log that are of the model after round ``last``, if the log is whole so far."""
    found: list[Entry] = []
    seen = False
    try:
        for entry in round_log.read(log, run_id):
            if isinstance(entry, Sealed):
                if seen:
                    break
                seen = entry.round == last
            elif seen and isinstance(entry, Snapshot | RunEnd):
                found.append(entry)
    except ConfigError:
        pass  # behind what is asked for
    return found


def _snapshot(path: Path, entries: list[Entry], since: int | None, replica: Replica) -> int | None:
    """Load the last snapshot up to round ``since`` that is kept; return its round."""
    known = [entry for entry in entries if isinstance(entry, Snapshot) and since is not None and entry.round <= since]
    for chosen in reversed(known):
        name = round_log.snapshot_name(chosen.round)
        try:
            load_model(replica, Folder(path).read(name, memory_bytes()))
        except FileNotFoundError:
            continue  # only the last few are kept
        except (OSError, SafetensorError, ProgramError) as error:
            raise ConfigError(f"{path / name}: cannot be read as a snapshot of this run ({error})") from None
        _check(replica, chosen.digest, f"{path / name}")
        return chosen.round
    return None


def _apply(path: Path, entries: list[Entry], place: int | None, replica: Replica) -> tuple[int, int]:
    """Apply the rounds after ``place``; return how many digests were compared, and how many rounds applied."""
    checked, replayed = 0 if place is None else 1, 0
    begun = -1 if place is None else place
    for entry in entries:
        match entry:
            case Sealed(number, record) if number > begun:
                apply(replica, number, record)
                replayed += 1
            case Snapshot(number, digest) if number > begun:
                _check(replica, digest, f"{path}: round {number}")
                checked += 1
            case RunEnd(digest):
                _check(replica, digest, f"{path}: the run's end")
                checked += 1
            case _:
                pass
    return checked, replayed


def _check(replica: Replica, digest: str, where: str) -> None:
    found = replica.model_digest()
    if found != digest:
        raise DivergedError(f"{where}: the log gives a model with digest {found}, and the run had {digest}")
