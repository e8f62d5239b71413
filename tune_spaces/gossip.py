"""Search spaces of ``algorithms.gossip``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

from starling.tune_spaces.common import LR

if TYPE_CHECKING:
    from starling.tune_spaces import Space

_MIXING: Space = LR | {
    "algorithm.steps": tune.choice([1, 5, 10, 20]),
    "algorithm.topology": tune.choice(["ring", "exponential", "complete"]),
}

SPACES: dict[str, Space] = {
    "dsgd": _MIXING | {"algorithm.order": tune.choice(["atc", "cta"])},
    "gradient_tracking": _MIXING,
    "random_walk": {
        "algorithm.lr": tune.loguniform(0.05, 5.0),
        "algorithm.step_exponent": tune.uniform(0.55, 1.0),
        "algorithm.repulsion": tune.uniform(0.0, 10.0),
    },
    "single_merge": LR
    | {
        "algorithm.steps": tune.choice([10, 30, 100]),
        "algorithm.neighbors": tune.uniform(0.1, 2.0),
        "algorithm.schedule": tune.choice(["fixed", "linear", "cosine"]),
    },
}
