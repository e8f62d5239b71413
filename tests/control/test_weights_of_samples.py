"""Who counts for how much: FedAvg's weights when others' samples are drawn, and losses over samples."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.data import Place, Segment
from starling.actors.host.build import RunData, build_replicas
from starling.actors.replica.node_data import NodeData
from starling.actors.replica.replica import Replica
from starling.actors.tasks import Task, TensorSamples
from starling.actors.wire.tickets import mean_loss
from starling.algorithms.api import AllReduce, Train, TrainReport
from starling.algorithms.federated.fedavg import FedAvg
from starling.orchestrator.config.schema import parse
from tests.toys import attempt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
    loss = node.bench.loss.of_batch

    def noted(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        losses.append(loss(batch))
        return losses[-1]

    node.bench.loss.of_batch = noted
    report = node.trainer.train(Train(epochs=1), SimpleNamespace(is_set=lambda: False))
    expected = sum(float(one.detach()) * count for one, count in zip(losses, (4, 4, 1), strict=True)) / 9
    assert (report.num_samples, report.loss) == (9, pytest.approx(expected, rel=1e-6))


def test_losses_count_by_samples():
    assert mean_loss([]) is None
    assert mean_loss([(1.0, 30), (5.0, 10)]) == 2.0
    assert mean_loss([(1.0, 0), (5.0, 0)]) == 3.0  # nothing is known


class Points(Task):
    """The mean of the points is the optimum: every step can be done by hand."""

    def train_samples(self, num_nodes: int) -> TensorSamples:
        generator = torch.Generator().manual_seed(7)
        return TensorSamples(torch.randn(POINTS, 3, generator=generator))

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(1, 3))

    def build(self) -> nn.Module:
        module = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(module.weight)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (weight,) = module.parameters()
        return 0.5 * (weight - batch[0]).square().sum(1).mean()


POINTS = 61


@pytest.mark.parametrize(
    "events",
    [
        [{"kind": "late_join", "node": 2, "round": 5}],
        [{"kind": "kill", "node": 2, "round": number, "phase": "train"} for number in range(1, 9)],
    ],
    ids=["who comes late", "who dies again and again"],
)
def test_the_model_of_a_run_in_which_samples_change_hands(events: list[Any], monkeypatch: pytest.MonkeyPatch):
    """Each round's mean is by what each node has trained on, which differs from what it owns while others are away."""
    drawn: dict[int, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    draw = NodeData.draw

    def noted(self: NodeData, size: int) -> NDArray[np.int64]:
        indices = draw(self, size)
        drawn[self._round][self._node].append(torch.from_numpy(indices.copy()))
        return indices

    monkeypatch.setattr(NodeData, "draw", noted)
    ran = attempt(
        {"algorithm": {"name": "fedavg", "epochs": 1}, "task": f"{__name__}:Points"},
        nodes=3,
        rounds=9,
        optimizer={"name": "sgd", "lr": 0.3},
        data={"batch_size": 4},
        evaluation={"every_rounds": 0},
        network={"start_s": 0.01, "latency_ms": 300},
        faults={"events": events},
        cluster={"nodes": {"min": 1, "target": 3}},
    )
    assert ran.error is None
    commits = {one["round"]: one["committed"] for one in ran.sought("commit")}
    assert any(len(who) == 2 for who in commits.values())

    points = Points().train_samples(3).tensors[0].double()
    x = torch.zeros(3, dtype=torch.float64)
    unlike_own = 0
    for number in range(9):
        models: list[Tensor] = []
        weights: list[int] = []
        for node in commits[number]:
            y = x.clone()
            for batch in drawn[number][node]:
                y -= 0.3 * (y - points[batch].mean(0))
            models.append(y)
            weights.append(sum(map(len, drawn[number][node])))
        x = (torch.tensor(weights)[:, None] * torch.stack(models)).sum(0) / sum(weights)
        unlike_own += weights != [ran.replicas[node].num_samples for node in commits[number]]
    assert unlike_own >= 2
    torch.testing.assert_close(ran.replicas[0].parameters.double(), x, rtol=0, atol=1e-5)
