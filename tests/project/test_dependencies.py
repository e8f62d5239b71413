"""Ranges of dependencies are wide, and both of their ends that are tried are written down."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

REQUIRED = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
]


def pinned(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("requirement", REQUIRED, ids=lambda one: one.name)
def test_a_range_begins_with_the_oldest_that_is_tried_and_ends_with_a_major_version(requirement: Requirement):
    name = canonicalize_name(requirement.name)
    bounds = {one.operator: Version(one.version) for one in requirement.specifier}
    assert bounds.keys() == {">=", "<"}
    oldest, newest = pinned("constraints-oldest.txt")[name], pinned("constraints.txt")[name]
    assert oldest.release[: len(bounds[">="].release)] == bounds[">="].release
    assert requirement.specifier.contains(oldest)
    assert requirement.specifier.contains(newest)
    assert bounds["<"] == Version(str(newest.major + 1)), "the next major version"
