"""What tasks answer: taken where it can be, else one line that names task and method, what is wanted and what came."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from starling.actors.data.generators import Settings, seeded
from starling.actors.tasks import DatasetSamples, TensorSamples, answers
from starling.actors.training.blame import non_finite
from starling.actors.training.module_init import initial_module
from starling.algorithms.api import Train
from starling.algorithms.errors import DataError, ProgramError, SettingsError, StarlingError
from tests.toys import INPUTS, OUTPUTS, Toy, begin, replica, simulate

if TYPE_CHECKING:
    from collections.abc import Callable

TASK = Toy()
X, Y = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


class Never:
    def is_set(self) -> bool:
        return False


class Pairs(Dataset[Any]):
    """What torchvision's data sets look like."""

    targets = (0, 1, 2, 0, 1, 2)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Headless:
    owners = None

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (X[indices],)


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [TensorDataset(X, Y), Pairs()], ids=["tensors", "items"])
def test_a_dataset_of_torch_is_samples(dataset: Any):
    samples = answers.samples(TASK, "train_samples", dataset)
    inputs, labels = samples.batch(torch.tensor([4, 0]))
    assert (inputs.tolist(), labels.tolist()) == ([[8.0, 9.0], [0.0, 1.0]], [1, 0])
    assert (len(samples), samples.owners) == (6, None)
    known: Any = samples
    assert known.labels.tolist() == Y.tolist()


def test_a_collate_of_ones_own():
    def stacked(items: list[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        return torch.stack([one for one, _ in items]), torch.tensor([2 * label for _, label in items])

    assert DatasetSamples(Pairs(), stacked).batch(torch.tensor([2]))[1].tolist() == [4]
    with pytest.raises(DataError, match="items of Pairs come to a dict, and a batch is a tuple of tensors"):
        DatasetSamples(Pairs(), lambda items: {"x": items}).batch(torch.tensor([2]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "train_samples must give Samples: .*; it gives None"),
        ((X, Y), "it gives a tuple of 2"),
        (X, r"it gives a tensor of float32 and shape \[6, 2\]"),
        (DataLoader(TensorDataset(X)), "it gives torch.utils.data.dataloader.DataLoader"),
        (Stream(), "it gives .*Stream"),
        (Headless(), "it gives .*Headless without __len__"),
        (
            TensorSamples(X, owners=torch.zeros(3, dtype=torch.int64)),
            r"owners must be None or .* of shape \[6\], not a",
        ),
        (TensorSamples(X, owners=torch.zeros(6)), "owners must be None or node indices, .* not a tensor of float32"),
        (TensorSamples(X, labels=torch.zeros(6)), "labels must be None or classes"),
    ],
)
def test_what_is_no_samples(given: Any, message: str):
    with pytest.raises(DataError, match=f"task tests.toys:Toy: .*{message}"):
        answers.samples(TASK, "train_samples", given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X, "y": Y}, "it gives dict"),
        ((X, Y[:3]), r"shape \[6, 2\], a tensor of int64 and shape \[3\]"),
        ((X, None), r"shape \[6, 2\], None"),
        ((), "it gives a tuple of 0"),
        (X, "it gives a tensor"),
        ((X[:5],), r"6 rows each; it gives a tensor of float32 and shape \[5, 2\]"),
        ((torch.tensor(1.0),), "6 rows each"),
    ],
)
def test_what_is_no_batch(given: Any, message: str):
    with pytest.raises(ProgramError, match=f"batch.. of its samples must give a tuple of tensors with .*{message}"):
        answers.batch(TASK, given, 6)


# --- losses and metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"it gives None \(is a return missing\?\)"),
        (1.5, "it gives float 1.5"),
        (torch.ones(3, requires_grad=True), r"shape \[3\]; take its mean"),
        (torch.ones((), dtype=torch.int64), "it gives a tensor of int64"),
        (torch.ones((), dtype=torch.complex64), "it gives a tensor of complex64"),
        (torch.ones(()), "does not depend on the trainable parameters"),
    ],
)
def test_what_is_no_loss(given: Any, message: str):
    with pytest.raises(ProgramError, match=f"task tests.toys:Toy: .*loss.*{message}"):
        answers.loss(TASK, given, is_differentiated=True)


