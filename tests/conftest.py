"""Shared by all tests: reproducible property tests, and torch left as it was found."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

# The same examples in every run: a failure that a change did not cause is of no use to who made the change.
settings.register_profile("starling", derandomize=True, max_examples=100, deadline=None, database=None)
settings.load_profile("starling")

# The key with which run directories are marked: not that of whoever runs the tests.
os.environ.setdefault("STARLING_STATE_DIR", tempfile.mkdtemp(prefix="starling-state-"))

# Where tests record runs is their own business.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)
