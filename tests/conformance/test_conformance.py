"""Every algorithm against every check."""

from __future__ import annotations

from typing import Any

import pytest

from starling.algorithms.api import Algorithm
from starling.algorithms.registry import table
from tests.cases import CASES
from tests.conformance import CHECKS, Case


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case: Case, check: Any):
    check(case)


def test_every_algorithm_has_a_case():
    ours = {name for name, kind in table(Algorithm).items() if kind.__module__.startswith("starling.algorithms.")}
    assert ours == {case.name for case in CASES}
