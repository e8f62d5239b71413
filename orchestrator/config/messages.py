"""Pydantic's errors as one line each, for the person who wrote the file."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from pydantic import BaseModel

from starling.algorithms.registry import Part, did_you_mean, table
from starling.orchestrator.config.paths import model_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Place: TypeAlias = tuple[str, ...]

_PLAIN = frozenset({"unknown_name", "missing_name", "bad_name", "import"})
_SECTION_EXPECTED = frozenset({"model_type", "model_attributes_type", "dict_type", "mapping_type"})


def explain(errors: Iterable[Mapping[str, Any]], root: type[BaseModel], at: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield the place and the line of each error; ``root`` was validated, and stands in the file at ``at``."""
    for error in errors:
        location = tuple(step for step in error["loc"] if step != "[key]")
        place = (*at, *(str(step) for step in location))
        if error["type"] == "nested":
            # A part inside of a part: pydantic alone would have lost the places in it.
            context = error["ctx"]
            yield from explain(context["errors"], context["part_class"], place)
            continue
        yield place, _line(error, location, place, root)


def _line(error: Mapping[str, Any], location: tuple[Any, ...], place: Place, root: type[BaseModel]) -> str:
    key = ".".join(place)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    owner = model_at(root, location[:-1])
    if kind in ("extra_forbidden", "invalid_key"):
        names = list(owner.model_fields) if owner else []
        return f"{key} is not a field of {_title(owner)}{did_you_mean(place[-1], names)}"
    if kind == "missing":
        return f"{key} is missing{_choices(model_at(root, location))}"
    if kind in _PLAIN:
        return f"{key}: {message}"
    if kind in _SECTION_EXPECTED:
        return f"{key} must be {_expected(model_at(root, location))}, not {shown(error['input'])}"
    if kind == "not_built" and message.startswith(f"{place[-1]}: "):
        return f"{key}{message.removeprefix(place[-1])}"
    message = message.partition(", unable to parse")[0].partition(", got a number with")[0]
    message = (
        message.replace("valid tuple", "list").replace("valid array", "list").replace("valid dictionary", "section")
    )
    given = error["input"]
    if kind == "string_type" and isinstance(given, bool | int | float | dt.date):
        message += "; put it in quotes if it is a text"
    tail = "" if isinstance(given, dict | list | BaseModel) or "got" in message else f", got {shown(given)}"
    if not key:
        return message  # of the whole file; names its keys itself
    return f"{key} {message}{tail}" if message.startswith(("should", "must", "is ")) else f"{key}: {message}"


def shown(value: object) -> str:
    """Write a value as YAML has it, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if isinstance(value, dt.date) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _expected(model: type[BaseModel] | None) -> str:
    if model is None:
        return "a section of keys"
    if issubclass(model, Part):
        return f"a name, or a section with a name{_choices(model)}"
    return f"a section of keys ({', '.join(model.model_fields)})"


def _choices(model: type[BaseModel] | None) -> str:
    return did_you_mean("", table(cast("type[Part]", model))) if model and issubclass(model, Part) else ""


def _title(model: type[BaseModel] | None) -> str:
    if model is None:
        return "this section"
    if issubclass(model, Part):
        return model.part_name or model.__name__
    name = model.__name__.removesuffix("Config").lower()
    return name or "the configuration"
