"""Paths as people give them, made absolute; what no file can be called is refused in one line, at once."""

from __future__ import annotations

import os
from pathlib import Path

from starling.orchestrator.errors import ConfigError

_MOST = 160
"""Characters of a path in a message."""


def given(path: str | Path, what: str, error: type[ConfigError] = ConfigError) -> Path:
    """The absolute path, without links, of what may be there or not; ``~`` is a home.

    Args:
        path: as it was given.
        what: names it: an option, or a key.
        error: raised if it cannot be used.

    Raises:
        ConfigError: nothing can be there, or nobody may look.
    """
    found, reason = checked(path)
    if reason is not None:
        raise error(f"{what} {shown_path(path)}: {reason}")
    return found


def checked(path: str | Path) -> tuple[Path, str | None]:
    """The absolute path, and why nothing can be there."""
    text = os.fspath(path)
    if not text:
        return Path(), "an empty name is no path"
    if "\0" in text:
        return Path(), "a path cannot have a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return Path(), "its name is not UTF-8, which all that is written down must be"
    try:
        found = Path(os.path.realpath(Path(text).expanduser()))
    except RuntimeError:
        return Path(), "there is no such user, whose home ~ would be"
    try:
        found.lstat()
    except FileNotFoundError:
        return found, None
    except OSError as error:
        return Path(), error.strerror or str(error)
    return found, "it is a link that leads to itself" if found.is_symlink() else None


def shown_path(path: str | Path) -> str:
    """A path for messages: of a very long one, its two ends."""
    text = "".join(character if character.isprintable() else "?" for character in os.fspath(path))
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]}…{text[-_MOST // 2 :]}"
