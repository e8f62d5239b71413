"""Parts: named, frozen pieces of configuration, and the tables in which their names are looked up.

An algorithm, a task, a codec, an outer optimizer are all *parts*: frozen pydantic models whose fields are
hyper-parameters and nothing else. These fields are also the YAML keys, the ``--set a.b=c`` paths, the search space's
keys and the tracked params. A part belongs to a *family* (``algorithm``, ``codec``, …) and has a name in it::

    class OuterOptimizer(Part, family="outer optimizer", catalog="starling.algorithms.outer"): ...
    class Nesterov(OuterOptimizer, name="nesterov"): lr: PositiveFloat = 0.7

Wherever a field is annotated with the family (``outer: OuterOptimizer``) the configuration may say ``{name: nesterov,
lr: 0.4}``, or just ``nesterov``. Names come from three places: the family's catalog, installed entry points in the
group ``starling.<family>``, and import paths (``my_module:MyTask``). The catalog is a package of ours; its modules are
imported when a name is first looked up.

A part is written under a name that every other process finds it by. That is a short name only for classes of the
catalog and of entry points. ``class Mine(Algorithm, name="diloco")`` in a user's module is written as
``my_module:Mine``: under ``diloco`` the nodes of a cluster would train the built-in. A name of its own that such a
class has (``name="mine"``) can be used where its module is imported already.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import logging
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from starling.algorithms.errors import ImportPathError, StarlingError
from starling.algorithms.import_paths import is_importable, load, missing_methods, path_of, quietly, raised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import ModelWrapValidatorHandler

_LOG = logging.getLogger("starling")


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
            _HOMES[family] = catalog or cls.__module__
            return
        # Not inherited: a class derived from a named part is another one, and is found by its import path.
        cls.part_name = ""
        if name is not None and f"{cls.__module__}.".startswith(f"{_HOMES[cls.family]}."):
            known = _TABLES[cls.family].get(name)
            # A module that is reloaded defines its class again; two different classes of one name are a mistake.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                message = f"{cls.family} {name!r} is defined by {known.__module__} and by {cls.__module__}"
                raise TypeError(message)
            _TABLES[cls.family][name] = cls
            cls.part_name = name
            return
        if name is not None:
            _ALIASES[cls.family, name] = cls
        if not is_importable(cls):
            _CARRIED[path_of(cls)] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn ``name``, ``{name: …, …}`` or a class into the part that it names."""
        if isinstance(value, cls):
            return value
        if isinstance(value, type) and issubclass(value, cls):
            value = {"name": value.part_name or path_of(value)}
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
        except (PydanticCustomError, StarlingError):
            raise
        except Exception as error:
            if target.part_name:
                raise
            # A user's class may raise anything from its validators.
            text = f"{name} cannot be made from these fields: {raised(error)}"
            raise PydanticCustomError("import", "{text}", {"text": text}) from error

    @model_serializer(mode="plain")
    def _dump(self) -> dict[str, Any]:
        return {"name": self.name} | {field: getattr(self, field) for field in type(self).model_fields}

    @property
    def name(self) -> str:
        """Return the name of this part in a configuration; an import path for parts outside the tables."""
        return type(self).part_name or path_of(type(self))


P = TypeVar("P", bound=Part)
_TABLES: dict[str, dict[str, type[Part]]] = {}
_HOMES: dict[str, str] = {}
"""Package or module, by family, whose classes have short names; looking up a name imports it."""
_ALIASES: dict[tuple[str, str], type[Part]] = {}
"""Classes of other modules, by family and name. Only processes that have imported those modules know the names."""
_BROKEN: dict[str, dict[str, str]] = {}
"""Reason why an installed part cannot be used, by family and name."""
_CARRIED: dict[str, type[Part]] = {}
"""Classes of a script, a notebook or a function, by their paths: no other process can import them."""


def find(family: type[P], name: object) -> type[P]:
    """Return the part of ``family`` (a family's base class) that is called ``name``.

    Raises:
        PydanticCustomError: no such part; the message lists the nearest names, or all of them.
    """
    if not isinstance(name, str):
        raise PydanticCustomError("bad_name", "{text}", {"text": f"name must be a text, not {name!r}"})
    if family.part_name and name == family.part_name:
        return family
    known = {} if ":" in name else table(family)
    part = imported(family, name) if ":" in name else known.get(name, _ALIASES.get((family.family, name)))
    if part is None:
        text = _BROKEN[family.family].get(name)
        if text is None:
            hint = f" (did you mean {':'.join(name.rsplit('.', 1))}?)" if "." in name else did_you_mean(name, known)
            text = f"no {family.family} is called {name!r}{hint}"
        raise PydanticCustomError("unknown_name", "{text}", {"text": text})
    if not issubclass(part, family):
        raise PydanticCustomError("unknown_name", "{text}", {"text": f"{name!r} is not a {family.__name__}"})
    return part


