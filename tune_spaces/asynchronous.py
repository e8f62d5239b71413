"""Search spaces of ``algorithms.asynchronous``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

from starling.tune_spaces.common import LR, SERVER_SGD

if TYPE_CHECKING:
    from starling.tune_spaces import Space

SPACES: dict[str, Space] = {
    "fedbuff": LR
    | SERVER_SGD
    | {
        "algorithm.buffer_size": tune.choice([2, 4, 10]),
        "algorithm.steps": tune.choice([5, 10, 20]),
        "algorithm.staleness_exponent": tune.uniform(0.0, 1.0),
    },
    "async_diloco": LR
    | {
        "algorithm.inner_steps": tune.choice([10, 20, 50]),
        "algorithm.lr": tune.uniform(0.1, 1.0),
        "algorithm.momentum": tune.uniform(0.5, 0.95),
    },
}
