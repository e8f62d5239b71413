"""Parameters that are perturbed as they are used: the bits of a whole perturbed model, whatever is done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from starling.actors.tasks import Task, TensorSamples
from starling.actors.tasks.digits import Digits
from starling.actors.tasks.text_lm import TextLM, TransformerConfig
from starling.algorithms.api import Batch, Loss, Node, Perturbed
from starling.algorithms.errors import ProgramError
from starling.algorithms.noise import fill
from starling.algorithms.zeroth_order.just_one_byte import JustOneByte
from tests.toys import Tied, begin, replica

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.actors.replica.replica import Replica

KEY = 0x0123_4567_89AB_CDEF
WIDTH = 6


class Twice(nn.Module):
    """One layer, used twice; a parameter of the model itself, and one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.shift = nn.Parameter(torch.linspace(-1, 1, WIDTH))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs).tanh() + self.shift) * self.scale


class Elsewhere(nn.Module):
    """Weights that others than their layers use: transposed, sliced, joined, in lists, by ``data`` and ``detach``."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH)
        self.some = nn.ParameterList(nn.Parameter(torch.full((WIDTH,), value)) for value in (0.5, -0.25))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs @ self.one.weight.T + self.one.bias
        hidden = torch.cat(
            [F.linear(hidden, self.two.weight[1:]), F.linear(hidden, self.one.weight[::2].contiguous())], 1
        )
        both = torch.stack(list(self.some)).sum(0)
        hidden = hidden[:, :WIDTH] * both + self.two.weight.data[:, 2] + self.two.bias.detach()
        return hidden + sum(one.square().sum() for one in self.parameters())


class Recurrent(nn.Module):
    """Keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, WIDTH, num_layers=2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lstm(inputs.view(-1, 3, 2))[0][:, -1]


class Attention(nn.Module):
    """Takes its output layer's weight without calling that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = inputs.view(-1, 3, 2)
        return self.norm(self.attention(parts, parts, parts)[0].flatten(1))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ConvTranspose1d(3, 1, 3, padding=1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.unsqueeze(1)).squeeze(1)


class Sloped(nn.Module):
    """Its output is a derivative, which is taken in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = inputs.requires_grad_()
            return torch.autograd.grad(self.layers(inputs).sum(), inputs)[0]


class Clamping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        self.weight.data.clamp_(-1, 1)
        return super().forward(input)


class Listing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input) * sum(self.bias.tolist())


class Viewing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input) * (self.bias.data.view(torch.int32) % 7).sum()


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tied": lambda: nn.Sequential(Tied(), nn.Linear(3, WIDTH)),
    "twice": Twice,
    "elsewhere": Elsewhere,
    "recurrent": Recurrent,
    "attention": Attention,
    "convolved": Convolved,
    "sloped": Sloped,
    "frozen": lambda: nn.Sequential(nn.Linear(WIDTH, 5).requires_grad_(False), nn.Linear(5, WIDTH)),
    "viewing": lambda: Viewing(WIDTH, WIDTH),
    "embedding": lambda: nn.Sequential(Rounded(), nn.Embedding(7, 3), nn.Flatten(), nn.Linear(3 * WIDTH, WIDTH)),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "clamping": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Clamping(WIDTH, WIDTH)),
    "listing": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Listing(WIDTH, WIDTH)),
    "scripted": lambda: nn.Sequential(nn.Tanh(), torch.jit.script(nn.Linear(WIDTH, WIDTH))),
}


class Rounded(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.abs() * 3).long().clamp(max=6)


class Made(Task):
    """Least squares, with a penalty that takes the parameters past all layers."""

    of: str = "linear"

    def train_samples(self, num_nodes: int) -> TensorSamples:
        inputs = torch.linspace(-2, 2, 32 * WIDTH).view(32, WIDTH)
        return TensorSamples(inputs, inputs.sin())

    validation_samples = train_samples

    def build(self) -> nn.Module:
        return (RIGHT | REFUSED)[self.of]()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        penalty = sum(one.square().sum() for one in module.parameters())
        return F.mse_loss(module(batch[0]), batch[1]) + 1e-3 * penalty


def losses(one: Replica, point: Perturbed) -> tuple[float, float]:
    """At ``point``, and at a tensor with the same values."""
    batch = one.data.batch(Batch())
    z = torch.zeros(one.parameters.shape, dtype=torch.float64)
    fill(z[point.start : point.stop], point.distribution, point.key, point.start)
    whole = one.parameters + z.to(one.parameters.dtype) * point.scale
    before = one.parameters.clone()
    on_use = one.trainer.loss(Loss(at=point, batch=batch, probe=True))
    assert torch.equal(one.parameters, before)
    return on_use, one.trainer.loss(Loss(at=whole, batch=batch, probe=True))


def ready(task: Task, **keys: Any) -> Replica:
    one = replica(task=task, **keys)
    begin(one)
    return one


TASKS: dict[str, Task] = {
    "digits": Digits.model_validate({"model": {"name": "mlp", "width": 33}}),
    "text_lm": TextLM(context=16, model=TransformerConfig(layers=2, width=24, heads=2), max_bytes=100_000),
} | {name: Made(of=name) for name in RIGHT}


