"""Configurations as text: YAML files, and ``a.b=c`` overrides."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, cast

import yaml
from pydantic_core import PydanticCustomError, PydanticUndefined
from yaml.composer import ComposerError

from starling.algorithms.registry import Part, find
from starling.orchestrator.config.paths import model_in
from starling.orchestrator.config.yaml_loader import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Loader
from starling.orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydantic import BaseModel


def read(path: Path) -> dict[str, Any]:
    """Read the mapping that a file holds.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    text = _text(path)
    try:
        raw = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: is not a configuration: {_problem(error)}") from None
    if not isinstance(raw, dict):
        what = "it is empty" if raw is None else f"it is a {type(raw).__name__}"
        raise ConfigError(f"{path}: must be a mapping of keys (algorithm, task, …); {what}")
    return cast("dict[str, Any]", raw)


def _text(path: Path) -> str:
    """Return the text of a configuration; a pipe, a device or a large file is refused before it is read."""
    try:
        # Without waiting for somebody to write, should it be a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 - a descriptor
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: cannot be read: it is no file")
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: is not a configuration: it is larger than {MAX_BYTES // 1024} kB")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _parse(text: str) -> object:
    try:
        return yaml.load(text, Loader)  # noqa: S506 - derived from the safe loader
    except RecursionError:  # PyYAML's scanner, in a text of brackets alone
        raise yaml.YAMLError(f"more than {MAX_DEPTH} levels inside of one another") from None


def split(text: str) -> tuple[tuple[str, ...], object]:
    """Split ``a.b=c`` into path and value; the value is YAML, or a text where it is not.

    Raises:
        ConfigError: it is not written like that.
    """
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {cut(text)}: write it as key.path=value")
    if len(path) > MAX_DEPTH or len(value) > MAX_BYTES:
        raise ConfigError(f"--set {cut(text)}: is longer than a key or value can be")
    try:
        return path, _parse(value)
    except ComposerError as error:
        raise ConfigError(f"--set {cut(text)}: {_problem(error)}") from None
    except yaml.YAMLError:
        return path, value


def check_bounds(data: object, source: str) -> None:
    """Refuse plain data with more levels or values than a file may have.

    Raises:
        ConfigError: there are more, as when a mapping holds itself.
    """
    values, waiting = 0, [(0, data)]
    while waiting:
        depth, value = waiting.pop()
        values += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{source}: has more than {MAX_DEPTH} levels inside of one another")
        if values > MAX_VALUES:
            raise ConfigError(f"{source}: has more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting += [(depth + 1, one) for one in cast("dict[object, object]", value).values()]
        elif isinstance(value, list | tuple):
            waiting += [(depth + 1, one) for one in cast("Sequence[object]", value)]


def cut(text: str, limit: int = 200) -> str:
    """Return ``text`` with its middle left out if it is longer than ``limit``."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 4 :]}"


def assigned(data: object, path: Sequence[str], value: object, model: type[BaseModel] | None) -> dict[str, Any]:
    """Return a copy of ``data``, from which ``model`` is made, with ``value`` at ``path``.

    A bare name on the path becomes the section of that name, and a missing part becomes the default part. So
    ``algorithm.outer.lr=0.4`` needs no ``algorithm.outer.name``.
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
