"""The JSON schema of a configuration, with which editors complete and check the YAML file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pydantic.json_schema import GenerateJsonSchema

from starling.algorithms.registry import Part, table
from starling.orchestrator.config.reference import comments_of, summary_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import core_schema

_FAMILY = "x-starling-family"
_IMPORT_PATH = {"type": "string", "pattern": r"^[\w.]+:[\w.]+$", "description": "A class of yours: module:Class."}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a model, with a definition for each family of parts that it holds."""
    families: dict[str, type[Part]] = {}
    definitions: dict[str, Any] = {}
    schema = _schema(model, families, definitions)
    while missing := [name for name in families if name not in definitions]:
        for name in missing:
            parts = table(families[name])
            definitions[name] = {}  # it may hold itself
            named = [_named(part, key, families, definitions) for key, part in parts.items()]
            own = {"type": "object", "properties": {"name": _IMPORT_PATH}, "required": ["name"]}
            definitions[name] = {"anyOf": [{"enum": list(parts)}, *named, _IMPORT_PATH, own]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"$defs": definitions}


def _named(part: type[Part], name: str, families: dict[str, type[Part]], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(part, families, definitions)
    required = ["name", *schema.get("required", [])]
    properties = {"name": {"const": name}} | schema.get("properties", {})
    return schema | {"properties": properties, "required": required, "description": summary_of(part)}


def _schema(model: type[BaseModel], families: dict[str, type[Part]], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one model; collect the families and definitions that it refers to."""

    class Generator(GenerateJsonSchema):
        def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
            cls = cast("type[BaseModel]", schema["cls"])
            if cls is not model and issubclass(cls, Part):
                family = cls.family.replace(" ", "_")  # part of an address
                families[family] = cls
                return {_FAMILY: family}
            found = super().model_schema(schema)
            properties = found.get("properties", {})
            for name, comment in comments_of(cls).items():
                if comment and name in properties:
                    properties[name].setdefault("description", comment)
            if "name" in properties and cls is not model:
                return {"anyOf": [found, {"type": "string"}]}  # a section that may be written as its name alone
            return found

    found = _referring(model.model_json_schema(schema_generator=Generator))
    definitions |= found.pop("$defs", {})
    return found


def _referring(data: Any) -> Any:  # noqa: ANN401 - plain data of any shape
    """Return a schema with references in place of families."""
    if isinstance(data, list):
        return [_referring(one) for one in data]
    if not isinstance(data, dict):
        return data
    fields = {key: _referring(value) for key, value in data.items() if key != _FAMILY}
    return fields | ({"$ref": f"#/$defs/{data[_FAMILY]}"} if _FAMILY in data else {})
