"""The configuration: one YAML file, strict, whose keys are the fields of these models and of the parts it names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from actors.data import DataConfig
from actors.optimizers import OptimizerConfig
from actors.replica import ReplicaSpec
from actors.tasks import Task
from algorithms.api import Algorithm
from algorithms.registry import Part
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class Section(BaseModel):
    """A part of the file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _off_only(value: Any) -> Any:  # noqa: ANN401 - any scalar or list of a section
    """Accept only the value that switches a feature off, while it is not built."""
    if value:
        message = f"{value!r} asks for a feature that is not built yet; only its off value is accepted"
        raise ValueError(message)
    return value


Off = AfterValidator(_off_only)


class NodesConfig(Section):
    """How many nodes a run has."""

    min: PositiveInt = 1
    """With fewer a round is not finished."""
    target: PositiveInt = 4
    """How many are started."""
    max: PositiveInt | None = None
    """Upper bound; default: the target."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.target <= (self.max or self.target):
            message = f"min <= target <= max must hold; got {self.min}, {self.target}, {self.max}"
            raise ValueError(message)
        return self


class ClusterConfig(Section):
    """Where nodes run, and what each is given."""

    address: str = "local"
    """``local`` starts a Ray of our own for the run; else ``auto`` or the address of a running one."""
    nodes: NodesConfig = NodesConfig()
    num_gpus: NonNegativeFloat = 0
    """Per node; 0 sees none."""
    num_cpus: NonNegativeFloat = 0.25
    """Per node; what Ray reserves."""
    nodes_per_actor: PositiveInt = 1
    """Nodes that share one process."""
    round_deadline_s: PositiveFloat = 120
    """How long an exchange waits for stragglers, from the round's begin and again from each close."""
    start_timeout_s: PositiveFloat = 300
    """How long all nodes may take to come up."""
    min_nodes_timeout_s: PositiveFloat = 600
    cancel_grace_s: PositiveFloat = 10
    quorum_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the view, at least ``nodes.min``: what a round needs to finish."""
    warm_spares: Annotated[NonNegativeInt, Off] = 0
    runtime_env: dict[str, Any] = {}
    """Passed to Ray for every node: ``working_dir``, ``py_modules``, ``pip``, ``env_vars``, …"""

    @property
    def num_actors(self) -> int:
        """Processes that host the target number of nodes."""
        return -(-self.nodes.target // self.nodes_per_actor)


class LinkConfig(Section):
    """One pair of nodes with a link of its own."""

    between: tuple[NonNegativeInt, NonNegativeInt]
    bandwidth_mbps: PositiveFloat | None = None
    latency_ms: NonNegativeFloat = 0


class NetworkConfig(Section):
    """What the simulator assumes about time. On a cluster time is real."""

    bandwidth_mbps: PositiveFloat | None = None
    """Of each node's access link, each way; ``null`` is infinite."""
    latency_ms: NonNegativeFloat = 0
    """One way, between any two nodes."""
    links: tuple[LinkConfig, ...] = ()
    """Pairs that differ."""
    step_ms: NonNegativeFloat = 10
    """One optimizer step of a node of speed 1."""
    speeds: dict[NonNegativeInt, PositiveFloat] = {}
    """Node → relative speed; 1 if not named."""


class EvaluationConfig(Section):
    """When the model is evaluated on held-out data."""

    every_rounds: NonNegativeInt = 1
    """0: only after the last round."""
    max_batches: PositiveInt | None = None
    """``null``: all held-out data."""


class FaultsConfig(Section):
    """Scheduled faults."""

    rate_per_hour: Annotated[float, Off] = 0
    seed: int = 0
    events: Annotated[tuple[dict[str, Any], ...], Off] = ()


class CheckpointConfig(Section):
    """Where and how often the run is saved."""

    uri: Annotated[str | None, Off] = None
    every_rounds: Annotated[NonNegativeInt, Off] = 0
    keep: PositiveInt = 3


class Tracking(Part, family="tracking", catalog="orchestrator.config"):
    """Where a run's parameters and metrics are recorded."""


class NoTracking(Tracking, name="none"):
    """Nowhere but the run directory."""


class MLflowTracking(Tracking, name="mlflow"):
    """In MLflow."""

    uri: str | None = None
    """Default: ``mlflow.db`` (sqlite) beside the run directories."""
    experiment: str = "starling"