@pytest.mark.parametrize("name", TASKS)
def test_a_loss_has_the_bits_of_one_at_a_whole_perturbed_model(name: str):
    one = ready(TASKS[name])
    size = one.layout.num_values
    for start, stop in ((0, size), (size // 3, size // 2), (1, 2)):
        on_use, whole = losses(one, Perturbed(0.1, "gaussian", KEY, start, stop))
        assert on_use == whole
    at_model = one.trainer.loss(Loss(batch=one.data.batch(Batch()), probe=True))
    assert losses(one, Perturbed(0.1, "rademacher", KEY, 0, size))[0] != at_model
    on_use, whole = losses(one, Perturbed(0.0, "gaussian", KEY, 0, size))
    assert on_use == whole


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("name", ["twice", "elsewhere", "text_lm"])
def test_in_other_precisions_too(name: str, precision: str):
    one = ready(TASKS[name], precision=precision)
    on_use, whole = losses(one, Perturbed(0.05, "gaussian", KEY, 0, one.layout.num_values))
    assert on_use == whole


@given(start=st.integers(0, 60), size=st.integers(0, 60), first=st.integers(0, 60), count=st.integers(0, 60))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_part_of_a_point_is_made_without_the_rest(start: int, size: int, first: int, count: int):
    center = torch.linspace(-1, 1, 60)
    whole, part = torch.empty(60), torch.empty(len(center[first : first + count]))
    point = Perturbed(0.3, "gaussian", KEY, start, start + size)
    point.write(whole, center, 0)
    point.write(part, center[first : first + count], first)
    z = fill(torch.empty(60), "gaussian", KEY)
    inside = torch.zeros(60)
    inside[start : start + size] = 1
    assert torch.equal(whole, center + inside * z * 0.3)
    assert torch.equal(part, whole[first : first + count])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clamping", r"parameter 1\.weight of layer 1 is written to by aten\.clamp_\.default, and cannot be perturbed"),
        ("listing", r"parameter 1\.bias of layer 1 is read by tolist, and cannot be perturbed as it is used; take alg"),
        ("scripted", r"layer 1 is a ScriptModule, and reads them by itself; take algorithm\.perturb: copy$"),
    ],
)
def test_what_would_take_the_model_itself_is_refused_with_the_layers_name(name: str, words: str):
    one = ready(Made(of=name))
    point, batch = Perturbed(0.1, "gaussian", KEY, 0, one.layout.num_values), one.data.batch(Batch())
    before = one.trainer.loss(Loss(batch=batch))
    with pytest.raises(ProgramError, match=words) as caught:
        one.trainer.loss(Loss(at=point, batch=batch, probe=True))
    assert "\n" not in str(caught.value)
    assert one.trainer.loss(Loss(batch=batch)) == before, "nothing of it stays"


def test_compiled_models_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("starling.actors.training.shared_module.compile_in_place", lambda module, device: None)
    one = ready(Made(), compile=True)
    point = Perturbed(0.1, "gaussian", KEY, 0, one.layout.num_values)
    words = r"optimizer\.compile makes kernels that read parameters by themselves; set it to false, or take"
    with pytest.raises(ProgramError, match=words):
        one.trainer.loss(Loss(at=point, batch=one.data.batch(Batch()), probe=True))


@pytest.mark.parametrize("name", ["digits", "text_lm"])
def test_no_more_is_made_at_a_time_than_one_tensor(name: str, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    write = Perturbed.write

    def watched(self: Perturbed, out: Tensor, center: Tensor, first: int) -> None:
        made.append(out.numel())
        write(self, out, center, first)

    monkeypatch.setattr(Perturbed, "write", watched)
    one = ready(TASKS[name], algorithm=JustOneByte(perturb="on_use"))
    one.trainer.loss(
        Loss(at=Perturbed(0.1, "gaussian", KEY, 0, one.layout.num_values), batch=one.data.batch(Batch()), probe=True)
    )
    sizes = [entry.stop - entry.start for entry in one.layout.entries]
    assert max(made) == max(sizes) < one.layout.num_values
    # GPT's embedding is used twice, and only the first places of its positions.
    assert sum(made) == sum(sizes) + (256 * 24 if name == "text_lm" else 0)
    assert one.committed.data_ptr() == one.parameters.data_ptr(), "there is no committed copy"


# --- the step, on commit --------------------------------------------------------------------------------------------


class Hasty(JustOneByte):
    """Writes to the parameters."""

    async def round(self, node: Node) -> None:
        await super().round(node)
        node.parameters.mul_(1.0)


def test_a_step_is_made_by_the_commit_alone():
    algorithm = JustOneByte(perturb="on_use", lr=0.1)
    one = replica(algorithm=algorithm)
    algorithm.init(one)
    one.commit()
    begin(one)
    before = one.parameters.clone()
    step = algorithm._step(one, {0: algorithm.code.encode([1.5], one.rng("rounding"))}, 0.1)
    one.stage(algorithm.sealed(one))
    assert torch.equal(one.parameters, before)
    one.rollback()
    one.commit()
    assert torch.equal(one.parameters, before), "given up, and gone"
    step = algorithm._step(one, {0: algorithm.code.encode([1.5], one.rng("rounding"))}, 0.1)
    one.stage(algorithm.sealed(one))
    one.commit()
    step.apply(before)
    assert torch.equal(one.parameters, before)
    one.commit()
    assert torch.equal(one.parameters, before), "and made once"


def test_who_writes_to_the_parameters_all_the_same_is_told():
    from tests.toys import attempt

    ran = attempt(algorithm={"name": f"{__name__}:Hasty", "perturb": "on_use"}, task="test_toy", rounds=1)
    words = r"^node 0, round 0: the round wrote to node\.parameters, though its step is made on commit$"
    with pytest.raises(type(ran.error), match=words):
        raise ran.error or AssertionError
