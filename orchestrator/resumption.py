"""From a run's directory to what it goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import changes, identity, run_files, saved_state, yaml_file
from orchestrator.checkpoints import CheckpointStore
from orchestrator.config import load, parse
from orchestrator.errors import ConfigError
from orchestrator.given_path import given as made_absolute
from orchestrator.revival import Revival
from orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.config import Config
    from orchestrator.records import Summary


def directory(run_dir: str | Path) -> Path:
    """Where the run is.

    Raises:
        ConfigError: that is no run's directory.
    """
    path = made_absolute(run_dir, "run directory")
    try:
        Folder(path).size("config.yaml")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{run_dir}: this is no run directory (it has no config.yaml)") from None
    except OSError as error:
        raise ConfigError(f"{path / 'config.yaml'}: {run_files.reason(error)}") from None
    return path


def configuration(
    path: Path, overrides: Sequence[str] = (), *, trust: bool = False, name: str = "config.yaml"
) -> Config:
    """The configuration of the run in a directory.

    Args:
        path: of the directory.
        overrides: ``a.b=c`` each; what they name is what the caller means.
        trust: what it names may be imported and reached although somebody else wrote it.
        name: of the file.

    Raises:
        ConfigError: it cannot be used, or is not to be trusted.
    """
    file = path / name
    raw = yaml_file.read(file)
    identity.require_trust(path, raw, trust=trust)
    return parse(raw, overrides, source=str(file))


def given(file: str | Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Config:
    """The configuration in a file, which may be that of a run's directory; as ``configuration`` then."""
    made_absolute(file, "configuration")
    path = Path(file).expanduser()
    folder = path.absolute().parent
    if identity.is_run_directory(folder):
        return configuration(folder, overrides, trust=trust, name=path.name)
    return load(path, overrides)


def finished(path: Path) -> Summary | None:
    """What the run in a directory came to, if it is finished.

    Raises:
        ConfigError: its summary is damaged.
    """
    summary = run_files.summary(path)
    return summary if summary is not None and summary.status == "finished" else None


def revival(
    path: Path,
    overrides: Sequence[str],
    *,
    from_previous: bool = False,
    trust: bool = False,
    accept_changes: bool = False,
) -> tuple[Revival, CheckpointStore, bool]:
    """What a run goes on from, where its checkpoints are, and whether it runs in the simulator.

    Raises:
        ConfigError: there is none, it cannot be used, or not with ``overrides``.
    """
    config = configuration(path, overrides, trust=trust)
    store = CheckpointStore(config.checkpoint.uri, path, identity.run_id(path), keep=config.checkpoint.keep)
    checkpoint = saved_state.check(store.read(from_previous=from_previous))
    identity.require_own_checkpoint(path, checkpoint.where, has_mark=checkpoint.is_ours, trust=trust)
    identity.require_trust(path, checkpoint.controller["config"], trust=trust, what="checkpoint")
    before = parse(checkpoint.controller["config"], source=checkpoint.where)
    if not accept_changes:
        changes.refuse(path, before, config, overrides)
    if checkpoint.number + 1 > config.rounds:
        raise ConfigError(f"rounds: {config.rounds} are done already, the checkpoint is of {checkpoint.number + 1}")
    is_virtual = checkpoint.controller["progress"]["transport_nbytes"] is None
    revival = Revival(checkpoint, config, before, accept_changes)
    if from_previous:
        # Before the records are taken back: whenever this ends, no other checkpoint is gone on from.
        store.forget_after(checkpoint.number)
    if not checkpoint.is_ours:
        store.adopt(checkpoint.number)  # the directory is this user's from now on, and should this be interrupted
    return revival, store, is_virtual
