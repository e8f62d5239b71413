"""Parts: named, frozen pieces of configuration, and the tables in which their names are looked up.

An algorithm, a task, a codec, an outer optimizer are all *parts*: frozen pydantic models whose fields are
hyper-parameters and nothing else. The same fields are the YAML keys, the ``--set a.b=c`` paths, the search space's
keys and the tracked params. A part belongs to a *family* (``algorithm``, ``codec``, …) and has a name in it::

    class OuterOptimizer(Part, family="outer optimizer", catalog="algorithms.outer"): ...
    class Nesterov(OuterOptimizer, name="nesterov"): lr: PositiveFloat = 0.7

Wherever a field is annotated with the family (``outer: OuterOptimizer``) the configuration may say
``{name: nesterov, lr: 0.4}``, or just ``nesterov``. Names come from three places: the family's catalog (a package of
ours, imported when a name is first looked up), installed entry points in the group ``starling.<family>``, and import
paths (``my_module:MyTask``).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ModelWrapValidatorHandler


class Part(BaseModel):
    """A frozen, named piece of configuration; see the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    family: ClassVar[str] = ""
    catalog: ClassVar[str] = ""
    part_name: ClassVar[str] = ""

    def __init_subclass__(
        cls, *, name: str | None = None, family: str | None = None, catalog: str | None = None
    ) -> None:
        """Accept the class arguments that ``__pydantic_init_subclass__`` evaluates when the fields are known."""
        del name, family, catalog
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(  # pyright: ignore[reportIncompatibleMethodOverride] - a misspelt argument is an error
        cls, *, name: str | None = None, family: str | None = None, catalog: str | None = None
    ) -> None:
        """Enter a family (``family`` and ``catalog``) or a member of one (``name``) into the tables."""
        if family is not None:
            cls.family, cls.catalog, cls.part_name = family, catalog or "", ""
            _TABLES.setdefault(family, {})
        if name is not None:
            known = _TABLES[cls.family].get(name)
            # A module that is reloaded defines its class again; two different classes of one name are a mistake.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                message = f"{cls.family} {name!r} is defined by {known.__module__} and by {cls.__module__}"
                raise TypeError(message)
            _TABLES[cls.family][name] = cls
        if family is None:
            # Not inherited: a class derived from a named part is another one, and is found by its import path.
            cls.part_name = name or ""

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn ``name`` or ``{name: …, …}`` into the part that it names."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return handler(value)
        fields = {str(key): field for key, field in cast("dict[object, Any]", value).items()}
        name = fields.pop("name", None)
        if name is None:
            if "family" in vars(cls):  # the family itself, not a member of it
                raise PydanticCustomError("missing_name", "{text}", {"text": f"name is missing{_choices(cls)}"})
            return handler(fields)
        target = find(cls, name)
        if target is cls:
            return handler(fields)
        try:
            return target.model_validate(fields)
        except ValidationError as error:
            # A ValidationError raised inside a validator loses its places; they are kept here for the reader of errors.
            context = {"part": name, "part_class": target, "errors": error.errors()}
            raise PydanticCustomError("nested", "{part} is invalid", context) from None

    @model_serializer(mode="plain")
    def _dump(self) -> dict[str, Any]:
        return {"name": self.name} | {field: getattr(self, field) for field in type(self).model_fields}

    @property
    def name(self) -> str:
        """The name under which the configuration finds this part; an import path for parts outside the tables."""
        cls = type(self)
        return cls.part_name or f"{cls.__module__}:{cls.__qualname__}"


P = TypeVar("P", bound=Part)
_TABLES: dict[str, dict[str, type[Part]]] = {}


def find(family: type[P], name: object) -> type[P]:
    """Return the part of ``family`` (a family's base class) that is called ``name``.

    Raises:
        PydanticCustomError: no such part; the message lists the nearest names, or all of them.
    """
    if not isinstance(name, str):
        raise PydanticCustomError("bad_name", "{text}", {"text": f"name must be a text, not {name!r}"})
    if family.part_name and name == family.part_name:
        return family
    part = _import(family, name) if ":" in name else table(family).get(name)
    if part is None:
        text = f"no {family.family} is called {name!r}{did_you_mean(name, table(family))}"
        raise PydanticCustomError("unknown_name", "{text}", {"text": text})
    if not issubclass(part, family):
        raise PydanticCustomError("unknown_name", "{text}", {"text": f"{name!r} is not a {family.__name__}"})
    return part


def table(family: type[P]) -> dict[str, type[P]]:
    """All parts of ``family`` by name, ours and installed ones, sorted by name."""
    _load(family.family, family.catalog)
    return cast("dict[str, type[P]]", dict(sorted(_TABLES[family.family].items())))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean a or b?)``, or the list of what there is, or nothing."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f" (there are: {', '.join(names)})" if names else ""


def _choices(family: type[Part]) -> str:
    return did_you_mean("", table(family))


@functools.cache
def _load(family: str, catalog: str) -> None:
    """Import the modules in which the parts of a family are defined."""
    if catalog:
        package = importlib.import_module(catalog)
        for module in pkgutil.iter_modules(getattr(package, "__path__", []), f"{catalog}."):
            importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group=f"starling.{family.replace(' ', '_')}"):
        try:
            part = entry.load()
        except Exception as error:
            origin = entry.dist.name if entry.dist else "an installed package"
            text = f"{origin} offers the {family} {entry.name!r}, but {entry.value} cannot be loaded: {error}"
            raise PydanticCustomError("import", "{text}", {"text": text}) from error
        _TABLES[family].setdefault(entry.name, part)


def _import(family: type[P], path: str) -> type[P]:
    """Import ``module:Class``; what goes wrong becomes one line."""
    module, _, attribute = path.partition(":")
    try:
        part = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        text = f"cannot import {path!r}: {error}; it must be importable from here (PYTHONPATH, or the current folder)"
        raise PydanticCustomError("import", "{text}", {"text": text}) from None
    except AttributeError:
        raise PydanticCustomError("import", "{text}", {"text": f"module {module!r} has no {attribute!r}"}) from None
    if not (isinstance(part, type) and issubclass(part, family)):
        text = f"{path!r} is not a {family.__name__}: derive it from {family.__module__}.{family.__name__}"
        raise PydanticCustomError("import", "{text}", {"text": text})
    return part
