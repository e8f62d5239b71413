"""Checkpoints of trials: its own after an interruption, or another trial's, which it clones (PBT)."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.store import FOLDER, CheckpointStore
from starling.orchestrator.config.schema import parse
from starling.orchestrator.control.restore import Restoration
from starling.orchestrator.errors import CheckpointReadError, ConfigError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.lease import Lease
from starling.orchestrator.records.run_directory import RunDirectory
from starling.orchestrator.records.run_files import OriginFile
from starling.orchestrator.safe_files import Folder
from starling.orchestrator.sweeps.trial_thread import recorded

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.checkpoints.reader import Checkpoint
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Observer, Summary

_ORIGIN = "origin.json"
"""File in the directory of a trial that goes on from another's checkpoint; it names the origin."""
_COPIED = ("config.yaml", "metrics.jsonl", "events.jsonl")
_WAIT_S = 30.0
"""Longest wait in seconds for a first checkpoint, and for an ending controller to be gone."""


def opened(
    config: Config, run_dir: Path, *, picture: bool
) -> tuple[RunDirectory, Lease | None, Restoration | None, CheckpointStore | None]:
    """Open the run directory of a trial and the state to go on from; make it anew without a state.

    Without ``picture`` none is drawn, which takes longer than a small simulated run.
    """
    if (run_dir / "config.yaml").is_file():
        # A sweep that was killed leaves controllers behind, which end when they see that their Ray is gone.
        lease = Lease(run_dir, wait_s=_WAIT_S)
        try:
            store, checkpoint = _checkpoint(config, run_dir)
            before = parse(checkpoint.controller["config"], source=checkpoint.where)
            if checkpoint.number + 1 < config.rounds:
                restoration = Restoration(checkpoint, config, before)
                directory = RunDirectory(restoration.config, run_dir, resumed=checkpoint.controller, picture=picture)
                return directory, lease, restoration, store
        except ConfigError:
            pass  # it has none, or none that can be used
        lease.release()
        shutil.rmtree(run_dir)
    return RunDirectory(config, run_dir, picture=picture), None, None, None


def _checkpoint(config: Config, run_dir: Path) -> tuple[CheckpointStore | None, Checkpoint]:
    """Find the last checkpoint, with its store: the trial's own, or that of the trial it was cloned from."""
    names = [run_dir.name]
    origin = run_files.read(Folder(run_dir), _ORIGIN, TypeAdapter(OriginFile))
    if origin is not None:
        names.append(origin.run_id)
    for name in names:
        store = CheckpointStore(config.checkpoint.uri, run_dir, name, keep=config.checkpoint.keep)
        try:
            return (store if name == run_dir.name else None), saved_state.check(store.read())
        except CheckpointReadError:
            if name == names[-1]:
                raise
    raise AssertionError


def save(run_dir: Path, target: Path) -> None:
    """Copy a run's last checkpoint, and what belongs to it, into an empty directory.

    Raises:
        CheckpointReadError: there is none, for half a minute.
    """
    store = CheckpointStore(None, run_dir, run_dir.name)
    deadline = time.monotonic() + _WAIT_S
    while not store.rounds():
        if time.monotonic() > deadline:
            raise CheckpointReadError(f"{run_dir}: there is no checkpoint yet for another trial to go on from")
        time.sleep(0.1)
    name = f"round-{store.rounds()[-1]:06}"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run_dir / FOLDER / name, target / FOLDER / name)
    for file in _COPIED:
        shutil.copy2(run_dir / file, target / file)
    run_id = run_dir.name
    (target / _ORIGIN).write_text(json.dumps({"run_id": run_id}), encoding="utf-8")


def load(source: Path, run_dir: Path) -> None:
    """Put what was saved, of this or another run, in the place of a run's directory."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(source, run_dir, ignore=lambda _, names: [name for name in names if name.startswith(".")])


def tell(run_dir: Path, summary: Summary, observer: Observer) -> Summary:
    """Tell an observer of a run that is over."""
    for record in recorded(run_dir):
        observer.on_round(record)
    observer.on_end(summary)
    return summary
