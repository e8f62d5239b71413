"""The configuration: every wrong key and value has its line, overrides reach every key, what is dumped reads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from starling.algorithms.federated.fedavg import FedAvg
from starling.algorithms.low_communication.diloco import DiLoCo
from starling.algorithms.outer import SGD, Nesterov
from starling.algorithms.topologies import Topology
from starling.algorithms.topologies.torus import Torus
from starling.orchestrator.config.schema import Config, MLflowTracking, NoTracking, load, parse
from starling.orchestrator.errors import ConfigError
from tests.paths import ROOT

SMALL: dict[str, Any] = {"algorithm": "fedavg", "task": "digits"}


def complaint(raw: dict[str, Any], *overrides: str) -> str:
    """What is said of a wrong configuration, one line."""
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides, source="run.yaml")
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- defaults and sections ------------------------------------------------------------------------------------------


def test_two_keys_are_enough():
    config = parse(SMALL)
    assert isinstance(config.algorithm, FedAvg)
    assert config.num_nodes == 4
    assert config.tracking == MLflowTracking()
    assert config.replica_spec().seed == 0


def test_parts_by_name_or_in_full():
    config = parse(SMALL | {"algorithm": {"name": "diloco", "outer": {"name": "sgd", "lr": 0.5}}, "tracking": "none"})
    assert config.algorithm == DiLoCo(outer=SGD(lr=0.5))
    assert config.tracking == NoTracking()


@pytest.mark.parametrize(
    ("minimum", "target", "fraction", "need"), [(1, 4, 0.5, 2), (3, 4, 0.5, 3), (1, 5, 0.5, 3), (1, 4, 1, 4)]
)
def test_need_is_a_quorum_and_at_least_the_minimum(minimum, target, fraction, need):
    cluster = {"nodes": {"min": minimum, "target": target}, "quorum_fraction": fraction}
    assert parse(SMALL | {"cluster": cluster}).need == need


# --- what is wrong, in a line ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    # keys
    ({"roundz": 3}, "roundz is not a field of the configuration (did you mean rounds?)"),
    ({3: 4}, "3 is not a field of the configuration (there are: schema_version, name"),
    ({"algorithm": {"name": "fedavg", "epoch": 2}}, "algorithm.epoch is not a field of fedavg (did you mean epochs?)"),
    ({"data": {"batchsize": 8}}, "data.batchsize is not a field of data (did you mean batch_size?)"),
    (
        {"algorithm": {"name": "diloco", "outer": {"name": "nesterov", "momentun": 0.9}}},
        "algorithm.outer.momentun is not a field of nesterov (did you mean momentum?)",
    ),
    ({"network": {"links": [{"between": [0, 1], "latency": 3}]}}, "network.links.0.latency is not a field of link"),
    (
        {"optimizer": {"name": "adamw", "beta": [0.9, 0.99]}},
        "optimizer: beta is not an option of adamw (did you mean betas?)",
    ),
    # names
    ({"algorithm": "fedavgg"}, "algorithm: no algorithm is called 'fedavgg' (did you mean fedavg?)"),
    ({"algorithm": "xyz"}, "algorithm: no algorithm is called 'xyz' (there are: a_edit, async_diloco, "),
    ({"algorithm": {"epochs": 2}}, "algorithm: name is missing (there are: a_edit, async_diloco, "),
    ({"task": "digit"}, "task: no task is called 'digit' (did you mean digits?)"),
    ({"task": "nowhere:Task"}, "task: cannot import 'nowhere:Task': No module named 'nowhere'"),
    ({"task": "json:Task"}, "task: module 'json' has no 'Task'"),
    (
        {"task": "json:JSONDecoder"},
        "task: 'json:JSONDecoder' is not a Task: derive it from starling.actors.tasks.base.Task",
    ),
    (
        {"optimizer": "adamm"},
        "optimizer.name: no optimizer is called 'adamm' in torch.optim or pytorch_optimizer (did you mean",
    ),
    ({"tracking": "wandb"}, "tracking: no tracking is called 'wandb' (there are: mlflow, none)"),
    (
        {"data": {"partition": "dirichlett"}},
        "data.partition: no partition is called 'dirichlett' (did you mean dirichlet?)",
    ),
    # types
    ({"rounds": "ten"}, "rounds should be a valid integer, got 'ten'"),
    ({"rounds": 1.5}, "rounds should be a valid integer, got 1.5"),
    ({"rounds": True}, "rounds should be a number, got true"),
    ({"optimizer": {"lr": 1e99}}, "optimizer.lr should be 3.4e+38 at most, the largest float32, got 1e+99"),
    ({"rounds": None}, "rounds should be a valid integer, got nothing"),
    (
        {"algorithm": {"name": "diloco", "outer": {"name": "sgd", "lr": True}}},
        "algorithm.outer.lr should be a number, got true",
    ),
    ({"cluster": {"nodes": 4}}, "cluster.nodes must be a section of keys (min, target, max), not 4"),
    ({"data": None}, "data must be a section of keys (source, partition, sampler, batch_size, min_batch), not nothing"),
    (
        {"algorithm": ["fedavg"]},
        "algorithm must be a name, or a section with a name (there are: a_edit, async_diloco, ",
    ),
    ({"network": {"speeds": {"first": 2}}}, "network.speeds.first should be a valid integer, got 'first'"),
    # ranges
    ({"rounds": 0}, "rounds should be greater than 0, got 0"),
    ({"cluster": {"quorum_fraction": 1.5}}, "cluster.quorum_fraction should be less than or equal to 1, got 1.5"),
    (
        {"cluster": {"nodes": {"min": 3, "target": 2}}},
        "cluster.nodes must keep min <= target <= max, got min 3 <= target 2",
    ),
    ({"on_nan": "ignore"}, "on_nan should be 'stop' or 'skip', got 'ignore'"),
    ({"schema_version": 2}, "schema_version should be 1, got 2"),
    ({"name": "a/b"}, "name must be at most 64 letters, digits, '.', '_' or '-'"),
    ({"network": {"speeds": {7: 2}}}, "network.speeds names node 7, but cluster.nodes.target is 4 (0 is the first)"),
    ({"network": {"links": [{"between": [0, 4]}]}}, "network.links names node 4"),
    ({"task": {"name": "text_lm", "model": {"width": 30}}}, "task.model: width 30 is not a multiple of heads 4"),
    ({"optimizer": {"lr": float("nan")}}, "optimizer.lr should be a finite number"),
    (
        {"tracking": {"name": "mlflow", "uri": "runs/mlflow"}},
        "tracking.uri must be sqlite:///path/mlflow.db or a server",
    ),
    (
        {"tracking": {"name": "mlflow", "uri": "http://:80x"}},
        "tracking.uri must have a host, as in http://localhost:5000",
    ),
    # features that are not built yet
    ({"faults": {"rate_per_hour": 0.1}}, "faults.rate_per_hour is not built yet; leave it at 0, got 0.1"),
    (
        {"faults": {"events": [{"kind": "explode", "node": 1, "round": 2}]}},
        "faults.events.0.kind should be 'kill', 'hang', 'preempt' or 'late_join', got 'explode'",
    ),
    (
        {"faults": {"events": [{"kind": "kill", "node": 40, "round": 2}]}},
        "faults.events names node 40, but cluster.nodes.target is 4 (0 is the first)",
    ),
    (
        {"checkpoint": {"every_rounds": 1, "every_s": 5}},
        "checkpoint: takes every_rounds or every_s, not both; leave out one of them",
    ),
    (
        {"checkpoint": {"uri": "ftp://me:secret@there/x"}},
        (
            "checkpoint.uri must be a folder or an address (file://, s3://, gs://, gcs://, abfs://, hdfs://), got "
            "'ftp://me:***@there/x'"
        ),
    ),
]


@pytest.mark.parametrize(("change", "line"), WRONG, ids=[line.partition(" ")[0] for _, line in WRONG])
def test_wrong_input_has_its_line(change, line):
    assert complaint(SMALL | change).startswith(f"run.yaml: {line}")


def test_each_mistake_has_a_line_of_its_own():
    with pytest.raises(ConfigError) as caught:
        parse({"algorithm": {"name": "fedavg", "epochs": 0}, "task": "digits", "rounds": -1, "x": 1}, source="run.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("run.yaml: ") for line in lines)


@pytest.mark.parametrize("key", ["algorithm", "task"])
def test_required_keys_name_what_there_is(key):
    raw = {name: value for name, value in SMALL.items() if name != key}
    assert complaint(raw).startswith(f"run.yaml: {key} is missing (there are: ")


@pytest.mark.parametrize(
    "section",
    [
        {"faults": {"rate_per_hour": 0, "events": [], "seed": 3}},
    ],
)
def test_off_values_are_accepted(section):
    parse(SMALL | section)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////tmp/mlflow.db",
        "sqlite:///mlflow.db",
        "http://localhost:5000",
        "https://me:secret@example.com/mlflow",
        "postgresql+psycopg2://me:secret@host/runs",
        "databricks",
    ],
)
def test_tracking_addresses(uri):
    tracking = parse(SMALL | {"tracking": {"name": "mlflow", "uri": uri}}).tracking
    assert isinstance(tracking, MLflowTracking)
    assert tracking.uri == uri


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("rounds=3", "rounds", 3),
        ("name=my-run", "name", "my-run"),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer=adamw", "optimizer.name", "adamw"),
        ("optimizer.schedule=cosine", "optimizer.schedule.name", "cosine"),
        ("cluster.nodes.target=8", "cluster.nodes.target", 8),
        ("evaluation.max_batches=null", "evaluation.max_batches", None),
        ("network.speeds.2=0.5", "network.speeds", {2: 0.5}),
        ("network.speeds={0: 2, 1: 3}", "network.speeds", {0: 2.0, 1: 3.0}),
        ("algorithm=diloco", "algorithm.name", "diloco"),
        ("algorithm.epochs=2", "algorithm.epochs", 2),
        ("algorithm.outer.lr=0.4", "algorithm.outer.lr", 0.4),
        ("algorithm.outer=nesterov", "algorithm.outer.momentum", 0.9),
        ("algorithm.outer.name=nesterov", "algorithm.outer.momentum", 0.9),
        ("task.model=cnn", "task.model.name", "cnn"),
        ("task.model.width=32", "task.model.width", 32),
        ("tracking=none", "tracking.name", "none"),
        ("tracking.experiment=mine", "tracking.experiment", "mine"),
    ],
)
def test_overrides(override, path, value):
    found: Any = parse(SMALL, [override]).model_dump()
    for key in path.split("."):
        found = found[key]
    assert found == value


def test_overrides_apply_in_order_and_leave_their_source_alone():
    raw = SMALL | {"algorithm": {"name": "diloco", "outer": {"name": "sgd", "lr": 0.5}}}
    config = parse(raw, ["rounds=3", "rounds=4", "algorithm.outer=nesterov", "algorithm.outer.lr=0.1"])
    assert config.rounds == 4
    assert config.algorithm == DiLoCo(outer=Nesterov(lr=0.1))
    assert raw["algorithm"] == {"name": "diloco", "outer": {"name": "sgd", "lr": 0.5}}


def test_an_override_reaches_into_a_list():
    raw = SMALL | {"network": {"links": [{"between": [0, 1]}, {"between": [1, 2]}]}}
    links = parse(raw, ["network.links.1.latency_ms=30"]).network.links
    assert [link.latency_ms for link in links] == [None, 30]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rounds", "--set rounds: write it as key.path=value"),
        ("=3", "--set =3: write it as key.path=value"),
        ("rounds=x", "--set rounds=x: rounds should be a valid integer, got 'x'"),
        ("rounds=", "--set rounds=: rounds should be a valid integer, got nothing"),
        ("algorithm.inner_stepz=3", "--set algorithm.inner_stepz=3: algorithm.inner_stepz is not a field of fedavg"),
        ("optimizer.lr=[", "--set optimizer.lr=[: optimizer.lr should be a valid number, got '['"),
        ("rounds.x=3", "--set rounds.x=3: rounds should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(override, line):
    assert complaint(SMALL, override).startswith(line)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_and_what_is_dumped_of_it_are_the_same(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "algorithm: {name: diloco, inner_steps: 20}\n"
        "task: {name: text_lm, model: {layers: 2}}\n"
        "optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95], schedule: {name: cosine, warmup_steps: 5}}\n"
        "network: {speeds: {1: 0.5}, links: [{between: [0, 2], bandwidth_mbps: 10}]}\n"
        "cluster: {runtime_env: {env_vars: {A: '1'}}}\n"
    )
    config = load(path, ["seed=7"])
    assert config.optimizer.lr == 1e-3
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.dump()))
    assert load(again) == config
    assert parse(config.dump()) == config


def test_flat_has_every_key_once_and_no_secret():
    raw = SMALL | {
        "cluster": {"runtime_env": {"env_vars": {"TOKEN": "abc"}}},
        "tracking": {"name": "mlflow", "uri": "postgresql://me:abc@host/runs"},
    }
    config = parse(raw)
    flat = config.flat()
    assert flat["algorithm.name"] == "fedavg"
    assert flat["algorithm.outer.lr"] == "1.0"
    assert flat["data.partition.name"] == "iid"
    assert flat["cluster.runtime_env.env_vars.TOKEN"] == "***"
    assert flat["tracking.uri"] == "postgresql://me:***@host/runs"
    assert config.dump()["cluster"]["runtime_env"]["env_vars"] == {"TOKEN": "abc"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "must be a mapping of keys (algorithm, task, …); it is empty"),
        ("- a\n", "must be a mapping of keys (algorithm, task, …); it is a list"),
        ("a: [1\nb: 2\n", ", line 2, column 2: is not a configuration: expected ',' or ']', but got ':'"),
        ("rounds: 1\nseed: 2\nrounds: 3\n", ", line 3, column 1: is not a configuration: 'rounds' is there twice"),
        (
            "a:\n\tb: 1\n",
            ", line 2, column 1: is not a configuration: found character '\\t' that",
        ),
        ("[1, 2]: 3\n", ", line 1, column 1: is not a configuration: a key must be a word"),
        (
            "a: !!python/object:os.system {}\n",
            ", line 1, column 4: is not a configuration: the tag 'tag",
        ),
    ],
)
def test_broken_files(tmp_path: Path, text: str, line: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value).removeprefix(str(path)).removeprefix(": ")
    assert message.startswith(line)
    assert "\n" not in message


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_a_config_is_frozen():
    config = parse(SMALL)
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]


def test_keys_in_the_task_s_addresses_are_not_public():
    config = parse(SMALL | {"task": {"name": "digits", "init_from": "s3://AKIA:secret@bucket/run"}})
    assert config.public()["task"]["init_from"] == "s3://AKIA:***@bucket/run"
    assert config.dump()["task"]["init_from"] == "s3://AKIA:secret@bucket/run"


def test_every_key_is_documented():
    text = (ROOT / "docs" / "configuration.md").read_text()
    keys = parse(SMALL | {"tracking": "mlflow"}).flat()
    for key in (key for key in keys if not key.startswith(("algorithm.", "task."))):
        parts = ("data.partition.name", "data.sampler.name", "tracking.name")
        known = key.removesuffix(".name") if key in parts else key
        assert f"| `{known}` |" in text, key


class WithServer(FedAvg):
    async def server(self, node):
        pass


class Barrierless(FedAvg):
    synchronous: ClassVar[bool] = False


class OnATorus(FedAvg):
    topology: Topology = Torus(rows=4, cols=4)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (WithServer(), "has a server program and is synchronous"),
        (Barrierless(), "is replicated and asynchronous"),
        (OnATorus(), r"algorithm: .*torus"),
    ],
)
def test_forms_of_algorithms_that_cannot_be_are_refused(algorithm, message):
    with pytest.raises(ConfigError, match=message):
        parse({"algorithm": algorithm, "task": "digits"})
