"""The configuration: one YAML file, strict, whose keys are the fields of these models and of the parts it names."""

from __future__ import annotations

import math
import os
import re
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from starling.actors.data import DataConfig
from starling.actors.replica.average import Average
from starling.actors.replica.spec import ReplicaSpec
from starling.actors.tasks import Task
from starling.actors.training.optimizers import OptimizerConfig
from starling.algorithms.aggregators import Aggregator
from starling.algorithms.api import Algorithm, NodeId, View
from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import Part
from starling.algorithms.seeds import generator
from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.messages import Place, explain, shown
from starling.orchestrator.config.sections import (
    SERVER_NAME,
    CheckpointConfig,
    FaultsConfig,
    NetworkConfig,
    Section,
    without_password,
)
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.given_path import given

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from starling.orchestrator.records.observers import Observer

_MOST_NODES = 100_000
_LARGEST = 3.4028234e38
_LEAST_STORE_GB = 0.08
"""Ray takes 75 MiB at least."""
_MOST_LINES = 10
"""Errors shown at most."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"local|auto|(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
_TRACKING_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


class NodesConfig(Section):
    """Number of nodes of a run."""

    min: PositiveInt = 1
    """Fewest nodes with which a round is finished."""
    target: Annotated[int, Field(gt=0, le=_MOST_NODES)] | Literal["auto"] = 4
    """Number of nodes wanted. A run begins with those for which there is room, if they are ``min``; the others, and
    replacements of lost ones, join when there is room for them. ``auto``: one for each free place, at most ``max``."""
    max: Annotated[int, Field(gt=0, le=_MOST_NODES)] | None = None
    """Upper bound; default: the target."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.target == "auto":
            if self.max is None:
                raise ValueError("needs max with target: auto; say how many nodes there may be at most")
            if self.min > self.max:
                raise ValueError(f"must keep min <= max, got min {self.min} <= max {self.max}")
        elif not self.min <= self.target <= (self.max or self.target):
            most = "" if self.max is None else f" <= max {self.max}"
            raise ValueError(f"must keep min <= target <= max, got min {self.min} <= target {self.target}{most}")
        return self

    @property
    def most(self) -> int:
        """Greatest number of nodes that is wanted."""
        if isinstance(self.target, int):
            return self.target
        assert self.max is not None
        return self.max


