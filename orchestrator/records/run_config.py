"""The configuration of the run in a directory, and what the run came to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.schema import load, parse
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.given_path import given as made_absolute
from starling.orchestrator.records import identity, run_files
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.records.observers import Summary


def directory(run_dir: str | Path) -> Path:
    """Resolve a run directory's path.

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
    raw = yaml_io.read(file)
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
    """Read the summary of the run in a directory; return None unless it is finished.

    Raises:
        ConfigError: its summary is damaged.
    """
    summary = run_files.summary(path)
    return summary if summary is not None and summary.status == "finished" else None