def test_a_loss_of_one_row_is_one():
    assert answers.loss(TASK, torch.ones(1, 1, requires_grad=True), is_differentiated=True).shape == ()
    assert answers.loss(TASK, torch.ones(()), is_differentiated=False) == 1


def test_metrics_are_numbers():
    given = {"a": torch.ones(1, requires_grad=True), "b": 2, "c": np.float32(3), "d": torch.tensor(True)}
    assert answers.metrics(TASK, "metrics", given) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0}
    for wrong, message in (
        (None, "must give a dict of names and numbers; it gives None"),
        ({"a": "high"}, "one number as 'a'; it gives str 'high'"),
        ({"a": torch.ones(2)}, "one number as 'a'; it gives a tensor"),
        ({"a": torch.ones((), dtype=torch.complex64)}, "one number as 'a'"),
        ({1: 2.0}, "texts as names; it gives int 1"),
    ):
        with pytest.raises(ProgramError, match=message):
            answers.metrics(TASK, "metrics", wrong)


class Some(Toy, name="test_some_metrics"):
    """Reports what only batches of four have."""

    def evaluation_batch_size(self, batch_size: int) -> int:
        return 8

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": self.loss(module, batch)} | ({"recall": torch.tensor(0.75)} if len(batch[0]) == 4 else {})


def test_a_metric_counts_where_it_is():
    one = replica(task=Some())
    found = one.evaluate(one.spec.task.validation_samples(1), None)
    assert found["recall"] == 0.75
    assert found["loss"] == pytest.approx(replica().evaluate(TASK.validation_samples(1), None)["loss"])


# --- models ---------------------------------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)


def tied_by_data() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight.data = module[0].weight.data
    return module


