"""Identity of a run directory: its run's id, its configuration as written, and the mark of whoever wrote it.

``run.json`` in the directory has these. A configuration can name code (``task: my_module:MyTask``), addresses and
environments: whoever makes a run directory could make whoever resumes or exports it run their program. Names and
addresses in a configuration are therefore refused unless the file has this user's *mark* for exactly them. The mark is
an HMAC with a key that never leaves the user's state folder. It moves with the directory, and nobody else can make it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import AfterValidator, TypeAdapter

from starling.orchestrator.config.messages import shown
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.run_files import Stored
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

NAME = "run.json"
STATE_DIR = "STARLING_STATE_DIR"
"""The environment's name for the folder with the key; default: ``starling`` in ``$XDG_STATE_HOME``."""

_IMPORT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d][\w.<>]*")
_ADDRESSES = (("checkpoint", "uri", None), ("tracking", "uri", None), ("cluster", "address", "local"))
_SIGNS = (NAME, "events.jsonl")
_KEY_BYTES = 32


def _checked_id(text: str) -> str:
    if not 0 < len(text) <= 255 or "/" in text or text in (".", "..") or not text.isprintable():
        raise ValueError("should be the name of a folder")
    return text


class RunFile(Stored):
    """``run.json``."""

    run_id: Annotated[str, AfterValidator(_checked_id)]
    config: str
    """SHA-256 of ``config.yaml`` as Starling wrote it."""
    names: list[str] = []
    """Names outside of Starling that the configuration uses: import paths, addresses, an environment."""
    folders: list[str] = []
    """Folders in which the modules were found."""
    mark: str = ""


_RUN_FILE = TypeAdapter(RunFile)


def read(path: Path) -> RunFile | None:
    """Read ``run.json`` of a directory; return None if there is none, as in older runs.

    Raises:
        ConfigError: it is damaged.
    """
    return run_files.read(Folder(path), NAME, _RUN_FILE)


def run_id(path: Path) -> str:
    """The id of the run in a directory, which may have another name by now.

    Raises:
        ConfigError: what says so is damaged.
    """
    known = read(path)
    if known is not None:
        return known.run_id
    summary = run_files.summary(path)
    if summary is not None:
        with contextlib.suppress(ValueError):
            return _checked_id(summary.run_id)
    return path.name


def write(path: Path, run_id: str, config: Mapping[str, Any], text: bytes) -> None:
    """Write ``run.json``, with this user's mark.

    Args:
        path: of the run directory.
        run_id: of the run.
        config: dumped.
        text: of ``config.yaml``.

    Raises:
        OSError: it cannot be written.
    """
    known: RunFile | None = None
    with contextlib.suppress(ConfigError):
        known = read(path)
    names = sorted({*reaches(config), *(known.names if known and _is_ours(known) else ())})
    folders = sorted({*_folders_of(names), *(known.folders if known and _is_ours(known) else ())})
    facts = RunFile(run_id=run_id, config=digest(text), names=names, folders=folders, mark=_mark(names, folders))
    Folder(path).write(NAME, (facts.model_dump_json(indent=2) + "\n").encode())


def is_ours(path: Path) -> bool:
    """Whether this user wrote the ``run.json`` of a directory.

    Raises:
        ConfigError: it is damaged.
    """
    known = read(path)
    return known is not None and _is_ours(known)


def require_own_checkpoint(path: Path, where: str, *, has_mark: bool, trust: bool) -> None:
    """Refuse a checkpoint in this user's own run directory that this user did not write, or that was edited.

    In the directory of somebody else all are.

    Args:
        path: of the run directory.
        where: the checkpoint lies, for people.
        has_mark: it has this user's mark.
        trust: whoever asks answers for it.

    Raises:
        ConfigError: it is not used.
    """
    if not has_mark and not trust and is_ours(path):
        raise ConfigError(
            f"{where}: was edited since it was written, or is of somebody else, and the run is yours; with --trust "
            "(in Python, trust=True) it is used"
        )


def seal(kind: str, data: bytes) -> str:
    """Make this user's mark of some data; empty if there is no place for a key."""
    key = _key()
    return "" if key is None else hmac.new(key, kind.encode() + b"\0" + data, hashlib.sha256).hexdigest()


def is_sealed(kind: str, data: bytes, mark: str) -> bool:
    """Whether a mark is this user's, of exactly this data."""
    made = seal(kind, data)
    return bool(made) and hmac.compare_digest(made.encode(), mark.encode())