class Config(Section):
    """A run."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    seed: int = 0
    rounds: PositiveInt = 10
    on_nan: Literal["stop", "skip"] = "stop"
    algorithm: Algorithm
    task: Task
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    network: NetworkConfig = NetworkConfig()
    faults: FaultsConfig = FaultsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: Tracking = MLflowTracking()

    @field_validator("algorithm", mode="after")
    @classmethod
    def _supported(cls, algorithm: Algorithm) -> Algorithm:
        if not (algorithm.replicated and algorithm.synchronous):
            message = f"{algorithm.name} is not replicated and synchronous; such algorithms are not built yet"
            raise ValueError(message)
        return algorithm

    @property
    def num_nodes(self) -> int:
        """Nodes that are started."""
        return self.cluster.nodes.target

    @property
    def need(self) -> int:
        """Members without which an exchange does not close: max(min, ⌈quorum · view⌉)."""
        quorum = -(-self.cluster.quorum_fraction * self.num_nodes // 1)
        return max(self.cluster.nodes.min, int(quorum))

    def replica_spec(self) -> ReplicaSpec:
        """What every replica of the run needs to know."""
        return ReplicaSpec(
            algorithm=self.algorithm,
            task=self.task,
            optimizer=self.optimizer,
            batch_size=self.data.batch_size,
            seed=self.seed,
            rounds=self.rounds,
            skip_nan=self.on_nan == "skip",
        )

    def dump(self) -> dict[str, Any]:
        """All keys with their resolved values, as plain data."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, str]:
        """``{"algorithm.outer.lr": "0.7", …}``: what a tracker records."""
        return {".".join(path): str(value) for path, value in _walk(self.dump())}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``a.b=c`` overrides.

    Raises:
        ConfigError: one line for each thing that is wrong: where (file and key), what, and what would be right.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{path}: cannot be read: {reason}"
        raise ConfigError(message) from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        message = f"{path}{where}: is not YAML: {getattr(error, 'problem', None) or error}"
        raise ConfigError(message) from None
    if not isinstance(raw, dict):
        message = f"{path}: must be a mapping of keys (algorithm, task, …), not {type(raw).__name__}"
        raise ConfigError(message)
    return parse(cast("dict[str, Any]", raw), overrides, source=str(path))


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """Validate plain data; see ``load``."""
    data = dict(raw)
    for override in overrides:
        data = _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [f"{source}: {line}" for line in _explain(cast("Iterable[Any]", error.errors()), (), Config)]
        raise ConfigError("\n".join(lines)) from None


def _override(data: dict[str, Any], text: str) -> dict[str, Any]:
    """Apply one ``a.b=c``; ``c`` is YAML."""
    key, equals, value_text = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        message = f"--set {text}: write it as key.path=value"
        raise ConfigError(message)
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError:
        value = value_text
    return _assigned(data, path, value)


def _assigned(data: object, path: list[str], value: object) -> dict[str, Any]:
    """A copy of ``data`` with ``value`` at ``path``; a bare name on the way becomes the part of that name."""
    if isinstance(data, str):
        data = {"name": data}
    here = dict(cast("dict[str, Any]", data)) if isinstance(data, dict) else {}
    head, *rest = path
    # YAML may have integer keys (network.speeds); a path has only texts.
    key: Any = int(head) if head.isdigit() else head
    here[key] = _assigned(here.get(key), rest, value) if rest else value
    return here


def _explain(errors: Iterable[Mapping[str, Any]], at: tuple[str, ...], owner: type[BaseModel] | None) -> Iterator[str]:
    """One line for each pydantic error; nested parts keep their places."""
    for error in errors:
        place = (*at, *(str(step) for step in error["loc"]))
        context = error.get("ctx", {})
        if error["type"] == "nested":
            part = context["part_class"]
            yield from _explain(context["errors"], place, part)
            continue
        model = _owner(owner, error["loc"])
        key = ".".join(place) or "the file"
        if error["type"] == "extra_forbidden":
            yield f"{key} is not a field of {_title(model)}{_nearest(place[-1], model)}"
        elif error["type"] == "missing":
            yield f"{key} is missing"
        elif error["type"] in ("unknown_name", "missing_name", "bad_name", "import"):
            yield f"{key}: {error['msg']}"
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = error["input"]
            shown = "" if isinstance(given, dict | list | BaseModel) else f", got {given!r}"
            yield f"{key} {message}{shown}" if message.startswith("should") else f"{key}: {message}"


def _owner(model: type[BaseModel] | None, location: Sequence[object]) -> type[BaseModel] | None:
    """The model in which the last step of ``location`` was looked up."""
    for step in location[:-1]:
        field = model.model_fields.get(str(step)) if model else None
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return model


def _title(model: type[BaseModel] | None) -> str:
    if model is None:
        return "this section"
    if issubclass(model, Part):
        return model.part_name or model.__name__
    return "the configuration" if model is Config else model.__name__.removesuffix("Config").lower()


def _nearest(word: str, model: type[BaseModel] | None) -> str:
    names = list(model.model_fields) if model else []
    near = difflib.get_close_matches(word, names, n=2)
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f" (it has {', '.join(names)})" if names else " (it has none)" if model else ""


def _walk(data: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(data, dict) and data:
        for key, value in cast("dict[str, object]", data).items():
            yield from _walk(value, (*path, str(key)))
    else:
        yield path, data
