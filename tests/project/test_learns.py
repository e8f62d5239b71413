"""Every algorithm learns ``examples/noniid.yaml`` with nothing but its name set; docs/algorithms.md has the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from starling.algorithms.api import Algorithm
from starling.algorithms.registry import table
from starling.orchestrator import api
from tests.paths import ROOT

EXAMPLE = ROOT / "examples/noniid.yaml"

LEAST = {
    **dict.fromkeys(["fedavg", "fedprox", "scaffold", "local_sgd"], 0.85),
    **dict.fromkeys(["diloco", "streaming_diloco", "eager_diloco", "edit", "a_edit"], 0.8),
    "single_merge": 0.55,
    **dict.fromkeys(["fedbuff", "random_walk"], 0.85),
    "async_diloco": 0.8,
    **dict.fromkeys(["ddp", "dsgd", "gradient_tracking", "gradient_coding"], 0.75),
    # By losses alone, of which they need many more.
    **dict.fromkeys(["just_one_byte", "mezo", "cbo"], 0.25),
    "fzoos": 0.2,
}
"""The least accuracy on the held-out images, well below what was measured; 0.1 is chance."""

ENOUGH = {"diloco": 3, "edit": 6, "single_merge": 6, "eager_diloco": 12, "a_edit": 6, "fzoos": 4}
"""Rounds, of those whose rounds are long; all others do those of the example."""


def test_no_algorithm_is_left_out():
    built_in = {name for name, kind in table(Algorithm).items() if kind.__module__.startswith("starling.algorithms.")}
    assert built_in == LEAST.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LEAST)
def test_learns(name: str, tmp_path: Path):
    others = ["tracking=none", "evaluation.every_rounds=0", *([f"rounds={ENOUGH[name]}"] if name in ENOUGH else [])]
    summary = api.simulate(EXAMPLE, [f"algorithm={name}", *others], run_dir=tmp_path / "run")
    assert summary.metrics["accuracy"] >= LEAST[name]
