"""Search spaces of ``algorithms.coded``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

if TYPE_CHECKING:
    from starling.tune_spaces import Space

SPACES: dict[str, Space] = {
    "gradient_coding": {
        "algorithm.outer.lr": tune.loguniform(1e-3, 1.0),
        "algorithm.outer.momentum": tune.choice([0.0, 0.5, 0.9]),
        "algorithm.patience_s": tune.loguniform(0.01, 1.0),
    },
}
