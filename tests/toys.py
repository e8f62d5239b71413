"""Small tasks, and runs in the simulator, for tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data import Iid, assign
from starling.actors.replica.node_data import DataSource
from starling.actors.replica.replica import Replica
from starling.actors.replica.spec import ReplicaSpec
from starling.actors.tasks import Task, TensorSamples
from starling.actors.training.optimizers import OptimizerConfig
from starling.algorithms.api import Algorithm, Layout, Node, Train, View
from starling.algorithms.errors import StarlingError
from starling.algorithms.seeds import generator
from starling.orchestrator.config.schema import Config, parse
from starling.orchestrator.control.controller import Controller
from starling.orchestrator.records.observers import Observer, RoundRecord, Summary
from starling.orchestrator.runtimes.simulator.runtime import Simulator

if TYPE_CHECKING:
    from collections.abc import Mapping

INPUTS, OUTPUTS = 6, 3


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUTS, INPUTS)
        self.decoder = nn.Linear(INPUTS, INPUTS, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(inputs)))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(INPUTS, 5), nn.Linear(5, OUTPUTS))
    module[0].requires_grad_(False)
    return module


MODULES: dict[str, Any] = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS),
    "mlp": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, OUTPUTS)),
    "cumulative": lambda: nn.Sequential(nn.BatchNorm1d(INPUTS, momentum=None), nn.Linear(INPUTS, OUTPUTS)),
    "dropout": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Dropout(0.5), nn.Linear(8, OUTPUTS)),
    "tied": Tied,
    "frozen": frozen,
}


class Toy(Task, name="test_toy"):
    """Least squares on random samples."""

    model: Literal["linear", "mlp", "batch_norm", "cumulative", "dropout", "tied", "frozen"] = "mlp"
    num_samples: PositiveInt = 48
    poison: int | None = None  # the sample whose target is NaN

    def train_samples(self, num_nodes: int) -> TensorSamples:
        inputs, targets = _samples(self.num_samples, "train")
        if self.poison is not None:
            targets = targets.clone()
            targets[self.poison] = torch.nan
        return TensorSamples(inputs, targets)

    def validation_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(*_samples(20, "validation"))

    def build(self) -> nn.Module:
        return MODULES[self.model]()

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(module(inputs), targets)


class Slope(Task, name="test_slope"):
    """f(θ) = Σ θ from θ = 0: the gradient is one everywhere, and so is the outer gradient of one step of size one."""

    size: PositiveInt = 2

    def train_samples(self, num_nodes: int) -> TensorSamples:
        return TensorSamples(torch.zeros(num_nodes, 1))

    validation_samples = train_samples

    def build(self) -> nn.Module:
        module = nn.Linear(self.size, 1, bias=False)
        nn.init.zeros_(module.weight)
        return module

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return next(module.parameters()).sum()


@functools.cache
def _samples(count: int, purpose: str) -> tuple[Tensor, Tensor]:
    rng = generator("toy", purpose)
    inputs = torch.randn(count, INPUTS, generator=rng)
    return inputs, torch.sin(inputs[:, :OUTPUTS]) + 0.1 * torch.randn(count, OUTPUTS, generator=rng)


class Program(Algorithm):
    """What every algorithm must have, for those that test something else."""

    async def round(self, node: Node) -> None:
        await Train(steps=1)

    def expected_bytes(self, layout: Layout, num_nodes: int) -> int:
        return 0

    def steps_per_round(self, num_samples: int, batch_size: int) -> int:
        return 1


class Silent(Program, name="test_silent"):
    """Trains a step a round, and says nothing."""


def replica(
    node: int = 0,
    *,
    task: Task | None = None,
    algorithm: Algorithm | None = None,
    num_nodes: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    rounds: int = 10,
    skip_nan: bool = False,
    device: torch.device | None = None,
    **optimizer: Any,
) -> Replica:
    """A replica in its initial state, with the samples that it has in a run; ``optimizer`` are that section's keys."""
    task = task or Toy()
    spec = ReplicaSpec(
        algorithm=algorithm or Silent(),
        task=task,
        optimizer=OptimizerConfig.model_validate({"lr": 0.1} | optimizer),
        batch_size=batch_size,
        seed=seed,
        rounds=rounds,
        skip_nan=skip_nan,
    )
    samples = task.train_samples(num_nodes)
    source = DataSource(samples, assign(samples, Iid(), num_nodes, seed)[node])
    return Replica(node, spec, source, row=(spec.slab(device or torch.device("cpu")), 0))


def begin(one: Replica, number: int = 0, members: tuple[int, ...] = (0,)) -> None:
    """Enter a round, as the host has it do."""
    view = View(0, members)
    cohort = one.spec.algorithm.participants(view, generator(one.spec.seed, number, "participants"))
    one.begin(number, view, cohort)


# --- whole runs -----------------------------------------------------------------------------------------------------


@dataclass
class Ran(Observer):
    """A run that is over, and what is left of it."""

    config: Config
    error: StarlingError | None = None
    rounds: list[RoundRecord] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    summary: Summary | None = None
    replicas: dict[int, Replica] = field(default_factory=dict)

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def on_log(self, node: int, lines: Any) -> None:
        self.logs += lines

    def sought(self, what: str) -> list[dict[str, Any]]:
        """The controller's records of one kind."""
        return [event for event in self.events if event["event"] == what]

    @property
    def digest(self) -> str:
        assert self.summary is not None
        assert self.summary.digest is not None
        return self.summary.digest

    @property
    def virtual_seconds(self) -> float:
        assert self.summary is not None
        assert self.summary.virtual_seconds is not None
        return self.summary.virtual_seconds

    @property
    def parameters(self) -> Tensor:
        """Of the first node; those of replicated algorithms are equal at a round's end."""
        return self.replicas[0].parameters

    @property
    def expected_bytes(self) -> int:
        """What the algorithm says that a round takes."""
        algorithm, layout, num_nodes = self.config.algorithm, self.replicas[0].layout, len(self.replicas)
        return algorithm.expected_bytes(layout, num_nodes) + algorithm.buffer_bytes(layout, num_nodes)

    def planned_bytes(self, number: int) -> int:
        """What it says that round ``number`` takes."""
        algorithm, layout, num_nodes = self.config.algorithm, self.replicas[0].layout, len(self.replicas)
        sent = algorithm.round_bytes(layout, num_nodes, number, self.config.rounds)
        return sent + algorithm.buffer_bytes(layout, num_nodes)


def simulate(raw: dict[str, Any] | None = None, *, nodes: int = 2, **keys: Any) -> Ran:
    """Run a configuration in the simulator, without a run directory."""
    ran = attempt(raw, nodes=nodes, **keys)
    if ran.error is not None:
        raise ran.error
    return ran


def attempt(raw: dict[str, Any] | None = None, *, nodes: int = 2, **keys: Any) -> Ran:
    """The same, for runs that fail."""
    base = {"algorithm": "test_silent", "task": "test_toy", "rounds": 2, "tracking": "none", "on_nan": "stop"}
    config = parse(base | {"cluster": {"nodes": {"target": nodes}}} | (raw or {}) | keys)
    ran = Ran(config)
    runtime = Simulator(config)
    controller = Controller(config, runtime, ran, run_id="test", run_dir="test")
    try:
        ran.summary = controller.run()
    except StarlingError as error:
        ran.summary, ran.error = controller.summary("failed"), error
    finally:
        runtime.close()
    ran.replicas = runtime.host.replicas
    return ran