def complex_weight() -> nn.Module:
    module = nn.Linear(2, 2)
    module.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return module


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: None, "must give a torch.nn.Module; it gives None"),
        (frozen, "a model without trainable parameters: all are frozen"),
        (nn.ReLU, "a model without trainable parameters"),
        (lambda: nn.LazyLinear(3), "leaves weight of a lazy layer without a shape; call the model once"),
        (on_meta, "leaves weight on the meta device"),
        (complex_weight, "the parameter phase in complex64, and complex parameters cannot be trained"),
        (tied_by_data, "lets 0.weight and 1.weight share memory"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_no_model(build: Callable[[], Any], message: str):
    with pytest.raises(SettingsError, match=rf"task tests.toys:Toy: build\(\) .*{message}"):
        answers.module(TASK, build())


class Wide(nn.Module):
    """Buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, OUTPUTS)
        self.register_buffer("turn", torch.tensor([1 + 1j, 0.5 - 2j], dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("short", torch.tensor([0.1], dtype=torch.bfloat16))
        self.register_buffer("exact", torch.tensor([0.5], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


class WideTask(Toy, name="test_wide"):
    rounded: bool = False

    def build(self) -> nn.Module:
        module = Wide()
        if self.rounded:
            module.exact = torch.tensor([0.1], dtype=torch.float64)
        return module


def test_numbers_are_kept_or_refused():
    task = WideTask()
    one = replica(task=task)
    begin(one)
    one.trainer.train(Train(steps=2), Never())
    found = one.model_tensors()
    assert torch.equal(found["turn"], torch.tensor([1 + 1j, 0.5 - 2j], dtype=torch.complex64))
    assert (int(found["count"]), found["mask"].tolist()) == (2**40 + 1, [True, False])
    assert (found["short"].dtype, found["short"].item()) == (
        torch.float32,
        torch.tensor(0.1, dtype=torch.bfloat16).item(),
    )
    assert (found["exact"].dtype, found["exact"].item()) == (torch.float32, 0.5)
    with pytest.raises(SettingsError, match="task .*WideTask: build.. gives exact in float64, and .* would round it"):
        replica(task=WideTask(rounded=True))
    precise = replica(task=WideTask(rounded=True), precision="fp64")
    assert precise.model_tensors()["exact"].item() == 0.1


# --- chance ---------------------------------------------------------------------------------------------------------


class Noisy(TensorSamples):
    """Samples that draw from every generator of the process."""

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        inputs, targets = super().batch(indices)
        noise = np.random.randn(*inputs.shape) + random.gauss(0, 1)  # noqa: NPY002 - as a user's code does
        return inputs + torch.from_numpy(noise).float() * 0.1 + torch.rand(()), targets


class Chancy(Toy, name="test_chancy"):
    def train_samples(self, num_nodes: int) -> TensorSamples:
        kept = np.random.permutation(48)  # noqa: NPY002 - as above
        return Noisy(*(one[torch.from_numpy(kept)] for one in super().train_samples(num_nodes).tensors))

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        return Noisy(*super().validation_samples(num_nodes).tensors)


@pytest.mark.parametrize("algorithm", ["fedavg", "ddp"])
def test_a_run_is_a_function_of_its_seed(algorithm: str):
    ran = []
    for seed in (0, 0, 1):
        random.seed(len(ran))
        np.random.seed(len(ran))  # noqa: NPY002 - as above
        before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - as above
        ran.append(simulate(algorithm=algorithm, task="test_chancy", seed=seed))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002 - as above
    assert ran[0].digest == ran[1].digest != ran[2].digest
    assert ran[0].summary is not None
    assert ran[1].summary is not None
    assert ran[0].summary.metrics == ran[1].summary.metrics


def test_settings_of_the_process_are_put_back():
    before = Settings.now()
    with seeded(0, torch.device("cpu")):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(before.num_threads + 1)
    assert Settings.now() == before


class Careless(Toy, name="test_careless"):
    """Leaves settings and layers otherwise."""

    def build(self) -> nn.Module:
        module = super().build()
        torch.set_default_dtype(torch.float64)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        loss = F.mse_loss(module(batch[0]), batch[1])
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        module.train(not module.training)
        return loss


def test_what_a_loss_leaves_is_not_noticed():
    one, other = replica(task=Careless(model="mlp")), replica(task=Toy(model="mlp"))
    for each in (one, other):
        begin(each)
        each.trainer.train(Train(steps=3), Never())
    assert one.model_digest() == other.model_digest()
    assert initial_module(Careless(), 0, torch.device("cpu")).training
    assert Settings.now().default_dtype == torch.float32


# --- blame ----------------------------------------------------------------------------------------------------------


class Sourced(TensorSamples):
    def where(self, index: int) -> str:
        return f"line {index} of x.csv"


def test_who_is_not_finite():
    inputs = X.clone()
    inputs[3, 1] = torch.inf
    assert non_finite(TensorSamples(X, Y), torch.arange(6)) is None
    assert non_finite(TensorSamples(inputs, Y), torch.tensor([0, 3])) == (
        "sample 3 is not finite (inf at [0, 1] of tensor 0 of the batch)"
    )
    assert non_finite(Sourced(inputs, Y), torch.tensor([0, 3])) == "sample 3 is not finite (line 3 of x.csv)"


@pytest.mark.parametrize("algorithm", ["fedavg", "ddp"])
def test_the_learning_rate_is_not_blamed_for_the_data(algorithm: str):
    with pytest.raises(StarlingError, match=r"sample 7 is not finite \(nan at .*: mend the data") as caught:
        simulate(algorithm=algorithm, task={"name": "test_toy", "poison": 7}, rounds=4)
    assert "optimizer.lr" not in str(caught.value)


def test_batch_norm_of_one_sample_says_what_helps():
    keys = {"task": {"name": "test_toy", "model": "batch_norm", "num_samples": 9}, "data": {"batch_size": 4}}
    with pytest.raises(
        StarlingError, match=r"node 0, round 2: task tests.toys:Toy: a batch of 1 sample.*data.min_batch: 2"
    ):
        simulate(keys, nodes=1, rounds=3)
