"""From a run's directory to what it goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import run_files, saved_state
from orchestrator.checkpoints import CheckpointStore
from orchestrator.config import load, parse
from orchestrator.errors import ConfigError
from orchestrator.revival import Revival
from orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.records import Summary


def directory(run_dir: str | Path) -> Path:
    """Where the run is.

    Raises:
        ConfigError: that is no run's directory.
    """
    path = Path(run_dir).expanduser().resolve()
    try:
        Folder(path).size("config.yaml")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{run_dir}: this is no run directory (it has no config.yaml)") from None
    except OSError as error:
        raise ConfigError(f"{path / 'config.yaml'}: {run_files.reason(error)}") from None
    return path


def finished(path: Path) -> Summary | None:
    """What the run in a directory came to, if it is finished.

    Raises:
        ConfigError: its summary is damaged.
    """
    summary = run_files.summary(path)
    return summary if summary is not None and summary.status == "finished" else None


def revival(
    path: Path, overrides: Sequence[str], *, from_previous: bool = False
) -> tuple[Revival, CheckpointStore, bool]:
    """What a run goes on from, where its checkpoints are, and whether it runs in the simulator.

    Raises:
        ConfigError: there is none, it cannot be used, or not with ``overrides``.
    """
    config = load(path / "config.yaml", overrides)
    store = CheckpointStore(config.checkpoint.uri, path, path.name, keep=config.checkpoint.keep)
    checkpoint = saved_state.check(store.read(from_previous=from_previous))
    before = parse(checkpoint.controller["config"], source=checkpoint.where)
    if checkpoint.number + 1 > config.rounds:
        raise ConfigError(f"rounds: {config.rounds} are done already, the checkpoint is of {checkpoint.number + 1}")
    is_virtual = checkpoint.controller["progress"]["transport_nbytes"] is None
    revival = Revival(checkpoint, config, before)
    if from_previous:
        # Before the records are taken back: whenever this ends, no other checkpoint is gone on from.
        store.forget_after(checkpoint.number)
    return revival, store, is_virtual
