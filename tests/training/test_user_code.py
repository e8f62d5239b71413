"""What a user's model and loss do to shared state: the bits of a plain loop of torch, or a line that names the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starling.actors.data import Position
from starling.algorithms.api import Gradient, Loss, Step, Train
from starling.algorithms.errors import ProgramError
from tests.toys import INPUTS, OUTPUTS, Toy, begin, replica, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starling.actors.replica.replica import Replica

STEPS = 7


class Never:
    def is_set(self) -> bool:
        return False


class Heads(nn.Module):
    """Two heads, of which a batch asks for one, and a layer that nobody asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, 5)
        self.heads = nn.ModuleList(nn.Linear(5, OUTPUTS) for _ in range(2))
        self.nobodys = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heads[int(inputs[0, 0] > 0)](torch.tanh(self.body(inputs)))


class MaxNorm(nn.Linear):
    """Puts other data in place of its weight's, as EEGNet's layers do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.4)
        return super().forward(input)


class Running(nn.Module):
    """Puts another tensor in place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, OUTPUTS)
        self.mean: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(INPUTS))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(dim=0)
            self.count = self.count + 1
        return self.linear(inputs - self.mean)


class Own(Toy, name="test_own"):
    """Another module, from ``BUILD``; another loss, from ``LOSS``."""

    build_with: str = "mlp"
    lose_with: str = "plain"

    def build(self) -> nn.Module:
        return BUILD[self.build_with]()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return LOSS[self.lose_with](module, *batch)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)),
    "heads": Heads,
    "max_norm": lambda: nn.Sequential(MaxNorm(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)),
    "running": Running,
    "sparse": lambda: nn.Sequential(Rounded(), nn.Embedding(9, 5, sparse=True), Sum(), nn.Linear(5, OUTPUTS)),
}


