"""YAML as the configuration wants it: no key twice, ``1e-3`` is a number, and ``a.b=c`` overrides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import yaml
from pydantic_core import PydanticCustomError, PydanticUndefined

from algorithms.registry import Part, find
from orchestrator.errors import ConfigError
from orchestrator.fields import model_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic import BaseModel


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, strict about keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Refuse a key that is there twice: YAML would silently take the last."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, which PyYAML reads, wants a point in a number with an exponent: 1e-3 would be a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    try:
        raw = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}{where}: is not a configuration: {problem}") from None
    if not isinstance(raw, dict):
        what = "it is empty" if raw is None else f"it is a {type(raw).__name__}"
        raise ConfigError(f"{path}: must be a mapping of keys (algorithm, task, …); {what}")
    return cast("dict[str, Any]", raw)


def _parse(text: str) -> object:
    return yaml.load(text, _Loader)  # noqa: S506 - derived from the safe loader


def split(text: str) -> tuple[tuple[str, ...], object]:
    """The path and the value of ``a.b=c``; the value is YAML, and a text where it is not.

    Raises:
        ConfigError: it is not written like that.
    """
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: write it as key.path=value")
    try:
        return path, _parse(value)
    except yaml.YAMLError:
        return path, value


def assigned(data: object, path: Sequence[str], value: object, model: type[BaseModel] | None) -> dict[str, Any]:
    """A copy of ``data`` (what ``model`` is made from) with ``value`` at ``path``.

    What stands on the way as a bare name becomes the section of that name, and a part that is not there at all the
    default one: ``algorithm.outer.lr=0.4`` needs no ``algorithm.outer.name``.
    """
    here = _section(data)
    if isinstance(model, type) and issubclass(model, Part):
        model = _chosen(model, here)
    head, *rest = path
    # YAML may have integer keys (network.speeds); a path has only texts.
    key: Any = int(head) if head.isdigit() else head
    if not rest:
        here[key] = value
        return here
    child = here.get(key)
    if isinstance(child, list) and rest[0].isdigit() and int(rest[0]) < len(child):
        here[key] = _replaced(cast("list[object]", child), int(rest[0]), rest[1:], value)
        return here
    if child is None and rest != ["name"]:
        child = _default(model, head)
    here[key] = assigned(child, rest, value, model_in(model, head))
    return here


def _section(data: object) -> dict[str, Any]:
    if isinstance(data, str):
        return {"name": data}
    if isinstance(data, Part):
        return {"name": data.name} | {field: getattr(data, field) for field in data.model_fields_set}
    return dict(cast("dict[str, Any]", data)) if isinstance(data, dict) else {}


def _replaced(items: list[object], index: int, rest: list[str], value: object) -> list[object]:
    item = assigned(items[index], rest, value, None) if rest else value
    return [*items[:index], item, *items[index + 1 :]]


def _chosen(family: type[Part], section: dict[str, Any]) -> type[Part]:
    try:
        return find(family, section.get("name"))
    except PydanticCustomError:
        return family  # validation will say that there is no such part


def _default(model: type[BaseModel] | None, field: str) -> object:
    info = model.model_fields.get(field) if model else None
    default = info.get_default(call_default_factory=True, validated_data={}) if info else None
    return default if isinstance(default, Part) and default is not PydanticUndefined else None
