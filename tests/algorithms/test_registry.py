"""Parts and the tables of their names, installed ones included."""

import pytest
from pydantic import ValidationError

from starling.algorithms import registry
from starling.algorithms.api import Algorithm
from starling.algorithms.outer import SGD, Nesterov, OuterOptimizer

PLUGIN = """
from starling.algorithms.outer import SGD

class Careful(SGD):
    lr: float = 0.5
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of one module with one entry point, for this test."""

    def do(value: str, family: str = "outer_optimizer") -> None:
        (tmp_path / "plugin_module.py").write_text(PLUGIN)
        folder = tmp_path / "starling_plugin-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: starling-plugin\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[starling.{family}]\ncareful = {value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(registry._TABLES, "outer optimizer", dict(registry._TABLES["outer optimizer"]))
        registry._load.cache_clear()

    yield do
    registry._load.cache_clear()


def test_an_installed_part_is_found_by_its_entry_points_name(install):
    install("plugin_module:Careful")
    part = OuterOptimizer.model_validate({"name": "careful", "momentum": 0.3})
    assert (type(part).__name__, part.lr, part.model_dump()["momentum"]) == ("Careful", 0.5, 0.3)


def test_an_installed_part_that_cannot_be_loaded_is_named(install):
    install("plugin_module:Missing")
    message = "starling-plugin offers the outer optimizer 'careful', but plugin_module:Missing cannot be loaded"
    with pytest.raises(ValidationError, match=message):
        OuterOptimizer.model_validate("careful")


def test_an_installed_part_that_cannot_be_loaded_is_no_error_for_others(install):
    install("plugin_module:Missing")
    assert OuterOptimizer.model_validate("sgd") == SGD()


def test_a_name_alone_and_a_mapping_are_the_same():
    for value in ("nesterov", {"name": "nesterov"}):
        assert OuterOptimizer.model_validate(value) == Nesterov()


def test_a_dump_is_valid_input_again():
    algorithm = Algorithm.model_validate({"name": "diloco", "inner_steps": 7, "outer": {"name": "sgd", "lr": 2.0}})
    assert Algorithm.model_validate(algorithm.model_dump(mode="json")) == algorithm


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nesterow", r"no outer optimizer is called 'nesterow' \(did you mean nesterov\?\)"),
        ({"lr": 1.0}, r"name is missing \(there are: adam, nesterov, sgd\)"),
        ({"name": 3}, "name must be a text, not 3"),
        ("no_such_module:X", "cannot import 'no_such_module:X'"),
        ("math:pi", "'math:pi' is not a OuterOptimizer"),
        ("starling.algorithms.outer:Nothing", "module 'starling.algorithms.outer' has no 'Nothing'"),
    ],
)
def test_names_that_cannot_be_found(value, message):
    with pytest.raises(ValidationError, match=message):
        OuterOptimizer.model_validate(value)


def test_two_classes_of_one_name_are_a_mistake():
    with pytest.raises(TypeError, match=r"'sgd' is defined by starling\.algorithms\.outer and by"):
        type("Other", (SGD,), {"__module__": "starling.algorithms.outer"}, name="sgd")
