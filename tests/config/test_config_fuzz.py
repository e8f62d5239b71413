"""Whatever stands in a configuration, it is read, or refused in a few lines that name the file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from starling.orchestrator.config.schema import load
from starling.orchestrator.errors import ConfigError
from tests.config_mutations import EXAMPLES, mutations

if TYPE_CHECKING:
    from pathlib import Path


def check(path: Path, text: str) -> bool:
    """Whether the configuration is accepted; it fails if what is said of it is no help."""
    path.write_text(text, encoding="utf-8")
    try:
        load(path)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 10, text
        assert all(0 < len(line) < 1000 for line in lines), text
        assert all(str(path) in line for line in lines), text
        return False
    return True


@pytest.mark.parametrize(
    "count",
    [
        300,
        pytest.param(
            int(os.environ.get("N", "5000")), marks=[pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]
        ),
    ],
)
def test_a_mutated_configuration_is_read_or_refused(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    accepted = 0
    for name, text in mutations(int(os.environ.get("SEED", "0")), count):
        try:
            accepted += check(tmp_path / "c.yaml", text)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}\n{text}") from error
    assert 0 < accepted < count
