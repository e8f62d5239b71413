"""Damaged and foreign run directories: the right result or one line, nothing outside is written to, and nobody waits.

More seeds: ``python -m tests.damage FIRST LAST``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import damage

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[damage.Original]:
    return damage.originals(tmp_path_factory.mktemp("originals"))


def check(made: list[damage.Original], seeds: range, folder: Path) -> None:
    tried = [damage.attempt(made, seed, folder) for seed in seeds]
    assert [one for one in tried if not one.is_good] == []
    assert {"right", "refused"} <= {one.outcome for one in tried}


def test_some_damage(made: list[damage.Original], tmp_path: Path):
    check(made, range(12), tmp_path)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_much_damage(made: list[damage.Original], tmp_path: Path):
    check(made, range(1000, 1300), tmp_path)
