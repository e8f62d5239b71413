"""One row for each algorithm: its configuration on its reference problem, and the loss that it must reach there."""

from __future__ import annotations

from typing import Any

from tests.conformance import Case

DIGITS: dict[str, Any] = {
    "task": {"name": "digits", "model": {"name": "mlp", "width": 32}},
    "optimizer": {"name": "sgd", "lr": 0.3},
    "cluster": {"nodes": {"target": 4}},
}

QUADRATIC: dict[str, Any] = {"task": {"name": "quadratic", "dimension": 4}, "cluster": {"nodes": {"target": 4}}}
"""Its optimum, over four nodes, has a loss of 0.66."""

CASES = (
    Case(DIGITS | {"algorithm": {"name": "fedavg"}, "rounds": 12}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "fedavg", "aggregator": "geometric_median"}, "rounds": 12}, reaches=0.25),
    Case(
        DIGITS | {"algorithm": {"name": "fedavg", "aggregator": {"name": "multi_krum", "f": 0, "m": 3}}, "rounds": 14},
        reaches=0.3,
    ),
    Case(DIGITS | {"algorithm": {"name": "fedprox", "mu": 0.1}, "rounds": 16}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "scaffold"}, "rounds": 12}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "diloco", "inner_steps": 10}, "rounds": 12}, reaches=0.25),
    Case(
        DIGITS
        | {"algorithm": {"name": "streaming_diloco", "inner_steps": 20, "fragments": 2, "pattern": "size"}}
        | {"rounds": 24},
        reaches=0.25,
    ),
    Case(DIGITS | {"algorithm": {"name": "eager_diloco", "inner_steps": 10}, "rounds": 16}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "edit", "inner_steps": 10, "warmup_steps": 10}, "rounds": 14}, reaches=0.25),
    # By the clock, but on every machine with the steps that there may be at most: the same bits on Ray.
    Case(
        DIGITS
        | {"algorithm": {"name": "a_edit", "interval_s": 0.5, "min_total_steps": 4, "max_steps": 10}}
        | {"rounds": 14},
        reaches=0.25,
    ),
    Case(DIGITS | {"algorithm": {"name": "local_sgd"}, "rounds": 16}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "ddp", "inner_steps": 10}, "rounds": 18}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "dsgd", "steps": 10}, "rounds": 20}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "gradient_tracking", "steps": 10}, "rounds": 20}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "single_merge", "steps": 10, "neighbors": 1.0}, "rounds": 20}, reaches=0.25),
    Case(
        DIGITS | {"algorithm": {"name": "fedbuff", "buffer_size": 4, "steps": 10}, "rounds": 24},
        reaches=0.25,
        bytes_within=0.1,  # by what is on its way when a run ends
    ),
    Case(
        DIGITS | {"algorithm": {"name": "async_diloco", "inner_steps": 10, "lr": 0.2, "momentum": 0.9}, "rounds": 64},
        reaches=0.25,
        bytes_within=0.1,  # by what is on its way when a run ends
    ),
    Case(
        DIGITS
        | {
            "algorithm": {"name": "random_walk", "lr": 2.0, "visits_exponent": 0.8, "step_exponent": 0.6},
            "rounds": 100,
        },
        reaches=0.3,
        bytes_within=0.15,  # by how often the token stays where it is
    ),
    Case(
        DIGITS
        | {"algorithm": {"name": "gradient_coding", "outer": {"name": "sgd", "lr": 0.3, "momentum": 0.9}}}
        | {"rounds": 60},
        reaches=0.25,
    ),
    Case(
        DIGITS
        | {
            "algorithm": {
                "name": "just_one_byte",
                "lr": 0.2,
                "samples": 8,
                "distribution": "rademacher",
                "one_sided": True,
            }
        }
        | {"rounds": 80, "data": {"batch_size": 64}},
        reaches=0.8,
    ),
    Case(QUADRATIC | {"algorithm": {"name": "mezo", "lr": 0.1, "samples": 4}, "rounds": 60}, reaches=1.0),
    Case(
        QUADRATIC
        | {
            "algorithm": {
                "name": "fzoos",
                "lr": 0.1,
                "features": 50,
                "steps": 2,
                "candidates": 9,
                "neighbors": 20,
                "surrogate_queries": 9,
                "surrogate_candidates": 12,
            }
        }
        | {"rounds": 10},
        reaches=1.0,
    ),
    Case(QUADRATIC | {"algorithm": {"name": "cbo", "particles": 20}, "rounds": 40}, reaches=1.5),
)