class ClusterConfig(Section):
    """Ray cluster, resources of nodes, and deadlines."""

    address: str = "local"
    """``local`` starts a Ray of our own for the run; else ``auto`` or the address of a running one, ``host:port``."""
    nodes: NodesConfig = NodesConfig()
    num_gpus: NonNegativeFloat = 0
    """GPUs per node; with 0 a node sees none."""
    num_cpus: NonNegativeFloat = 0.25
    """CPUs per node that Ray reserves."""
    object_store_gb: Annotated[float, Field(ge=_LEAST_STORE_GB, le=1e6)] | None = None
    """Size of the object store of a Ray of our own, which holds exchanges; default: 30 % of the free memory."""
    nodes_per_actor: PositiveInt = 1
    """Nodes that share one process."""
    round_deadline_s: PositiveFloat = 120
    """Seconds that an exchange waits for stragglers, from the round's begin and again from each close."""
    start_timeout_s: PositiveFloat = 300
    """Seconds that all nodes may take to come up."""
    min_nodes_timeout_s: PositiveFloat = 600
    """Seconds that a run waits for ``nodes.min`` healthy nodes."""
    cancel_grace_s: PositiveFloat = 10
    """Seconds that a node may take to stop, before its process is ended."""
    quorum_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of the view that a round needs to finish; at least ``nodes.min`` nodes."""
    drain_s: PositiveFloat = 30
    """Seconds that a node has to leave after SIGTERM. A machine's own notice of its end says how many itself."""
    warm_spares: NonNegativeInt = 0
    """Processes that stand by, started and with the data at hand, to take the place of lost ones."""
    runtime_env: dict[str, Any] = {}
    """Passed to Ray for every node: ``working_dir``, ``py_modules``, ``pip``, ``env_vars``, …"""

    @field_validator("address")
    @classmethod
    def _head(cls, address: str) -> str:
        if address.startswith("ray://"):
            raise ValueError("ray:// is the Ray client, without an object store; name the head itself: host:6379")
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"must be local, auto or host:port, got {shown(address)}")
        return address

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        gpus = self.num_gpus * self.nodes_per_actor
        if gpus > 1 and gpus != int(gpus):
            message = (
                f"num_gpus × nodes_per_actor is {gpus:g}; Ray gives a process a fraction of one GPU, or whole ones"
            )
            raise ValueError(message)
        return self

    @property
    def object_store_bytes(self) -> int | None:
        """Size of our own Ray's object store; None: Ray's default."""
        return None if self.object_store_gb is None else int(self.object_store_gb * 1e9)

    @property
    def num_actors(self) -> int:
        """Processes that host the target number of nodes."""
        return -(-self.nodes.most // self.nodes_per_actor)


class EvaluationConfig(Section):
    """Evaluation on held-out data."""

    every_rounds: NonNegativeInt = 1
    """Rounds between two evaluations; 0: only after the last round."""
    max_batches: PositiveInt | None = None
    """Batches of an evaluation at most; ``null``: all held-out data."""
    per_node: bool = False
    """Evaluate each node's own model too, where nodes' models differ, and keep what each node's program reports."""
    average: Average | None = None
    """Running average of the models after rounds, evaluated beside the model and saved."""


class ReplayConfig(Section):
    """Snapshots for replaying rounds, of algorithms that offer it."""

    snapshot_every: NonNegativeInt = 256
    """Rounds between two snapshots of the model in the run directory; 0: none, and all begins with the first model."""
    keep: PositiveInt = 3
    """Snapshots that are kept. ``rounds.log`` stays whole: from the first model any round is rebuilt."""


class Tracking(Part, family="tracking", catalog="starling.orchestrator.config.schema"):
    """Tracker that records parameters and metrics of a run."""

    @abstractmethod
    def observer(self, run_dir: Path) -> Observer | None:
        """Return what is told of the run whose directory is ``run_dir``; ``None``: nobody is."""


class NoTracking(Tracking, name="none"):
    """Records in the run directory alone."""

    def observer(self, run_dir: Path) -> None:
        del run_dir


class MLflowTracking(Tracking, name="mlflow"):
    """Records in MLflow."""

    uri: str | None = Field(default_factory=lambda: _usable(os.environ.get(TRACKING_URI)))
    """Tracking server. Default: ``MLFLOW_TRACKING_URI`` of the environment, or else ``mlflow.db`` (sqlite) beside the
    run directories."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = Field(
        default_factory=lambda: os.environ.get("MLFLOW_EXPERIMENT_NAME", "")[:500] or "starling"
    )
    """Experiment that lists the runs; made if it is missing. Default: ``MLFLOW_EXPERIMENT_NAME``, or ``starling``."""

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        """Refuse at once what MLflow would refuse only when the nodes are up."""
        return uri if uri is None else _checked(uri)

    def observer(self, run_dir: Path) -> Observer:
        from starling.orchestrator.tracking.mlflow_tracker import MLflowTracker

        return MLflowTracker(self, run_dir)


TRACKING_URI = "MLFLOW_TRACKING_URI"


def _usable(uri: str | None) -> str | None:
    """Return the address that the environment names; None if it cannot be written to, as the tracker says later."""
    try:
        return _checked(uri) if uri else None
    except ValueError:
        return None


def _checked(uri: str) -> str:
    if uri == "databricks":
        return uri
    if not uri.isprintable():
        raise ValueError("has characters that no address has")
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme.partition("+")[0] not in _TRACKING_SCHEMES or not rest.startswith("//"):
        known = ", ".join(f"{one}://" for one in _TRACKING_SCHEMES)
        raise ValueError(f"must be sqlite:///path/mlflow.db or a server's address ({known}), got {shown(uri)}")
    if scheme.startswith("http"):
        try:
            host, _ = urlsplit(uri).hostname, urlsplit(uri).port
        except ValueError:
            host = None
        if not host:
            raise ValueError(f"must have a host, as in http://localhost:5000, got {shown(uri)}")
    return uri


class Config(Section):
    """Configuration of a run."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: str = "run"
    """First part of the names of run directories."""
    seed: int = 0
    """Seed from which all randomness of a run derives."""
    rounds: Annotated[int, Field(gt=0, le=10**12)] = 10
    """Rounds that are committed before the run is over."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Answer to a NaN or infinite loss of a node: end the run, or leave out that node's round."""
    on_divergence: Literal["stop", "heal"] = "stop"
    """Answer to replicas whose shared state differs at a commit: end the run, or give the majority's to the others."""
    algorithm: Algorithm
    """Algorithm: what nodes exchange, and when."""
    task: Task
    """Model, loss, data and metrics."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    replay: ReplayConfig = ReplayConfig()
    cluster: ClusterConfig = ClusterConfig()
    network: NetworkConfig = NetworkConfig()
    faults: FaultsConfig = FaultsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: Tracking = Field(default_factory=MLflowTracking)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"must be at most 64 letters, digits, '.', '_' or '-', the first a letter or digit, got {shown(name)}"
            )
        return name

    @field_validator("algorithm", mode="after")
    @classmethod
    def _supported(cls, algorithm: Algorithm) -> Algorithm:
        if algorithm.synchronous and algorithm.has_server:
            raise ValueError(f"{algorithm.name} has a server program and is synchronous; set its synchronous to False")
        if algorithm.replicated and not algorithm.synchronous:
            raise ValueError(f"{algorithm.name} is replicated and asynchronous; nothing keeps its replicas alike")
        return algorithm

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        try:
            self.algorithm.validate_for(self.num_nodes)
        except SettingsError as error:
            raise ValueError(f"algorithm: {error}") from None
        for key, part in self.algorithm:
            if isinstance(part, Aggregator) and part.least > 1 and self.nodes_for(part.least) is None:
                raise ValueError(
                    f"algorithm.{key}: {part.name} needs {part.least} contributions, and of {self.num_nodes} nodes "
                    "fewer contribute to a round; let it leave out fewer, or more nodes take part"
                )
        named = [("network.links", node) for link in self.network.links for node in link.between]
        named += [("faults.events", event.node) for event in self.faults.events if isinstance(event.node, int)]
        for event in self.faults.events:
            if event.node == SERVER_NAME and not self.algorithm.has_server:
                raise ValueError(f"faults.events names the server, and {self.algorithm.name} has none")
            if event.phase in ("post", "measure", "secure", "deliver") and not self.algorithm.synchronous:
                raise ValueError(
                    f"faults.events: {self.algorithm.name} is asynchronous, its rounds have no moment {event.phase!r}; "
                    "they have train, receive, commit and transfer"
                )
        if self.evaluation.per_node and not self.algorithm.synchronous:
            raise ValueError(
                f"evaluation.per_node: {self.algorithm.name} is asynchronous; its nodes are never all at rest"
            )
        if self.evaluation.average is not None and not (self.algorithm.synchronous or self.algorithm.has_server):
            raise ValueError(
                f"evaluation.average: {self.algorithm.name} is asynchronous without a server; no node has the models "
                "of all rounds"
            )
        named += [("network.speeds", node) for node in self.network.speeds]
        which = "max" if self.cluster.nodes.target == "auto" else "target"
        for key, node in named:
            if node >= self.num_nodes:
                raise ValueError(
                    f"{key} names node {node}, but cluster.nodes.{which} is {self.num_nodes} (0 is the first)"
                )
        self._check_late_joins()
        return self

    def _check_late_joins(self) -> None:
        late = self.faults.late
        if not late:
            return
        per = self.cluster.nodes_per_actor
        for node in late:
            together = {*range(node - node % per, min(node - node % per + per, self.num_nodes))}
            if not together <= set(late):
                raise ValueError(
                    f"faults.events: node {node} cannot join late alone, as it shares its process "
                    f"(cluster.nodes_per_actor is {per}); name all of {sorted(together)}"
                )
        first = self.num_nodes - len(late)
        if first < self.cluster.nodes.min:
            raise ValueError(
                f"faults.events: with {len(late)} nodes joining late the run begins with {first}, "
                f"and cluster.nodes.min is {self.cluster.nodes.min}"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes that there are to be; with ``target: auto``, at most."""
        return self.cluster.nodes.most

    @property
    def initial_nodes(self) -> tuple[NodeId, ...]:
        """Nodes with which a run begins, if there is room for them."""
        late = self.faults.late
        return tuple(node for node in range(self.num_nodes) if node not in late)

    def nodes_for(self, least: int) -> int | None:
        """Return the number of nodes of which ``least`` contribute to a round; None: so many never do."""

        def contributing(num_nodes: int) -> int:
            view = View(0, tuple(range(num_nodes)))
            return len(self.algorithm.participants(view, generator(self.seed, 0, "participants")))

        return next((number for number in range(1, self.num_nodes + 1) if contributing(number) >= least), None)

    @property
    def need(self) -> int:
        """Members without which an exchange does not close: max(min, ⌈quorum · view⌉)."""
        return self.need_of(self.num_nodes)

    def need_of(self, view_size: int) -> int:
        """Return the contributions without which an exchange of a view of this size does not close."""
        # Rounded: 0.55 · 20 is 11.000000000000002 in floating point, and must not become 12.
        quorum = math.ceil(round(self.cluster.quorum_fraction * view_size, 9))
        return max(self.cluster.nodes.min, quorum)

    def replica_spec(self) -> ReplicaSpec:
        """Return the settings that all replicas of the run share."""
        return ReplicaSpec(
            algorithm=self.algorithm,
            task=self.task,
            optimizer=self.optimizer,
            batch_size=self.data.batch_size,
            seed=self.seed,
            rounds=self.rounds,
            skip_nan=self.on_nan == "skip",
            min_batch=self.data.min_batch,
            average=self.evaluation.average,
        )

    def dump(self) -> dict[str, Any]:
        """Return all keys with their resolved values, as plain data."""
        return self.model_dump(mode="json")

    def public(self) -> dict[str, Any]:
        """Return plain data without secrets: values of environment variables, and passwords in addresses."""
        data = self.dump()
        variables = data["cluster"]["runtime_env"].get("env_vars")
        if isinstance(variables, dict):
            data["cluster"]["runtime_env"]["env_vars"] = dict.fromkeys(cast("dict[str, str]", variables), "***")
        if self.checkpoint.uri:
            data["checkpoint"]["uri"] = without_password(self.checkpoint.uri)
        if isinstance(self.tracking, MLflowTracking) and self.tracking.uri:
            data["tracking"]["uri"] = without_password(self.tracking.uri)
        for name, value in data["task"].items():
            if isinstance(value, str):
                data["task"][name] = without_password(value)
        return data

    def flat(self) -> dict[str, str]:
        """``{"algorithm.outer.lr": "0.7", …}``, as ``public``: what a tracker records."""
        return {".".join(path): str(value) for path, value in _walk(self.public())}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``a.b=c`` overrides.

    Raises:
        ConfigError: one line for each thing that is wrong: where (file and key), what, and what would be right.
    """
    given(path, "configuration")
    path = Path(path).expanduser()
    return parse(yaml_io.read(path), overrides, source=str(path))


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """Validate plain data; see ``load``."""
    yaml_io.check_bounds(raw, source)
    data = dict(raw)
    settings: dict[Place, str] = {}
    for text in overrides:
        place, value = yaml_io.split(text)
        settings[place] = text
        data = yaml_io.assigned(data, place, value, Config)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        found = list(explain(cast("Iterable[Any]", error.errors()), Config))
    else:
        resolved = config.model_dump()
        found = [*_booleans(data, resolved), *_huge(resolved)]
        if not found:
            return config
    lines = [f"{yaml_io.cut(_source(place, settings, source))}: {yaml_io.cut(line, 600)}" for place, line in found]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"{source}: … and {len(lines) - _MOST_LINES + 1} more of these"]
    raise ConfigError("\n".join(lines))


def _source(place: Place, given: Mapping[Place, str], source: str) -> str:
    """Return the override that set the value at ``place``, or else the file."""
    hits = [text for key, text in given.items() if place[: len(key)] == key or (place and key[: len(place)] == place)]
    return f"--set {hits[-1]}" if hits else source


def _booleans(raw: object, resolved: object, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield the places where a number was given as true or false; pydantic takes them for 1 and 0."""
    if isinstance(raw, bool) and isinstance(resolved, int | float) and not isinstance(resolved, bool):
        yield place, f"{'.'.join(place)} should be a number, got {shown(raw)}"
    elif isinstance(raw, dict) and isinstance(resolved, dict):
        values = {str(key): value for key, value in cast("dict[object, object]", resolved).items()}
        for key, value in cast("dict[object, object]", raw).items():
            yield from _booleans(value, values.get(str(key)), (*place, str(key)))
    elif isinstance(raw, list | tuple) and isinstance(resolved, list | tuple):
        pairs = zip(cast("list[object]", raw), cast("list[object]", resolved), strict=False)
        for index, (item, value) in enumerate(pairs):
            yield from _booleans(item, value, (*place, str(index)))


def _huge(resolved: object) -> Iterator[tuple[Place, str]]:
    """Yield the places of numbers beyond float32, in which most of them are used."""
    for place, value in _walk(resolved):
        if isinstance(value, float) and _LARGEST < abs(value) < math.inf:
            yield place, f"{'.'.join(place)} should be {_LARGEST:.3g} at most, the largest float32, got {shown(value)}"


def _walk(data: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(data, dict) and data:
        for key, value in cast("dict[str, object]", data).items():
            yield from _walk(value, (*path, str(key)))
    else:
        yield path, data
