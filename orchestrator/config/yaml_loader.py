"""A YAML loader for files by strangers: YAML 1.2's scalars, no key twice, and bounds on what a text may unfold to.

PyYAML reads YAML 1.1, in which ``010`` is 8, ``no`` is false, ``1e-3`` is a text and ``1:30`` is 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MAX_BYTES = 256 * 1024
"""Bytes of a text at most. PyYAML reads some 100 kB/s."""
MAX_DEPTH = 50
"""Nesting depth of sections and lists at most."""
MAX_VALUES = 50_000
"""Most values of a file with every alias unfolded: nine lines of nested aliases can be a billion values."""
_MAX_NUMBER = 2**64
_CORE = "tag:yaml.org,2002:"
_TAGS = frozenset(f"{_CORE}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))


class Loader(yaml.SafeLoader):
    """Loads one document; errors are ``yaml.YAMLError``s with a mark."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and refuse one that unfolds to too much."""
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, set())
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - PyYAML's
        """Refuse deep nesting before Python's own limit does."""
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(
                None, None, f"more than {MAX_DEPTH} levels inside of one another", self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - PyYAML's
        """Construct the value of a node; whatever is wrong with it is said with its place."""
        if node.tag not in _TAGS:
            raise ConstructorError(None, None, f"the tag {_shown(node.tag)} has no place here", node.start_mark)
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, OverflowError, AttributeError):
            kind = node.tag.removeprefix(_CORE)
            message = f"{_shown(node.value)} cannot be read as {kind}; put it in quotes if it is a text"
            raise ConstructorError(None, None, message, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Refuse a key that is there twice: YAML would silently take the last."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_CORE}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"{_shown(str(key))} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """Construct an integer: decimal with leading zeros, as YAML 1.2 has it."""
        text = self.construct_scalar(node).replace("_", "").lower()
        base = 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10
        value = int(text, base)
        if abs(value) >= _MAX_NUMBER:
            raise ConstructorError(None, None, f"{_shown(node.value)} is too large for a number", node.start_mark)
        return value


def _count(node: yaml.Node, counts: dict[int, int], above: set[int]) -> int:
    """Count the values that ``node`` unfolds to.

    Raises:
        ComposerError: too many, or a node inside of itself.
    """
    name = id(node)
    if name in above:
        raise ComposerError(None, None, "an alias stands inside of what it names", node.start_mark)
    if name not in counts:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        counts[name] = 1 + sum(_count(one, counts, above | {name}) for one in inner)
    if counts[name] > MAX_VALUES:
        message = f"more than {MAX_VALUES:,} values, with each alias unfolded"
        raise ComposerError(None, None, message, node.start_mark)
    return counts[name]


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) <= 40 else f"{text[:37]}…")


_FLOAT = (
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"{_CORE}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
Loader.add_constructor(f"{_CORE}int", Loader.construct_whole)
Loader.add_constructor(f"{_CORE}merge", Loader.construct_yaml_str)  # a value, not a key


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than a text."""

    yaml_implicit_resolvers = {
        first: [*Loader.yaml_implicit_resolvers.get(first, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
        for first in {*Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401 - PyYAML's
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unquoted or in single quotes, these line ends would be read as spaces.
    style = '"' if any(end in text for end in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(f"{_CORE}str", text, style)


_Dumper.add_representer(str, _text)


def dump(data: dict[str, Any]) -> str:
    """Return ``data``, which may be anything that JSON has, as YAML that ``Loader`` reads as ``data`` again."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
