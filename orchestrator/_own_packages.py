"""Starling's packages have everybody's names: see that it is ours that are imported.

A project with a folder ``actors/`` of its own, on ``PYTHONPATH``, would otherwise hide ours.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_NAMES = ("actors", "algorithms", "tune_spaces")


def put_first() -> None:
    """Let ``import actors``, ``algorithms`` and ``tune_spaces`` find Starling's, and name the folder that would not.

    Raises:
        ImportError: another package of such a name is imported already.
    """
    for name in _NAMES:
        file = _file_of(name)
        if file is None or _is_ours(file):
            continue
        if name in sys.modules:
            message = f"{file.parent} is imported as {name!r}, and hides Starling's package of that name: rename it"
            raise ImportError(message)
        sys.path.insert(0, str(_ROOT))
        importlib.invalidate_caches()
        hidden = f"{file.parent} is hidden by Starling's package {name!r}; if your code imports it, rename it"
        logging.getLogger("starling").warning(hidden)


def _file_of(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, put into sys.modules by hand
        return None
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin)
    folders = list(spec.submodule_search_locations or ())  # a folder without __init__.py
    return Path(folders[0]) / "__init__.py" if folders else None


def _is_ours(file: Path) -> bool:
    return file.resolve().is_relative_to(_ROOT)
