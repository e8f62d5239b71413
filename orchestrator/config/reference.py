"""Descriptions of algorithms, tasks and other parts: fields, defaults, and the sections of their docstrings."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
import types
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from starling.algorithms.registry import Part, table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

SECTIONS = ("Deviations", "Elasticity", "Cost", "Reference")

_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}): ", re.MULTILINE)
_WORDS: dict[object, str] = {int: "int", float: "float", str: "text", bool: "bool", type(None): "null"}


@dataclass(frozen=True)
class FieldDescription:
    """A hyper-parameter."""

    name: str
    """Path of the field below its part, as ``--set`` takes it."""
    type: str
    default: Any
    """Plain data; ``None`` also where there is none, see ``required``."""
    required: bool
    description: str


@dataclass(frozen=True)
class Description:
    """A part: an algorithm or a task."""

    name: str
    summary: str
    text: str
    """The docstring between its first line and its sections."""
    sections: dict[str, str]
    fields: list[FieldDescription]
    choices: dict[str, dict[str, list[FieldDescription]]]
    """Field → name → fields, for fields that hold one of several parts."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def describe(part: type[Part]) -> Description:
    """Read a part's class, and the docstring of the module that defines it."""
    text = inspect.cleandoc(sys.modules[part.__module__].__doc__ or part.__doc__ or "")
    body, *rest = _SECTION.split(text)
    first, _, more = body.strip().partition("\n")
    choices = {
        name: {member: _fields(cls) for member, cls in table(family).items()} for name, family in _families(part)
    }
    return Description(
        name=part.part_name or f"{part.__module__}:{part.__qualname__}",
        summary=first.strip(),
        text=more.strip("\n"),
        sections={title: _paragraph(rest[index + 1]) for index, title in enumerate(rest) if index % 2 == 0},
        fields=_fields(part),
        choices=choices,
    )


def summary_of(part: type[Part]) -> str:
    """Return the first line of a part's documentation."""
    text = inspect.cleandoc(sys.modules[part.__module__].__doc__ or part.__doc__ or "")
    return text.partition("\n")[0]


def written(part: Part, left_out: Collection[str] = ()) -> str:
    """Return a part as a configuration has it: ``dirichlet (alpha: 0.5)``; fields that are None are left out."""
    texts = [f"{key}: {_written(value)}" for key, value in part if value is not None and key not in left_out]
    return f"{part.name} ({', '.join(texts)})" if texts else part.name


def _written(value: object) -> str:
    if isinstance(value, Part):
        return written(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_written(one) for one in cast('tuple[object, ...]', value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _paragraph(text: str) -> str:
    """Join the lines of a section's first paragraph."""
    return " ".join(text.partition("\n\n")[0].split())


# --- fields ---------------------------------------------------------------------------------------------------------


def _fields(model: type[BaseModel], prefix: str = "") -> list[FieldDescription]:
    """Describe all fields; those of plain sections have their path as name."""
    comments = comments_of(model)
    found: list[FieldDescription] = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not issubclass(inner, Part):
            found += _fields(inner, f"{prefix}{name}.")
            continue
        default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        found.append(
            FieldDescription(
                name=f"{prefix}{name}",
                type=type_text(info),
                default=_plain(default),
                required=info.is_required(),
                description=comments.get(name, ""),
            )
        )
    return found


def _families(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[Part]]]:
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Part):
            yield f"{prefix}{name}", inner
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _families(inner, f"{prefix}{name}.")


def type_text(info: FieldInfo) -> str:
    """Write a field's type for people: ``int > 0``, ``samples | uniform``, ``null``."""
    return _type(info.annotation, info.metadata)


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:  # noqa: ANN401 - an annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], (*metadata, *annotation.__metadata__))
    if origin is not None:
        return _composed(origin, arguments, metadata)
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return " | ".join(table(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return f"{_WORDS.get(annotation, getattr(annotation, '__name__', str(annotation)))}{_range(metadata)}"


def _composed(origin: Any, arguments: tuple[Any, ...], metadata: Iterable[Any]) -> str:  # noqa: ANN401 - as above
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(one, metadata if one is not type(None) else ()) for one in arguments)
    if origin is dict:
        return f"{{{_type(arguments[0])}: {_type(arguments[1])}}}"
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(_type(one) for one in arguments)}]"
    return f"list of {_type(arguments[0])}"


def _range(metadata: Iterable[Any]) -> str:
    lower = upper = ""
    for bound in _bounds(metadata):
        match bound:
            case annotated_types.Gt(gt):
                lower = f" > {gt}"
            case annotated_types.Ge(ge):
                lower = f" ≥ {ge}"
            case annotated_types.Lt(lt):
                upper = f" < {lt}"
            case annotated_types.Le(le):
                upper = f" ≤ {le}"
            case _:
                pass
    return f"{lower}{',' if lower and upper else ''}{upper}"


def _bounds(metadata: Iterable[Any]) -> Iterator[Any]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from one.metadata
        else:
            yield one


def _plain(value: object) -> object:
    """Return a default as plain data, a part as a configuration has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the description of each field: the comment on its line in the source, or the text below it."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls not in (BaseModel, Part):
            try:
                found |= _comments_in(inspect.cleandoc(f"\n{inspect.getsource(cls)}"))
            except (OSError, SyntaxError):  # no source, as in an interactive session
                continue
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        text = comments.get(statement.end_lineno or 0, "")
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = text or inspect.cleandoc(str(following.value.value)).replace("\n", " ")
        found[statement.target.id] = text.removeprefix("noqa").strip()
    return found