class Rounded(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.round().clamp(-4, 4).long() + 4


class Sum(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sum(dim=1)


def fgsm(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """A backward pass of its own, and the gradients set to None after it."""
    x = inputs.clone().requires_grad_()
    loss = F.mse_loss(module(x), targets)
    if not torch.is_grad_enabled():
        return loss
    loss.backward()
    assert x.grad is not None
    worse = (x + 0.1 * x.grad.sign()).detach()
    module.zero_grad()
    return F.mse_loss(module(worse), targets)


def leftover(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """A backward pass of its own whose gradients are part of the step."""
    if torch.is_grad_enabled():
        (0.1 * module(inputs).square().mean()).backward()
    return F.mse_loss(module(inputs), targets)


def replaced(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradients that a backward pass finds there already, and zeros in place of None."""
    for parameter in module.parameters():
        assert parameter.grad is None  # as in a loop that begins with zero_grad()
        parameter.grad = torch.full_like(parameter, 0.01)
    return F.mse_loss(module(inputs), targets)


def frozen_by_turns(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """One layer at a time."""
    first, *_, last = module.children()
    first.requires_grad_(bool(inputs[0, 0] > 0))
    last.requires_grad_(bool(inputs[0, 0] <= 0))
    loss = F.mse_loss(module(inputs), targets)
    module.requires_grad_(True)
    return loss


LOSS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda module, inputs, targets: F.mse_loss(module(inputs), targets),
    "fgsm": fgsm,
    "leftover": leftover,
    "replaced": replaced,
    "by_turns": frozen_by_turns,
}

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    {"name": "adamw", "weight_decay": 0.5},
    {"name": "adam", "amsgrad": True},
    {"name": "rmsprop", "momentum": 0.9, "weight_decay": 0.1},
    {"name": "nadam"},
    {"name": "adafactor"},
    {"name": "lion", "weight_decay": 0.1},
]


def batches(one: Replica, count: int) -> Iterator[tuple[Tensor, ...]]:
    """What the node draws in its next steps."""
    here = one.data.position
    drawn = [one.data.draw(one.spec.samples_per_step) for _ in range(count)]
    one.data.position, one.data.num_drawn = here, 0
    for indices in drawn:
        yield one.data.load(torch.from_numpy(indices))


def plain_loop(one: Replica, task: Toy, count: int = STEPS) -> nn.Module:
    """What torch makes of the initial module with the same batches."""
    module = task.build()
    with torch.no_grad():
        for name, value in one.model_tensors().items():
            module.get_parameter(name).copy_(value) if name in dict(module.named_parameters()) else None
    optimizer = one.bench.optimizers.make(one_by_one=True)
    own = type(optimizer)(module.parameters(), lr=0.1, **one.spec.optimizer.options)  # pyright: ignore[reportCallIssue]
    for batch in batches(one, count):
        own.zero_grad()
        task.loss(module, batch).backward()
        own.step()
    return module


def assert_equal(one: Replica, module: nn.Module) -> None:
    expected = dict(module.named_parameters()) | dict(module.named_buffers())
    found = one.model_tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def train(one: Replica, *steps: int) -> None:
    for count in steps:
        one.trainer.train(Train(steps=count), Never())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda keys: "-".join(map(str, keys.values())))
@pytest.mark.parametrize("build", ["mlp", "heads"])
def test_parameters_without_a_gradient_are_left_alone(build: str, optimizer: dict[str, Any]):
    task = Own(build_with=build)
    one = replica(task=task, batch_size=3, **optimizer)
    begin(one)
    expected = plain_loop(one, task)
    train(one, 2, STEPS - 2)
    assert_equal(one, expected)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS[1], OPTIMIZERS[6]], ids=["flat", "one-by-one"])
@pytest.mark.parametrize("lose", ["fgsm", "leftover", "replaced", "by_turns"])
def test_what_a_loss_does_to_gradients_is_what_torch_makes_of_it(lose: str, optimizer: dict[str, Any]):
    task = Own(lose_with=lose)
    one = replica(task=task, batch_size=3, **optimizer)
    begin(one)
    expected = plain_loop(one, task)
    train(one, STEPS)
    assert_equal(one, expected)


@pytest.mark.parametrize("build", ["max_norm", "running"])
def test_what_a_model_puts_in_place_of_its_tensors_is_kept(build: str):
    task = Own(build_with=build)
    one, other = replica(task=task), replica(task=task)
    begin(one)
    expected = plain_loop(one, task)
    train(one, 3)
    one.stage()
    one.commit()
    committed = one.model_digest()
    train(one, STEPS - 3)
    assert_equal(one, expected)
    one.rollback()
    assert one.model_digest() == committed != other.model_digest()


def test_sparse_gradients_are_gradients():
    task = Own(build_with="sparse")
    one = replica(task=task)
    begin(one)
    expected = dict(plain_loop(one, task).named_parameters())
    train(one, STEPS)
    for name, value in one.model_tensors().items():
        torch.testing.assert_close(
            value, expected[name].detach()
        )  # torch adds rows that are there twice in another order


def test_evaluation_changes_nothing():
    """Not even where the model writes whenever it is called."""
    task = Own(build_with="max_norm")
    one = replica(task=task)
    begin(one)
    before = one.model_digest()
    one.evaluate(task.validation_samples(1), None)
    one.trainer.loss(Loss())
    assert one.model_digest() != before  # a loss is computed in training mode, at the node's own model
    before = one.model_digest()
    one.parameters.mul_(3)
    tripled = one.model_digest()
    one.evaluate(task.validation_samples(1), None)
    assert one.model_digest() == tripled != before


def test_a_gradient_says_of_which_parameters_it_is_none():
    task = Own(build_with="heads")
    one = replica(task=task, batch_size=3, name="adamw", weight_decay=0.5)
    begin(one)
    expected = plain_loop(one, task)
    for _ in range(STEPS):
        report = one.trainer.gradient(Gradient())
        # Others have none either, or the mean of gradients would be a gradient.
        one.trainer.step(Step(0.5 * report.gradient + 0.5 * report.gradient, report))
    assert_equal(one, expected)


def test_a_zero_gradient_is_one():
    """Of a layer whose inputs are zero, say: torch decays it."""
    one = replica(task=Own(), name="adamw", weight_decay=0.5)
    before = one.parameters.clone()
    one.trainer.step(Step(torch.zeros_like(before), one.trainer.gradient(Gradient())))
    assert torch.equal(one.parameters, before * (1 - 0.1 * 0.5))


def test_data_parallel_nodes_leave_alone_what_none_of_them_used():
    keys = {"algorithm": "ddp", "rounds": 4, "data": {"batch_size": 4}}
    ran = simulate(
        {"task": {"name": "test_own", "build_with": "heads"}, "optimizer": {"name": "adamw", "lr": 0.1}} | keys
    )
    fresh = replica(task=Own(build_with="heads"))
    assert torch.equal(ran.replicas[0].model_tensors()["nobodys.weight"], fresh.model_tensors()["nobodys.weight"])
    assert not torch.equal(ran.replicas[0].model_tensors()["body.weight"], fresh.model_tensors()["body.weight"])


def test_without_samples_nothing_moves():
    """A node whose samples are all drawn: no batch, no gradient, no decay."""
    one = replica(task=Own(), name="sgd", momentum=0.9, weight_decay=0.5)
    begin(one)
    train(one, 2)
    before = one.model_digest()
    one.data._present = lambda indices: indices[:0]
    train(one, 2)
    assert one.model_digest() == before


def test_an_optimizer_that_was_taken_apart_is_kept_and_sent():
    task = Own(build_with="heads")
    for optimizer in OPTIMIZERS:
        one = replica(task=task, batch_size=3, rollback=True, **optimizer)
        begin(one)
        train(one, 3)
        one.stage()
        one.commit()
        position = one.data.position
        train(one, 3)
        expected = one.model_digest()
        one.rollback()
        assert one.data.position == position != Position()
        train(one, 3)
        assert one.model_digest() == expected, optimizer


# --- what is refused ------------------------------------------------------------------------------------------------


def rebind(module: Any) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def grow(module: Any) -> None:
    module[0].scale = nn.Parameter(torch.ones(1))


def prune(module: Any) -> None:
    module[0].weight.data = module[0].weight.data[:4]


def alias(module: Any) -> None:
    module[2].bias.data = module[0].bias.data[:OUTPUTS]


def add_buffer(module: Any) -> None:
    module[0].register_buffer("seen", torch.ones(1))


def teach(module: Any) -> None:
    module[1].weight.data.mul_(0.5)


def unfreeze(module: Any) -> None:
    module[1].weight.requires_grad_(True)


def reshape_buffer(module: Any) -> None:
    module[3].running_mean = torch.zeros(2)


class Meddling(Toy):
    how: str

    def build(self) -> nn.Module:
        module = nn.Sequential(nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, OUTPUTS), nn.BatchNorm1d(OUTPUTS))
        module[1].requires_grad_(False)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss = super().loss(module, batch)
        MEDDLE[self.how](module)
        return loss


MEDDLE: dict[str, Callable[[nn.Module], None]] = {
    one.__name__: one for one in (rebind, grow, prune, alias, add_buffer, teach, unfreeze, reshape_buffer)
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rebind", "the model has another parameter 0.weight, which is not trained; make all in build()"),
        ("grow", "the model has a new parameter 0.scale, which is not trained"),
        ("prune", r"parameter 0.weight is float32 of shape \[4, 6\], and was float32 of shape \[8, 6\]"),
        ("alias", r"parameter 2.bias shares the memory of another now; tie them in build\(\)"),
        ("add_buffer", "the model has a new buffer 0.seen; register buffers in build()"),
        ("teach", "other values in parameter 1.weight, which is frozen and the same for all nodes; make it a buffer"),
        ("unfreeze", "the model has parameter 1.weight unfrozen, which is not trained"),
        ("reshape_buffer", r"buffer 3.running_mean is float32 of shape \[2\], and was float32 of shape \[3\]"),
    ],
)
def test_what_cannot_be_made_good_is_refused(how: str, message: str):
    one = replica(task=Meddling(how=how))
    begin(one)
    with pytest.raises(
        ProgramError, match=rf"task tests.training.test_\w+:Meddling: after loss .*{message}".replace("()", r"\(\)")
    ):
        train(one, 2)
