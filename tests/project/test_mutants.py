"""The list of mutants stays true: each still says what would be a mistake, and where."""

from __future__ import annotations

import pytest

from tests.mutants.catalog import Mutant, load_mutants
from tests.paths import ROOT


def test_every_mutant_applies() -> None:
    """What is replaced is there once, another thing is put there, and its tests are there."""
    texts: dict[str, str] = {}
    problems: list[str] = []
    for mutant in load_mutants():
        if mutant.file not in texts:
            texts[mutant.file] = (ROOT / mutant.file).read_text(encoding="utf-8")
        try:
            mutant.apply(texts[mutant.file])
        except ValueError as error:
            problems.append(f"{mutant}: {error}")
        if mutant.old == mutant.new:
            problems.append(f"{mutant}: changes nothing")
        problems += [f"{mutant}: there is no {name}" for name in mutant.tests if not (ROOT / name).is_file()]
    assert not problems, "\n".join([*problems, "the code has changed: put what stands there now into tests/mutants"])


def test_mutants_are_told_apart_by_their_names() -> None:
    names = [str(mutant) for mutant in load_mutants()]
    assert len(set(names)) == len(names)
    assert len(names) >= 150


@pytest.mark.parametrize("text", ["a = 1", "b = 1; b = 1"])
def test_a_mutant_that_is_not_there_once_is_refused(text: str) -> None:
    mutant = Mutant("here", "file.py", "what", old="b = 1", new="b = 2", tests=(), keyword="")
    with pytest.raises(ValueError, match=r"here\.toml: in file\.py 'b = 1' is there"):
        mutant.apply(text)
