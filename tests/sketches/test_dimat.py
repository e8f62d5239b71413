"""DIMAT: a permuted copy is the model itself, and models of different origin can be merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starling.actors.tasks.digits import Digits
from starling.algorithms.api import Node
from starling.algorithms.seeds import generator
from tests.sketches.dimat import DIMAT, match, permuted
from tests.toys import Ran, replica, simulate

WIDTHS = (24, 20)


class Watched(nn.Module):
    """Three layers, and what goes on inside; no unit is dead, as rectified ones may be."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, WIDTHS[0]), nn.Linear(*WIDTHS), nn.Linear(WIDTHS[1], 10)])

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        first = torch.tanh(self.layers[0](inputs))
        second = torch.tanh(self.layers[1](first))
        return self.layers[2](second), (first, second)


class WatchedDigits(Digits):
    def build(self) -> nn.Module:
        return Watched()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(module(batch[0])[0], batch[1])

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        outputs = module(batch[0])[0]
        return {
            "loss": F.cross_entropy(outputs, batch[1]),
            "accuracy": (outputs.argmax(1) == batch[1]).double().mean(),
        }


def orders(seed: int) -> list[Tensor]:
    return [torch.randperm(width, generator=generator("order", seed, width)) for width in WIDTHS]


class Shuffled(DIMAT):
    """All nodes begin with one function, each with its hidden units in an order of its own."""

    def init(self, node: Node) -> None:
        node.parameters.copy_(permuted(node.parameters, node.layout, orders(node.id)))


def run(kind: type[DIMAT], *, nodes: int, rounds: int = 1, seed: int = 0, **keys: Any) -> Ran:
    return simulate(
        algorithm={"name": f"{kind.__module__}:{kind.__qualname__}"} | keys,
        task={"name": "tests.sketches.test_dimat:WatchedDigits"},
        nodes=nodes,
        rounds=rounds,
        seed=seed,
        optimizer={"name": "sgd", "lr": 0.2},
        evaluation={"every_rounds": 0},
    )


def accuracies(ran: Ran) -> list[float]:
    metrics: Any = [one.local["metrics"] for one in ran.replicas.values()]
    return [one["accuracy"] for one in metrics]


def test_a_permuted_copy_is_the_model_itself():
    task = WatchedDigits()
    merged = run(Shuffled, nodes=3, steps=0)
    start = replica(task=task).parameters
    for node, one in merged.replicas.items():
        torch.testing.assert_close(one.parameters, permuted(start, one.layout, orders(node)), rtol=1e-6, atol=1e-7)
    averaged = run(Shuffled, nodes=3, steps=0, matched=False)
    own = permuted(start, averaged.replicas[0].layout, orders(0))
    assert (averaged.replicas[0].parameters - own).norm() > 0.3 * own.norm()


def test_permuted_is_the_same_function_and_match_undoes_it():
    one = replica(task=WatchedDigits())
    inputs = torch.rand(200, 64, generator=generator("inputs"))
    outputs, units = one.module()(inputs)
    other = permuted(one.parameters, one.layout, orders(5))
    assert not torch.equal(other, one.parameters)
    same, moved = one.module(at=other)(inputs)
    torch.testing.assert_close(same, outputs, rtol=1e-5, atol=1e-6)
    own, theirs = ([unit.detach() for unit in layers] for layers in (units, moved))
    assert torch.equal(permuted(other, one.layout, match(own, theirs)), one.parameters)
    assert [order.tolist() for order in match(own, own)] == [list(range(width)) for width in WIDTHS]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_models_of_different_origin_are_merged(seed: int):
    """After one merge of models from starts of their own, matching keeps far more of what they have learnt."""
    keys: dict[str, Any] = {"own_start": True, "steps": 1000, "topology": "complete"}
    matched, averaged = (accuracies(run(DIMAT, nodes=3, seed=seed, matched=one, **keys)) for one in (True, False))
    assert min(matched) > max(averaged) + 0.1


def test_it_learns_on_a_ring():
    assert min(accuracies(run(DIMAT, nodes=5, rounds=6, own_start=True, steps=40))) > 0.85
