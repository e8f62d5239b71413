"""Search spaces: for each family of algorithms one file, in which each algorithm has a space of its name.

A space maps paths of the configuration, as ``--set`` takes them, to domains of Ray Tune::

    SPACES["diloco"] = {"algorithm.inner_steps": tune.choice([10, 30]), "optimizer.lr": tune.loguniform(1e-4, 1e-2)}

It presumes nothing of the task: ranges are about an order of magnitude around the papers' values, and those of learning
rates wider. A space of one's own is named by file (``my_spaces.py:mine``) or import path (``my_package.spaces:mine``).
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ray.tune.search.sample import Domain

from starling.algorithms.errors import ImportPathError, SettingsError
from starling.algorithms.import_paths import module_of
from starling.algorithms.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

T = TypeVar("T")

Space: TypeAlias = dict[str, Domain]


def table() -> dict[str, Space]:
    """Return all spaces of this package by name."""
    spaces: dict[str, Space] = {}
    for module in sorted(one.name for one in pkgutil.iter_modules(__path__, f"{__name__}.")):
        spaces |= getattr(importlib.import_module(module), "SPACES", {})
    return dict(sorted(spaces.items()))


def find(name: str) -> Space:
    """Return the space called ``name``, or the one at ``path/to/file.py:name`` or ``module:name``.

    Raises:
        SettingsError: there is none, or it is no space.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon:
        known = table()
        if name not in known:
            raise SettingsError(f"--space {name}: no space is called {name!r}{did_you_mean(name, known)}")
        return known[name]
    module = _from_file(Path(source), name) if source.endswith(".py") else _imported(source, name)
    space = getattr(module, attribute, None)
    if space is None:
        raise SettingsError(f"--space {name}: {source} has no {attribute!r}")
    return checked(space, name)


def checked(space: Any, name: str) -> Space:  # noqa: ANN401 - whatever a user's file holds
    """Return ``space``, checked to be a search space; errors call it ``name``."""
    if not isinstance(space, dict) or not space or not all(isinstance(key, str) for key in space):
        raise SettingsError(
            f"--space {name}: must map paths of the configuration to domains, as in "
            '{"optimizer.lr": tune.loguniform(1e-4, 1e-1)}'
        )
    for key, domain in space.items():
        if not isinstance(domain, Domain) or domain.is_function():
            what = "a function" if isinstance(domain, Domain) else repr(domain)
            raise SettingsError(
                f"--space {name}: {key} must be a domain of ray.tune (choice, uniform, loguniform, randint, …), "
                f"got {what}"
            )
    return dict(space)


def _from_file(path: Path, name: str) -> ModuleType:
    path = path.expanduser()
    spec = importlib.util.spec_from_file_location(f"starling_space_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SettingsError(f"--space {name}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    _loaded(name, lambda: loader.exec_module(module))
    return module


def _imported(source: str, name: str) -> ModuleType:
    return _loaded(name, lambda: importlib.import_module(source), source)


def _loaded(name: str, load_it: Callable[[], T], module: str = "") -> T:
    try:
        return module_of(name, load_it, module)
    except ImportPathError as error:
        raise SettingsError(f"--space {name}: {error}") from None
