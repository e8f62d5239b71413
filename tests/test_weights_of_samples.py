"""Who counts for how much: FedAvg's weights when others' samples are drawn, and losses over samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.data import Place, Segment
from actors.replica import Replica
from actors.setup import RunData, build_replicas
from actors.tasks import TensorSamples
from actors.tickets import mean_loss
from algorithms.api import AllReduce, Train, TrainReport
from algorithms.federated import FedAvg
from orchestrator.config import parse


def weight_of(algorithm: FedAvg, num_samples: int, trained: int) -> float:
    """With what weight a node contributes that owns ``num_samples`` and has trained on ``trained``."""
    zeros = torch.zeros(2)
    node: Any = SimpleNamespace(
        shared={"model": zeros, "outer": None}, parameters=zeros, buffers=torch.empty(0), participates=True
    )
    node.num_samples, node.round = num_samples, 0
    program = algorithm.round(node).__await__()
    assert isinstance(next(program), Train)
    exchange = program.send(TrainReport(0.5, trained, 3, 0.0))
    assert isinstance(exchange, AllReduce)
    program.close()
    return exchange.weight


@pytest.mark.parametrize(
    ("fields", "trained", "weight"),
    [
        ({}, 34, 34.0),
        ({}, 48, 48.0),  # three batches of others' samples, where its own part has 34
        ({"epochs": 3}, 102, 34.0),
        ({}, 0, 1.0),  # nothing was left for it: it cannot be left out if it is alone
        ({"steps": 5}, 80, 34.0),
        ({"weighting": "uniform"}, 48, 1.0),
    ],
    ids=str,
)
def test_a_node_weighs_what_it_has_trained_on(fields: dict[str, Any], trained: int, weight: float):
    assert weight_of(FedAvg.model_validate(fields), 34, trained) == weight


def replicas(sizes: list[int], nodes: int) -> list[Replica]:
    config = parse({"algorithm": "fedavg", "task": "digits", "data": {"batch_size": 4}})
    pixels = torch.rand(sum(sizes), 64, generator=torch.Generator().manual_seed(0))
    samples = TensorSamples(pixels, torch.zeros(sum(sizes), dtype=torch.int64))
    data = RunData(samples, samples, torch.arange(sum(sizes)).split(sizes))
    spec = config.replica_spec()
    return build_replicas(range(nodes), spec, data, [torch.device("cpu")] * nodes)


def test_a_node_beyond_the_parts_counts_what_it_is_handed():
    owner, _, spare = replicas([9, 5], 3)
    assert (owner.num_samples, spare.num_samples) == (9, 1)
    spare.replan(Place((Segment(0, 0, 5, 9), Segment(1, 0, 2, 5))))
    assert spare.num_samples == 7
    owner.replan(Place((Segment(1, 0, 2, 5),)))
    assert owner.num_samples == 9


def test_the_loss_of_a_round_is_the_mean_over_its_samples():
    (node,) = replicas([9], 1)
    losses: list[torch.Tensor] = []
    loss = node.bench.loss

    def noted(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        losses.append(loss(batch))
        return losses[-1]

    node.bench.loss = noted
    report = node.train(Train(epochs=1), SimpleNamespace(is_set=lambda: False))
    expected = sum(float(one.detach()) * count for one, count in zip(losses, (4, 4, 1), strict=True)) / 9
    assert (report.num_samples, report.loss) == (9, pytest.approx(expected, rel=1e-6))


def test_losses_count_by_samples():
    assert mean_loss([]) is None
    assert mean_loss([(1.0, 30), (5.0, 10)]) == 2.0
    assert mean_loss([(1.0, 0), (5.0, 0)]) == 3.0  # nothing is known
