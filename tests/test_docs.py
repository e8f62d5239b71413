"""What the pages say of tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def named(page: Path) -> set[tuple[str, str]]:
    """The tests that a page names: file and function."""
    return set(NAMED.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path):
    missing = []
    for file, name in sorted(named(page)):
        path = ROOT / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not re.search(rf"^def {name}\(", text, re.MULTILINE):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_each_row_of_the_failure_semantics_names_its_test():
    page = ROOT / "docs" / "failure-semantics.md"
    tables = [
        block for block in page.read_text(encoding="utf-8").split("\n\n") if block.startswith("| event | phase |")
    ]
    assert len(tables) >= 2
    for table in tables:
        for row in table.splitlines()[2:]:
            assert NAMED.search(row), row
