"""One row for each algorithm: its configuration on its reference problem, and the loss that it must reach there."""

from __future__ import annotations

from typing import Any

from tests.conformance import Case

DIGITS: dict[str, Any] = {
    "task": {"name": "digits", "model": {"name": "mlp", "width": 32}},
    "optimizer": {"name": "sgd", "lr": 0.3},
    "cluster": {"nodes": {"target": 4}},
}

CASES = (
    Case(DIGITS | {"algorithm": {"name": "fedavg"}, "rounds": 12}, reaches=0.25),
    Case(DIGITS | {"algorithm": {"name": "diloco", "inner_steps": 10}, "rounds": 12}, reaches=0.25),
)
