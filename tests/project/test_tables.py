"""An algorithm is a file, a row in tests/cases.py, a search space and a test; the tables on the pages follow."""

from __future__ import annotations

import re

import pytest

from starling import tune_spaces
from starling.algorithms.api import Algorithm
from starling.algorithms.registry import table
from tests import tables
from tests.cases import CASES
from tests.paths import ROOT


def test_tables_are_as_the_code_says():
    assert not tables.stale(), "run make docs-tables"


@pytest.mark.parametrize("name", table(Algorithm))
def test_an_algorithm_stands_in_all_its_places(name: str):
    kind = table(Algorithm)[name]
    assert name in {case.name for case in CASES}, f"{name} has no row in tests/cases.py"
    assert name in tune_spaces.table(), f"{name} has no search space in tune_spaces/{tables.family_of(kind)}.py"
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "algorithms").glob("test_*.py"))
    named = re.compile(rf'\b{kind.__name__}\b|"{name}"')
    assert any(named.search(text) for text in texts), f"{name} has no test of its update in tests/algorithms/"


@pytest.mark.parametrize("name", table(Algorithm))
def test_the_page_of_an_algorithm_has_its_sections(name: str):
    page = tables.doc(table(Algorithm)[name].__module__)
    places = [page.find(f"\n{section}:") for section in ("Deviations", "Elasticity", "Cost", "Reference")]
    assert -1 not in places, f"{name}: the docstring needs Deviations, Elasticity, Cost and Reference"
    assert places == sorted(places)
    assert re.match(r"[^:\n]+: [^\n]+\.\n\n", page), f"{name}: the first line is its name, a colon and a summary"


def test_a_page_without_its_table_is_refused():
    with pytest.raises(AssertionError, match="families: make docs-tables"):
        tables.written("# Title\n", "families")
    with pytest.raises(AssertionError, match="/families"):
        tables.written("<!-- families: make docs-tables -->\n| old |\n", "families")


def test_a_table_is_replaced_and_the_rest_stays():
    page = "before\n<!-- parts: make docs-tables -->\n| old |\n<!-- /parts -->\nafter\n"
    new = tables.written(page, "parts")
    assert new.startswith("before\n<!-- parts")
    assert new.endswith("<!-- /parts -->\nafter\n")
    assert "`int8`" in new
    assert tables.written(new, "parts") == new
