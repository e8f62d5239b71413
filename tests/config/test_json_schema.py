"""``starling schema``: what it accepts is what a configuration may be, and editors find the descriptions in it."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from starling.algorithms.api import Algorithm
from starling.algorithms.registry import table
from starling.orchestrator.cli.main import app
from starling.orchestrator.config.schema import parse
from tests.cases import CASES
from tests.conformance import Case
from tests.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0, result.output
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def plain(data: object) -> Any:
    """As JSON has it: keys are texts."""
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Any):
    validator().validate(plain(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_configurations_are_valid_as_written_and_as_resolved(case: Case):
    validator().validate(plain(case.config))
    validator().validate(plain(parse(case.config | {"tracking": "none"}).dump()))


@pytest.mark.parametrize(
    "change",
    [
        {"roundz": 3},
        {"rounds": 0},
        {"algorithm": {"name": "diloco", "inner_stepz": 3}},
        {"algorithm": {"name": "diloco", "inner_steps": "many"}},
        {"algorithm": "dilocco"},
        {"cluster": {"nodes": {"target": 0}}},
    ],
)
def test_mistakes_are_found(change: dict[str, Any]):
    good = {"algorithm": "diloco", "task": "digits"}
    validator().validate(good)
    assert not validator().is_valid(good | change)


def test_classes_of_a_users_own_are_accepted():
    own = {"algorithm": {"name": "my_module:Mine", "width": 3}, "task": "my_module:Task", "optimizer": "adamw"}
    validator().validate(own)


def test_every_algorithm_and_every_comment_is_in_it():
    schema: dict[str, Any] = validator().schema  # type: ignore[assignment] - jsonschema has no types
    options = {one["properties"]["name"]["const"]: one for one in schema["$defs"]["algorithm"]["anyOf"][1:-2]}
    assert list(options) == list(table(Algorithm))
    assert options["diloco"]["properties"]["inner_steps"]["description"].startswith("H")
    assert schema["properties"]["rounds"]["description"] == "Rounds that are committed before the run is over."
