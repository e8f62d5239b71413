"""Configurations with something wrong in them: the examples, with a value, a key or a piece of text exchanged."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import yaml

from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = ROOT / "examples"

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**6,
    10**12,
    2**31,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    -0.5,
    1e-300,
    1e300,
    -1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "no",
    "0",
    "1e400",
    "٣",
    "²",
    "a" * 5000,
    "../x",
    "~",
    "\u202e",
    "\0",
    "💥",
    "sgd",
    "adamw",
    "none",
    "fedavg",
    ".x",
    "..a.b",
    "a:b",
    "a.b:C",
    ":",
    "math:pi",
    "os:system",
    "builtins:int",
    "starling.algorithms.api:Algorithm",
    "__main__:X",
    [],
    [[]],
    [1],
    [1, 2, 3],
    ["a"] * 50,
    {},
    {"name": None},
    {"name": 3},
    {"name": "x", "y": {}},
    {"a": {"b": {"c": 1}}},
    {1: 2},
    {"": 1},
    {"lr": "x"},
    [{"kind": "kill"}],
)
TEXTS = (
    "0x",
    "²",
    "2024-13-01",
    "25:61:00",
    "!!bool maybe",
    "!!float abc",
    "!!int x",
    "!!set {a}",
    "!!binary x",
    "!x y",
    "*a",
    "&a [*a]",
    "9" * 5000,
    "-" + "9" * 30,
    "1e999",
    "{",
    "[",
    "]",
    "}",
    "'",
    '"',
    "\t",
    "|",
    ">",
    "%",
    "@",
    "`",
    ": :",
    "- -",
    "? [a]",
    "<<",
    "<<: 3",
    "[" * 300 + "]" * 300,
    "{a: " * 200 + "}" * 200,
    "\ufeff",
    "---",
    "...",
    "!!python/name:os.system",
)
BOMB = "x0: &x0 [a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 8)}]\n" for level in range(1, 12)
)


def mutations(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Texts of configurations: the example that each was, and what it has become."""
    rng = random.Random(seed)
    examples = {path.stem: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.yaml"))}
    for _ in range(count):
        name = rng.choice(sorted(examples))
        text = examples[name]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            text = rng.choice((_value, _value, _value, _key, _piece, _line))(text, rng)
        if rng.random() < 0.02:
            text = BOMB + text
        yield name, text


def _value(text: str, rng: random.Random) -> str:
    """Another value, or a new key, at a random place of the tree."""
    try:
        data = yaml.safe_load(text)
        places = [place for place in _places(data) if place]
        place = rng.choice(places)
    except (yaml.YAMLError, ValueError, KeyError, IndexError, RecursionError, AttributeError, TypeError):
        return _piece(text, rng)
    section: Any = data
    for step in place[:-1]:
        section = section[step]
    key: Any = (
        place[-1] if isinstance(section, list) or rng.random() < 0.8 else rng.choice(("name", "lr", "x", "algorithm"))
    )
    section[key] = rng.choice(VALUES)
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


def _places(data: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


def _key(text: str, rng: random.Random) -> str:
    lines = [place for place, line in enumerate(text.splitlines()) if ":" in line]
    every = text.splitlines()
    place = rng.choice(lines or [0])
    key, _, rest = every[place].partition(":")
    every[place] = f"{key}{rng.choice(('x', '_', ' ', '1', '💥', '.'))}:{rest}"
    return "\n".join(every) + "\n"


def _piece(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice((0, 0, 1, 5)))
    return text[:at] + rng.choice(TEXTS) + text[end:]


def _line(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(("twice", "gone", "deeper"))
    if kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "gone":
        del lines[at]
    else:
        lines[at] = "  " + lines[at]
    return "\n".join(lines) + "\n"
