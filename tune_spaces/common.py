"""Domains that several families share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray import tune

if TYPE_CHECKING:
    from starling.tune_spaces import Space

LR: Space = {"optimizer.lr": tune.loguniform(1e-4, 1e-1)}
"""Learning rate of the nodes' local optimizer."""

OUTER: Space = {"algorithm.outer.lr": tune.uniform(0.2, 1.0), "algorithm.outer.momentum": tune.uniform(0.6, 0.95)}
"""Around Nesterov's 0.7 and 0.9 of DiLoCo (arXiv:2311.08105, section 3.2)."""

SERVER_SGD: Space = {
    "algorithm.outer.lr": tune.loguniform(0.1, 3.0),
    "algorithm.outer.momentum": tune.choice([0.0, 0.5, 0.9]),
}
"""A server's step on the averaged difference; 1 and 0 are plain averaging."""
