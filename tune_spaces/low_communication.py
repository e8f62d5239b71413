"""Search spaces of ``algorithms.low_communication``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

from starling.tune_spaces.common import LR, OUTER

if TYPE_CHECKING:
    from starling.tune_spaces import Space

_STEPS: Space = {"algorithm.inner_steps": tune.choice([5, 10, 20, 50])}

SPACES: dict[str, Space] = {
    "diloco": LR | OUTER,
    # Loss against bytes: how often, and in which form.
    "diloco_bytes": LR
    | OUTER
    | {
        "algorithm.inner_steps": tune.choice([6, 12, 24, 48]),
        "algorithm.codec": tune.choice(["identity", "bf16", "int8", "fp4"]),
    },
    "streaming_diloco": LR
    | OUTER
    | {
        "algorithm.merge_alpha": tune.uniform(0.3, 1.0),
        "algorithm.overlap_steps": tune.choice([0, 1, 2, 5]),
    },
    "eager_diloco": LR | OUTER | _STEPS,
    "edit": LR | OUTER | {"algorithm.temperature": tune.loguniform(0.3, 3.0)},
    "a_edit": LR | OUTER | {"algorithm.temperature": tune.loguniform(0.3, 3.0)},
    "local_sgd": LR | _STEPS,
    "ddp": LR | {"optimizer.weight_decay": tune.loguniform(1e-4, 1e-1)},
}
