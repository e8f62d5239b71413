"""What the pages say of tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT

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


def test_no_merge_has_left_its_marks():
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    folders = ("docs", "tests", "examples", "algorithms", "actors", "orchestrator", "tune_spaces", "benchmarks")
    paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    texts = [path for path in paths if path.suffix in {".md", ".py", ".yaml", ".toml", ".txt", ".json"}]
    assert [str(path) for path in texts if marks.search(path.read_text(encoding="utf-8", errors="ignore"))] == []
    assert len(texts) > 500


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def table_of_benchmarks() -> dict[str, list[str]]:
    """What is measured, and its row: ours, reference, ratio, promised, kept."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    return {row[0]: row[1:] for row in map(cells, text.splitlines()) if len(row) == 6}


def test_each_figure_of_the_readme_is_in_the_table_of_benchmarks():
    """Every row of its table, to the letter; and every measured second that its text names."""
    table = table_of_benchmarks()
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    rows = [row for row in map(cells, text.splitlines()) if len(row) == 4][2:]
    assert len(rows) >= 8
    for what, *figures in rows:
        assert figures == table[what][2:], what
    measured = {figure for row in table.values() for cell in row for figure in re.findall(r"[\d.]+", cell)}
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert set(re.findall(r"\b0\.\d+", prose)) <= measured


def test_the_readme_shows_each_promise_that_is_not_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    missed = [row for row in table_of_benchmarks().values() if row[4] == "**no**"]
    assert missed
    for ours, _, ratio, *_ in missed:
        assert (ratio or ours) in text
