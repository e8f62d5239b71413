"""Metrics: a user's own, and those of each node where nodes' models differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from starling import simulate
from starling.actors.tasks import Metric
from starling.actors.tasks.metrics import Brier, TopKAccuracy
from starling.actors.tasks.quadratic import Quadratic
from starling.orchestrator.config.schema import parse
from starling.orchestrator.errors import ConfigError, SettingsError
from starling.orchestrator.records.observers import RoundRecord
from tests.observed import record

BASE: dict[str, Any] = {
    "rounds": 3,
    "algorithm": {"name": "dsgd", "steps": 5},
    "task": "digits",
    "optimizer": {"lr": 0.1},
    "cluster": {"nodes": {"target": 4}},
    "tracking": "none",
}


class Majority(Metric):
    """How often the commonest answer is given: one of a user's own."""

    def of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1).bincount().max() / len(outputs)


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_top_k_and_brier_by_hand():
    outputs = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    targets = torch.tensor([0, 0, 2])
    assert float(TopKAccuracy(k=1).of(outputs, targets)) == pytest.approx(1 / 3)
    assert float(TopKAccuracy(k=2).of(outputs, targets)) == pytest.approx(2 / 3)
    assert float(TopKAccuracy(k=9).of(outputs, targets)) == 1
    assert TopKAccuracy(k=2).label == "top_2"
    even = torch.zeros(4, 2)
    assert float(Brier().of(even, torch.tensor([0, 1, 1, 0]))) == pytest.approx(0.5)
    sure = torch.tensor([[50.0, -50.0]])
    assert float(Brier().of(sure, torch.tensor([0]))) == pytest.approx(0)
    assert float(Brier().of(sure, torch.tensor([1]))) == pytest.approx(2)


def test_a_metric_of_ones_own_is_reported(tmp_path: Path):
    task = {
        "name": "digits",
        "extra_metrics": ["tests.control.test_evaluation:Majority", {"name": "top_k", "k": 3}, "brier"],
    }
    summary = simulate(BASE | {"task": task}, run_dir=tmp_path / "run")
    assert list(summary.metrics) == ["loss", "accuracy", "majority", "top_3", "brier"]
    assert 0.1 <= summary.metrics["majority"] < 1
    assert summary.metrics["top_3"] > summary.metrics["accuracy"]
    plain = simulate(BASE, run_dir=tmp_path / "plain")
    assert plain.digest == summary.digest
    assert plain.metrics["loss"] == summary.metrics["loss"]


def test_a_task_without_predictions_has_none_to_report(tmp_path: Path):
    raw = BASE | {"task": {"name": "quadratic", "extra_metrics": ["brier"]}}
    with pytest.raises(SettingsError, match="task.extra_metrics: the task quadratic gives no predictions to work them"):
        simulate(raw, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="no metric is called 'f1'"):
        parse(BASE | {"task": {"name": "digits", "extra_metrics": ["f1"]}})
    with pytest.raises(ValidationError):
        TopKAccuracy(k=0)


def test_each_node_is_evaluated_where_models_differ(tmp_path: Path):
    raw = BASE | {"evaluation": {"per_node": True}}
    simulate(raw, run_dir=tmp_path / "run")
    for one in rounds_of(tmp_path / "run"):
        nodes = one["node_metrics"]
        assert sorted(nodes) == ["0", "1", "2", "3"]
        assert len({values["loss"] for values in nodes.values()}) == 4
    # Evaluating them costs no byte and changes no bit.
    plain = simulate(BASE, run_dir=tmp_path / "plain")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["digest"] == plain.digest
    assert [one["node_metrics"] for one in rounds_of(tmp_path / "plain")] == [None] * 3


def test_a_node_s_metrics_are_those_of_its_own_model(tmp_path: Path):
    # All mix the same zeros, and then each takes a step on a quadratic of its own.
    task = Quadratic(dimension=3, condition=1.0, heterogeneity=2.0)
    raw = BASE | {
        "rounds": 1,
        "algorithm": {"name": "dsgd", "steps": 1, "order": "cta"},
        "task": {"name": "quadratic", "dimension": 3, "condition": 1.0, "heterogeneity": 2.0},
        "optimizer": {"lr": 0.5, "precision": "fp64"},
        "evaluation": {"per_node": True},
    }
    summary = simulate(raw, run_dir=tmp_path / "run")
    (only,) = rounds_of(tmp_path / "run")
    found = {int(node): values["loss"] for node, values in only["node_metrics"].items()}
    # One step of half the gradient from zero: θ_m = c_m / 2.
    places = {node: task.center(node) / 2 for node in range(4)}
    assert found == {node: pytest.approx(task.objective(place, 4)) for node, place in places.items()}
    mean = torch.stack(list(places.values())).mean(0)
    assert summary.metrics["loss"] == pytest.approx(task.objective(mean, 4))


def test_replicas_are_evaluated_once(tmp_path: Path):
    raw = BASE | {"algorithm": {"name": "fedavg"}, "evaluation": {"per_node": True}}
    simulate(raw, run_dir=tmp_path / "run")
    assert [one["node_metrics"] for one in rounds_of(tmp_path / "run")] == [None] * 3


def test_nodes_that_are_never_at_rest_are_refused():
    with pytest.raises(
        ConfigError, match="evaluation.per_node: fedbuff is asynchronous; its nodes are never all at rest"
    ):
        parse(BASE | {"algorithm": "fedbuff", "evaluation": {"per_node": True}})


def test_the_spread():
    one: RoundRecord = record(1, node_metrics={0: {"loss": 1.0, "accuracy": 0.5}, 3: {"loss": 0.25, "accuracy": 0.75}})
    assert one.spread == {"loss": (0.25, 1.0), "accuracy": (0.5, 0.75)}
    assert record(1).spread == {}