def table(family: type[P]) -> dict[str, type[P]]:
    """Return all parts of ``family``, built in and installed, sorted by name."""
    _load(family.family, family.catalog)
    return cast("dict[str, type[P]]", dict(sorted(_TABLES[family.family].items())))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean a or b?)`` for near names, else the list of all names, or nothing without names."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f" (there are: {', '.join(names)})" if names else ""


def _choices(family: type[Part]) -> str:
    return did_you_mean("", table(family))


@functools.cache
def _load(family: str, catalog: str) -> None:
    """Import the modules in which the parts of a family are defined.

    An installed part that cannot be used is an error for whoever asks for its name, and for nobody else.
    """
    if catalog:
        package = importlib.import_module(catalog)
        # Each is imported here before the walk goes into it: the walk itself would pass over packages that are broken.
        for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{catalog}."):
            importlib.import_module(module.name)
    ours, broken = dict(_TABLES[family]), _BROKEN.setdefault(family, {})
    offers: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=f"starling.{family.replace(' ', '_')}"):
        if entry.value not in (other.value for other in offers.setdefault(entry.name, [])):
            offers[entry.name].append(entry)
    for name, entries in offers.items():
        origins = [entry.dist.name if entry.dist else "an installed package" for entry in entries]
        if name in ours:
            _LOG.warning("the %s %r of %s is not used: Starling has one of that name", family, name, origins[0])
        elif len(entries) > 1:
            paths = " and ".join(f"{origin} ({entry.value})" for origin, entry in zip(origins, entries, strict=True))
            broken[name] = f"the {family} {name!r} is offered by {paths}: write the import path of the one you mean"
        else:
            try:
                part = quietly(entries[0].load)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - an installed package's import may raise anything
                cannot = f"{entries[0].value} cannot be loaded: {raised(error)}"
                broken[name] = f"{origins[0]} offers the {family} {name!r}, but {cannot}"
                continue
            if not (isinstance(part, type) and issubclass(part, Part) and part.family == family):
                broken[name] = f"{origins[0]} offers the {family} {name!r}, but {entries[0].value} is none"
                continue
            _TABLES[family][name] = part
            part.part_name = part.part_name or name


def imported(family: type[P], path: str) -> type[P]:
    """Return the class of ``family`` at ``module:Class``.

    Raises:
        PydanticCustomError: there is none; one line that says why.
    """
    part: object = _CARRIED.get(path)
    if part is None:
        try:
            part = load(path)
        except ImportPathError as error:
            raise PydanticCustomError("import", "{text}", {"text": str(error)}) from error.__cause__
    if not (isinstance(part, type) and issubclass(part, family)):
        text = f"{path!r} is not a {family.__name__}: derive it from {family.__module__}.{family.__name__}"
        raise PydanticCustomError("import", "{text}", {"text": text})
    missing = missing_methods(part)
    if missing is not None:
        raise PydanticCustomError("import", "{text}", {"text": missing})
    return part


def problems(errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the messages of a ``ValidationError``'s errors, those of parts inside of parts too."""
    found: list[str] = []
    for error in errors:
        nested = error["type"] == "nested"
        found += problems(error["ctx"]["errors"]) if nested else [str(error["msg"])]
    return found


def carried(dump: object) -> dict[str, type[Part]]:
    """Return those classes of a dumped configuration that no other process can import, by their paths.

    They have to be sent along, and be given to ``carry`` before the configuration is read there.
    """
    if isinstance(dump, dict):
        fields = cast("dict[str, object]", dump)
        name = fields.get("name")
        found = {name: _CARRIED[name]} if isinstance(name, str) and name in _CARRIED else {}
        inner: Iterable[object] = fields.values()
    else:
        found, inner = {}, cast("Iterable[object]", dump) if isinstance(dump, list | tuple) else ()
    for value in inner:
        found |= carried(value)
    return found


def carry(parts: Mapping[str, type[Part]]) -> None:
    """Let configurations name classes that another process has sent."""
    _CARRIED.update(parts)
