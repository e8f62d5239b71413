"""A configuration that was changed behind a run's back: named, key by key, before the run goes on with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.messages import shown
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import identity
from starling.orchestrator.records.run_files import MOST_JSON_BYTES
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from starling.orchestrator.config.schema import Config

FREE = (
    "name", "tracking", "checkpoint", "cluster.address", "cluster.num_cpus", "cluster.num_gpus", "cluster.runtime_env",
    "cluster.start_timeout_s", "cluster.min_nodes_timeout_s",
)  # fmt: skip
"""Keys that say where a run is recorded and where it runs, and not what it comes to: these may be edited."""


_MOST_LINES = 10
"""Limit on the keys that a message names."""

FIXED = ("task.name", "task.model", "algorithm.name", "optimizer.name", "optimizer.precision", "seed", "data.source")
"""Keys of what the saved state is of: no run goes on with others."""


def refuse(path: Path, before: Config, config: Config, overrides: Sequence[str]) -> None:
    """Refuse to go on with a ``config.yaml`` that somebody has edited.

    Args:
        path: of the run directory.
        before: with what the checkpoint was made.
        config: with what the run would go on.
        overrides: ``a.b=c`` each: what is meant to change.

    Raises:
        ConfigError: one line for each key that differs, and is neither free nor among the overrides.
    """
    known = identity.read(path)
    # What an earlier resume changed is in the file that it wrote, and not in the checkpoint before it.
    if known is not None and identity.digest(Folder(path).read("config.yaml", MOST_JSON_BYTES)) == known.config:
        return
    meant = [yaml_io.split(text)[0] for text in overrides]
    free = [tuple(key.split(".")) for key in FREE]
    file = path / "config.yaml"
    lines = [
        f"{file}: {'.'.join(place)} is {shown(now)}, and was {shown(then)} when the checkpoint was made; "
        f"{_hint(place, now)}"
        for place, then, now in _differences(before.dump(), config.dump())
        if not any(place[: len(key)] == key or key[: len(place)] == place for key in [*meant, *free])
    ]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"{file}: … and {len(lines) - _MOST_LINES} more of these"]
    if lines:
        raise ConfigError("\n".join(lines))


def _hint(place: tuple[str, ...], now: object) -> str:
    key = ".".join(place)
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
        return "put it back, or begin another run for that"
    return f"give --set {key}={now} if that is meant, or --accept-changes for all"


def _differences(then: object, now: object, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        old, new = cast("dict[str, object]", then), cast("dict[str, object]", now)
        for key in sorted({*old, *new}, key=str):
            yield from _differences(old.get(key), new.get(key), (*place, str(key)))
    elif then != now:
        yield place, then, now
