"""The mutants: plausible mistakes, each with the tests that are meant to notice it; one ``.toml`` for each area."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One mistake in one file."""

    area: str
    file: str
    """Relative to the repository."""
    what: str
    """The mistake in words."""
    old: str
    """What stands in the file, once."""
    new: str
    tests: tuple[str, ...]
    """Files of tests, relative to the repository."""
    keyword: str
    """As pytest's ``-k``; empty: all tests of the files."""

    def apply(self, text: str) -> str:
        """Return the file's ``text`` with the mistake in it.

        Raises:
            ValueError: what is to be replaced is not there exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.area}.toml: in {self.file} {self.old!r} is there {count} times, and must be once")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def load_mutants(folder: Path = Path(__file__).parent) -> list[Mutant]:
    """Read the mutants of all areas, in the order of the files' names and then of the lists."""
    return [mutant for path in sorted(folder.glob("*.toml")) for mutant in _of_area(path)]


def _of_area(path: Path) -> list[Mutant]:
    return [
        Mutant(
            area=path.stem,
            file=group["file"],
            what=one["what"],
            old=one["old"],
            new=one["new"],
            tests=tuple(one.get("tests", group["tests"])),
            keyword=one.get("k", group.get("k", "")),
        )
        for group in tomllib.loads(path.read_text(encoding="utf-8"))["group"]
        for one in group["mutants"]
    ]
