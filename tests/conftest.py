"""Shared by all tests: reproducible property tests, and torch left as it was found."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
from hypothesis import settings

from tests.budgets import Budgets

# The same examples in every run: a failure that a change did not cause is of no use to who made the change.
settings.register_profile("starling", derandomize=True, max_examples=100, deadline=None, database=None)
settings.load_profile("starling")

# The key with which run directories are marked: not that of whoever runs the tests.
if "STARLING_STATE_DIR" not in os.environ:
    os.environ["STARLING_STATE_DIR"] = tempfile.mkdtemp(prefix="starling-state-")  # pytest's workers inherit it
    atexit.register(shutil.rmtree, os.environ["STARLING_STATE_DIR"], ignore_errors=True)

# Where tests record runs is their own business.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist report to the process that began them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budgets(config))


@pytest.fixture(autouse=True)
def _draws_no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are drawn only where a test looks at them: matplotlib takes longer than most of the runs."""
    if request.node.get_closest_marker("pictures") is None:
        from starling.orchestrator.records import run_directory

        monkeypatch.setattr(run_directory, "_draw", lambda *_: None)
