"""Search spaces of ``algorithms.zeroth_order``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

if TYPE_CHECKING:
    from starling.tune_spaces import Space

_SPSA: Space = {
    # From fine-tuning (arXiv:2305.17333: 1e-6 to 1e-3) to small models from scratch.
    "algorithm.lr": tune.loguniform(1e-6, 0.3),
    "algorithm.eps": tune.loguniform(1e-4, 1e-2),
    "algorithm.samples": tune.choice([1, 4, 8]),
}

SPACES: dict[str, Space] = {
    "just_one_byte": _SPSA | {"algorithm.distribution": tune.choice(["gaussian", "rademacher"])},
    "mezo": _SPSA,
    "fzoos": {
        "algorithm.lr": tune.loguniform(1e-3, 1.0),
        "algorithm.length": tune.loguniform(0.1, 10.0),
        "algorithm.radius": tune.loguniform(1e-3, 0.1),
        "algorithm.correction": tune.uniform(0.0, 1.0),
    },
    "cbo": {
        "algorithm.alpha": tune.loguniform(10.0, 1e4),
        "algorithm.diffusion": tune.uniform(0.1, 1.5),
        "algorithm.dt": tune.loguniform(0.01, 0.3),
    },
}
