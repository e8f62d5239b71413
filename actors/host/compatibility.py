"""Compatibility of processes: versions that must agree in a run."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("algorithms", "actors")
"""Packages whose code decides what a node computes."""


@functools.cache
def versions() -> dict[str, str]:
    """Return the names and versions of this process's packages.

    Those of Starling have a hash of its sources behind them: two checkouts may both call themselves 0.1.0.
    """
    try:
        version = metadata.version("starling")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "Starling": f"{version} (sources {digest.hexdigest()[:8]})",
        "torch": torch.__version__.partition("+")[0],
        "Python": python,
    }


def difference(theirs: dict[str, str]) -> str | None:
    """Describe in one line how this process differs from one with versions ``theirs``; ``None`` if it does not.

    >>> difference(versions()) is None
    True
    """
    mine = versions()
    unlike = [
        f"{name} {mine.get(name)}, and the controller {version}"
        for name, version in theirs.items()
        if mine.get(name) != version
    ]
    if not unlike:
        return None
    return f"it has {'; '.join(unlike)}; install the same there, or name it in cluster.runtime_env"
