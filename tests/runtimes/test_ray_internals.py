"""Ray's private parts are in one module, which knows the versions of Ray that have them."""

from __future__ import annotations

import logging
import re

import pytest
import ray

from starling.orchestrator.runtimes.cluster import ray_internals
from tests.paths import ROOT

PRIVATE = re.compile(r"^\s*(?:from|import) ray(?:\.\w+)*?(?:\._\w+|\.core\b|\.experimental\b| import _)", re.MULTILINE)
ROOMS = ("actors", "algorithms", "orchestrator", "tune_spaces")


def test_no_other_module_uses_private_parts_of_ray():
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ROOMS
        for path in (ROOT / folder).rglob("*.py")
        if PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert users == {"orchestrator/runtimes/cluster/ray_internals.py"}


def test_the_installed_ray_is_one_of_those_that_are_known():
    first, last = ray_internals.FIRST, ray_internals.LAST
    assert first <= tuple(map(int, ray.__version__.split(".")[:2])) <= last


@pytest.mark.parametrize(
    ("version", "is_known"),
    [
        ("2.60.0", True),
        ("2.60.3", True),
        ("2.61.0", False),
        ("3.0.0rc1", False),
        ("2.9.3", False),
        ("2.53.0", True),
        ("2.52.9", False),
    ],
)
def test_another_ray_is_one_warning(version: str, is_known: bool, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "starling"):
        ray_internals.check_version(version)
    lines = [record.getMessage() for record in caplog.records]
    known = f"Ray {version} was not tried with this Starling; if it fails, install one of 2.53 to 2.60"
    assert lines == ([] if is_known else [known])
