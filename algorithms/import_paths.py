"""Import paths of classes, ``package.module:Class``: from a class to its path and back.

The imported code is somebody else's, and may raise anything, end the program, or print.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from starling.algorithms.errors import ImportPathError
from starling.algorithms.words import shortened

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_MOST_CHARACTERS = 600
"""Characters kept of an exception's text."""
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def path_of(cls: type) -> str:
    """Return the import path of ``cls``, which need not lead to it: see ``is_importable``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def is_importable(cls: type) -> bool:
    """Say whether another process can import ``cls`` by its path: not from a script, a notebook or a function."""
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def load(path: str) -> object:
    """Import ``package.module:Class``.

    Raises:
        ImportPathError: it cannot be imported; one line that says why and where.
    """
    module, _, names = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *names.split("."))):
        raise ImportPathError(f"{path!r} is not an import path: write package.module:Class")
    if module == "__main__":
        missing = f"{path!r} was defined in a script or a notebook, which this process does not run"
        raise ImportPathError(f"{missing}: put the class in a module, or go on from there, in Python")
    found = module_of(path, lambda: importlib.import_module(module), module)
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            file = getattr(sys.modules[module], "__file__", None)
            raise ImportPathError(f"module {module!r} has no {names!r} (it is {file or 'built in'})") from None
    return found


def module_of(path: str, load_it: Callable[[], T], name: str = "") -> T:
    """Return the module that ``load_it`` imports, for the class or object at ``path``.

    Raises:
        ImportPathError: ``load_it`` raised, or ended the program.
    """
    try:
        return quietly(load_it)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            hint = "it must be importable from here (PYTHONPATH, or the current folder)"
            raise ImportPathError(f"cannot import {path!r}: {error}; {hint}") from None
        raise ImportPathError(f"cannot import {path!r}: {raised(error)}") from error
    except SystemExit as error:
        hint = "put what belongs to a script under if __name__ == '__main__'"
        raise ImportPathError(f"cannot import {path!r}: the module ends the program ({error!r}); {hint}") from None
    except Exception as error:
        raise ImportPathError(f"cannot import {path!r}: {raised(error)}") from error


def missing_methods(cls: type) -> str | None:
    """Say which methods ``cls`` lacks before it can be used; ``None`` if it is complete."""
    if not inspect.isabstract(cls):
        return None
    missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
    return f"{path_of(cls)} cannot be used as it is: it has to define {missing}"


def raised(error: BaseException) -> str:
    """Return the type of an error, its message on one line, and the user's line of code that led to it."""
    text = shortened(" ".join(str(error).split()), _MOST_CHARACTERS)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # A user can act on a line of their own; the last one is often a library's.
    frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = ""  # its message has them
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


def quietly(act: Callable[[], T]) -> T:
    """Return what ``act`` returns. If it ends the program, what it wrote to standard error is dropped.

    A module that parses the command line when it is imported prints a usage: that of a program called starling.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result = act()
    except SystemExit:
        raise
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    if said.getvalue():
        sys.stderr.write(said.getvalue())
    return result
