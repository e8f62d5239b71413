"""Lists and texts in messages, as long as a line can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST_NAME = 80


def listed(names: Iterable[object], most: int = 12) -> str:
    """Return the first few of ``names``, and how many more there are.

    >>> listed([3, 1, 2]), listed(range(100), 3), listed([0, 1], 1)
    ('3, 1, 2', '0, 1, 2 and 97 more', '0 and 1 more')
    """
    texts = [str(name) for name in names]
    shown = ", ".join(shortened(text, _LONGEST_NAME) for text in texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def shortened(text: str, most: int) -> str:
    """Return ``text`` in one line, without its middle if it is longer than ``most`` characters.

    >>> shortened("it went wrong", 20), shortened("a" * 50 + "b" * 50, 15)
    ('it went wrong', 'aaaaaaaa … bbbb')
    """
    line = " ".join(text.split()) if "\n" in text else text
    return line if len(line) <= most else f"{line[: most * 3 // 5 - 1]} … {line[-(most // 5 + 1) :]}"
