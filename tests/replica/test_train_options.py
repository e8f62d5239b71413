"""A ``Train``'s own batch size, rate and parameters, and the end of its rule."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import Interrupted
from starling.algorithms.api import Train
from starling.algorithms.errors import ProgramError
from starling.algorithms.rules import DataBatch, GradientFunction, LocalProblem, Rule
from tests.replica.test_trainer import NO_FENCE, node
from tests.toys import Toy


@pytest.mark.parametrize("amount", [{"steps": 2}, {"epochs": 1}])
def test_a_batch_size_of_one_train_is_that_of_a_run(amount: dict[str, Any]):
    """Also what an epoch is: 16 samples are 4 steps of 4 and 2 of 8."""
    one, other = node(batch_size=8), node(batch_size=4)
    mine = one.trainer.train(Train(**amount, batch_size=4), NO_FENCE)
    its = other.trainer.train(Train(**amount), NO_FENCE)
    assert mine._replace(seconds=0.0) == its._replace(seconds=0.0)
    assert torch.equal(one.parameters, other.parameters)
    assert one.data.position == other.data.position
    # The next one has the run's size again.
    assert one.trainer.train(Train(steps=1), NO_FENCE).num_samples == 8


def test_a_batch_larger_than_the_runs_is_computed_in_its_pieces():
    one, other = node(batch_size=4), node(batch_size=4, accumulate=2)
    one.trainer.train(Train(steps=2, batch_size=8), NO_FENCE)
    other.trainer.train(Train(steps=2), NO_FENCE)
    assert torch.equal(one.parameters, other.parameters)


@pytest.mark.parametrize("optimizer", [{"name": "sgd"}, {"name": "sgd", "momentum": 0.5}, {"name": "adamw"}])
def test_a_factor_of_the_learning_rate_is_another_learning_rate(optimizer: dict[str, Any]):
    # A quarter, so that no product is rounded.
    one, other = node(lr=0.5, **optimizer), node(lr=0.125, **optimizer)
    one.trainer.train(Train(steps=3, lr_factor=0.25), NO_FENCE)
    other.trainer.train(Train(steps=3), NO_FENCE)
    assert torch.equal(one.parameters, other.parameters)
    assert not torch.equal(one.parameters, node(lr=0.5, **optimizer).parameters)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"lr_factor": 0.0}, {"lr_factor": -1.0}, {"lr_factor": math.inf}])
def test_what_is_no_size_or_factor_is_refused(bad: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"Train\({next(iter(bad))}="):
        Train(steps=1, **bad)


class Finishing(Rule):
    """Counts its ends; fails at a given step."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at, self.steps, self.ends = fails_at, 0, 0

    def wrap(self, problem: LocalProblem) -> GradientFunction:
        if self.fails_at == 0:
            raise ZeroDivisionError

        def gradient(parameters: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
            self.steps += 1
            if self.steps == self.fails_at:
                raise ZeroDivisionError
            return problem.gradient(parameters, batch)

        return gradient

    def finish(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("fails_at", [-1, 0, 2])
def test_a_rule_finishes_once_whatever_happens(fails_at: int):
    rule, one = Finishing(fails_at), node()
    if fails_at == -1:
        one.trainer.train(Train(steps=3, rule=rule), NO_FENCE)
    else:
        with pytest.raises(ZeroDivisionError):
            one.trainer.train(Train(steps=3, rule=rule), NO_FENCE)
    assert rule.ends == 1


def test_a_rule_finishes_where_the_round_is_cancelled():
    rule, up = Finishing(), threading.Event()
    up.set()
    with pytest.raises(Interrupted):
        node().trainer.train(Train(steps=3, rule=rule), up)
    assert rule.ends == 1


def names(one: Replica) -> list[str]:
    return [entry.name for entry in one.layout.entries]


@pytest.mark.parametrize("optimizer", [{"name": "sgd", "momentum": 0.9}, {"name": "adamw"}, {"name": "rmsprop"}])
def test_only_everything_is_without(optimizer: dict[str, Any]):
    one, other = node(**optimizer), node(**optimizer)
    one.trainer.train(Train(steps=3, only=tuple(names(one))), NO_FENCE)
    other.trainer.train(Train(steps=3), NO_FENCE)
    assert torch.equal(one.parameters, other.parameters)


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, {"name": "adamw"}, {"name": "sgd", "grad_clip": 0.01}],
)
def test_only_some_are_trained_as_torch_trains_a_frozen_model(optimizer: dict[str, Any]):
    """Two steps of all, three of the first entry, two of all: moments, decay and norms of the rest stay out of it."""
    one, reference = node(lr=0.1, **optimizer), node(lr=0.1, **optimizer)
    chosen = names(one)[0]
    copy = Toy().build()
    with torch.no_grad():
        for entry, parameter in zip(one.layout.entries, copy.parameters(), strict=True):
            parameter.copy_(reference.parameters[entry.start : entry.stop].view(entry.shape))
    keys = {key: value for key, value in optimizer.items() if key not in ("name", "grad_clip")}
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer["name"]]
    torchs = kind(copy.parameters(), lr=0.1, **keys)
    for steps, only in ((2, None), (3, (chosen,)), (2, None)):
        one.trainer.train(Train(steps=steps, only=only), NO_FENCE)
        for _ in range(steps):
            batch = reference.data.load(torch.from_numpy(reference.data.draw(reference.spec.samples_per_step)))
            torchs.zero_grad(set_to_none=True)
            Toy().loss(copy, batch).backward()
            for entry, parameter in zip(one.layout.entries, copy.parameters(), strict=True):
                if only is not None and entry.name not in only:
                    parameter.grad = None
            if "grad_clip" in optimizer:
                nn.utils.clip_grad_norm_(copy.parameters(), optimizer["grad_clip"])
            torchs.step()
    torch.testing.assert_close(one.parameters, torch.cat([value.reshape(-1) for value in copy.parameters()]))


@pytest.mark.parametrize("only", [(), "head"])
def test_only_takes_a_tuple_of_names(only: Any):
    with pytest.raises(ValueError, match="takes a tuple of names, at least one"):
        Train(steps=1, only=only)


def test_only_what_names_nothing_is_refused():
    one = node()
    with pytest.raises(ProgramError, match=r"'head' names no trained parameter of the model; there are "):
        one.trainer.train(Train(steps=1, only=(names(one)[0], "head")), NO_FENCE)