def digest(text: bytes) -> str:
    """SHA-256 of a configuration as it is written."""
    return hashlib.sha256(text).hexdigest()


def is_run_directory(path: Path) -> bool:
    """Whether a folder is that of a run, and not just one with a configuration."""
    return any((path / name).exists() for name in _SIGNS)


def require_trust(path: Path, config: Mapping[str, Any], *, trust: bool, what: str = "config.yaml") -> None:
    """Let the modules that a run's configuration names be imported, if that may be.

    Args:
        path: of the run directory.
        config: plain data.
        trust: whoever asks answers for it.
        what: where the configuration stands, for people.

    Raises:
        ConfigError: it reaches for something, and was not written by this user.
    """
    wanted = reaches(config)
    if not wanted:
        return
    known = read(path)
    is_ours = known is not None and _is_ours(known)
    strange = [name for name in wanted if not (is_ours and known is not None and name in known.names)]
    if strange and not trust:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ConfigError(
            f"{path}: its {what} names {shown(strange[0])}{more}, and you did not write that on this machine; it may "
            "run code or reach out: with --trust (in Python, trust=True) it is used"
        )
    folders = known.folders if known is not None and (is_ours or trust) else []
    for folder in [*folders, *([str(path)] if trust else [])]:
        if folder not in sys.path:
            sys.path.append(folder)  # at the end: it must not hide modules of others


# --- what a configuration reaches for --------------------------------------------------------------------------------


def reaches(config: Mapping[str, Any]) -> list[str]:
    """List what a configuration uses outside of Starling and its directory: import paths, addresses, environment.

    >>> reaches({"task": "my_module:MyTask", "cluster": {"address": "auto"}})
    ['my_module:MyTask', 'cluster.address: auto']
    """
    found = [text for text in _texts(config) if _IMPORT.fullmatch(text)]
    for section, key, plain in _ADDRESSES:
        value = _section(config, section).get(key)
        if value not in (None, plain):
            found.append(f"{section}.{key}: {value}")
    space = _section(config, "sweep").get("space")
    if isinstance(space, str) and ":" in space:
        found.append(f"--space {space}")
    environment = _section(config, "cluster").get("runtime_env")
    if environment:
        found.append(f"cluster.runtime_env: {hashlib.sha256(repr(environment).encode()).hexdigest()[:16]}")
    return list(dict.fromkeys(found))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return cast("dict[str, Any]", section) if isinstance(section, dict) else {}


def _texts(data: object) -> Iterator[str]:
    """Yield all texts in plain data, keys too; aliased sections (YAML) are visited once."""
    seen, left = set[int](), [data]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, dict):
                found = cast("dict[object, object]", one)
                left += [*found.keys(), *found.values()]
            else:
                left += cast("list[object]", one)


def _folders_of(names: Iterable[str]) -> Iterator[str]:
    """Yield the folders in which modules of import paths were found, but for installed ones."""
    installed = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    for name in names:
        module = sys.modules.get(name.partition(":")[0]) if _IMPORT.fullmatch(name) else None
        file = getattr(module, "__file__", None)
        if module is None or not file or file.startswith(installed):
            continue
        depth = module.__name__.count(".") + hasattr(module, "__path__")
        yield str(Path(file).absolute().parents[depth])


# --- the mark --------------------------------------------------------------------------------------------------------


def _is_ours(known: RunFile) -> bool:
    mark = _mark(known.names, known.folders)
    return bool(mark) and hmac.compare_digest(mark.encode(), known.mark.encode())


def _mark(names: list[str], folders: list[str]) -> str:
    """Return this user's mark for these names; empty if there is no place for a key."""
    key = _key()
    return "" if key is None else hmac.new(key, json.dumps([names, folders]).encode(), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """Return this user's secret key, created at first use; ``None`` if there is no place to keep a key."""
    try:
        place = os.environ.get(STATE_DIR)
        folder = Path(place) if place else Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "starling"
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "key"
        if not file.exists():
            partial = folder / f".key.{secrets.token_hex(8)}"
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write(secrets.token_bytes(_KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(partial, file)  # whole, and of two that begin at the same time one
            partial.unlink()
        key = file.read_bytes()
    except (OSError, RuntimeError):
        return None
    return key if len(key) == _KEY_BYTES else None
