"""Search spaces of ``algorithms.federated``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

from starling.tune_spaces.common import LR, SERVER_SGD

if TYPE_CHECKING:
    from starling.tune_spaces import Space

_LOCAL: Space = LR | {"algorithm.epochs": tune.choice([1, 2, 5])}

SPACES: dict[str, Space] = {
    "fedavg": _LOCAL | SERVER_SGD,
    # Of what is sent: how many of the nodes take part, and in which form their models travel.
    "fedavg_bytes": LR
    | {
        "algorithm.fraction": tune.choice([0.25, 0.5, 1.0]),
        "algorithm.epochs": tune.choice([1, 2, 5]),
        "algorithm.codec": tune.choice(["identity", "bf16", "int8"]),
    },
    # μ: the paper tries 0.001, 0.01, 0.1 and 1 (arXiv:1812.06127, section 5.1).
    "fedprox": _LOCAL | {"algorithm.mu": tune.loguniform(1e-3, 1.0)},
    "scaffold": _LOCAL | {"algorithm.outer.lr": tune.loguniform(0.3, 1.5)},
}
