"""What the contract does for every algorithm: buffers, the steps of a round, and the hooks around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import PositiveInt
from torch import Tensor

from starling.algorithms.api import Algorithm, AllReduce, Layout, Node, Reduced, Start, all_reduce_bytes, whole_round


class Own(Algorithm):
    async def round(self, node: Node) -> None:
        node.local["round"] = True


def test_buffers_travel_along_and_are_written_in_place():
    buffers = torch.zeros(2)

    async def program() -> Reduced[Tensor]:
        return await AllReduce(torch.ones(3), weight=2.0, buffers=buffers)

    coroutine: Any = program()
    sent = coroutine.send(None)
    assert sent.buffers is None
    assert sent.weight == 2
    assert {name: one.tolist() for name, one in sent.tensors.items()} == {"value": [1, 1, 1], "buffers": [0, 0]}
    with pytest.raises(StopIteration) as returned:
        coroutine.send(Reduced({"value": torch.full((3,), 5.0), "buffers": torch.ones(2)}, (0, 2), 4.0))
    assert returned.value.value.value.tolist() == [5, 5, 5]
    assert (returned.value.value.members, returned.value.value.weight) == ((0, 2), 4.0)
    assert buffers.tolist() == [1, 1]


def test_a_member_that_only_receives_takes_the_buffers_too():
    buffers = torch.zeros(1)

    async def program() -> Reduced[dict[str, Tensor]]:
        return await AllReduce[dict[str, Tensor]](None, buffers=buffers)

    coroutine: Any = program()
    assert coroutine.send(None).tensors is None
    with pytest.raises(StopIteration) as returned:
        coroutine.send(Reduced({"control": torch.ones(1), "buffers": torch.ones(1)}, (0,), 1.0))
    assert returned.value.value.value == {"control": torch.ones(1)}
    assert buffers.tolist() == [1]


@pytest.mark.parametrize("name", ["buffers", "value"])
def test_names_of_the_buffers_exchange_are_its_own(name: str):
    with pytest.raises(ValueError, match="give its tensors other names"):
        AllReduce({name: torch.ones(1)}, buffers=torch.ones(1))
    AllReduce({name: torch.ones(1)})


def test_buffers_are_not_written_to_behind_a_training():
    with pytest.raises(ValueError, match="Start takes an AllReduce without buffers="):
        Start(AllReduce(torch.ones(1), buffers=torch.ones(1)))


class Inner(Own):
    inner_steps: PositiveInt = 7
    epochs: PositiveInt = 2


class Passes(Own):
    steps: PositiveInt | None = None
    epochs: PositiveInt = 2


class Odd(Own):
    steps: float = 3.5


class Without(Inner):
    uses_optimizer: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [(Inner(), 7), (Passes(), 6), (Passes(steps=5), 5), (Own(), None), (Odd(), None), (Without(), 0)],
)
def test_the_steps_of_a_round_are_those_of_the_fields(algorithm: Algorithm, steps: int | None):
    assert algorithm.steps_per_round(9, 4) == steps


class Averaging(Own):
    averages_buffers: ClassVar[bool] = True


def drive(algorithm: Algorithm, num_buffers: int, **hooks: bool) -> tuple[Any, list[Any]]:
    """Run a round; every exchange has a mean of 4."""
    node: Any = SimpleNamespace(buffers=torch.zeros(num_buffers), local={})
    awaited: list[Any] = []
    coroutine: Any = whole_round(algorithm, node, **hooks)
    answer = None
    try:
        while True:
            awaited.append(coroutine.send(answer))
            answer = Reduced(torch.full((num_buffers,), 4.0), (0,), 1.0)
    except StopIteration:
        return node, awaited


def test_a_round_ends_with_the_mean_of_the_buffers():
    node, awaited = drive(Averaging(), 2)
    assert node.buffers.tolist() == [4, 4]
    assert len(awaited) == 1
    assert drive(Averaging(), 0)[1] == drive(Own(), 2)[1] == []
    assert drive(Own(), 2)[0].buffers.tolist() == [0, 0]

    layout = Layout((), torch.float32, num_buffer_values=10)
    assert Averaging().buffer_bytes(layout, 3) == all_reduce_bytes(40, 3)
    assert Own().buffer_bytes(layout, 3) == 0


def test_hooks_come_before_the_round():
    called: list[str] = []

    class Hooked(Own):
        async def join(self, node: Node) -> None:
            called.append("join")

        async def on_view_change(self, node: Node) -> None:
            called.append("on_view_change")

        async def round(self, node: Node) -> None:
            called.append("round")

    drive(Hooked(), 0, joins=True, repairs=True)
    assert called == ["join", "on_view_change", "round"]
    drive(Hooked(), 0)
    assert called[3:] == ["round"]
