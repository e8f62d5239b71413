"""The cluster files that we ship: Ray's own schema and completion, and what Ray does not check."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.paths import ROOT

CLOUDS = ["cluster.yaml", "examples/clusters/gcp.yaml"]
LAUNCHED = [*CLOUDS, "examples/clusters/on-premises.yaml"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
SPOT = {"aws": ("InstanceMarketOptions", "MarketType", "spot"), "gcp": ("scheduling", "provisioningModel", "SPOT")}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def commands(config: dict[str, Any]) -> list[str]:
    return [line for key, lines in config.items() if key.endswith("commands") for line in lines]


def kuberay() -> dict[str, Any]:
    custom = read("examples/clusters/kuberay.yaml")
    custom["metadata"].setdefault("namespace", "default")
    return custom


# --- Ray's own checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_and_completes_it(name: str):
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_ray_derives_an_autoscaling_configuration_from_the_kuberay_cluster():
    derived = _derive_autoscaling_config_from_ray_cr(kuberay())
    validate_config(derived)
    types = derived["available_node_types"]
    assert {name: (one["min_workers"], one["max_workers"]) for name, one in types.items() if "gpu" in name} == {
        "gpu-spot": (0, 8),
        "gpu-ondemand": (0, 2),
    }
    assert all(one["resources"]["GPU"] == 1 for name, one in types.items() if "gpu" in name)
    assert types["headgroup"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_refuses_what_is_misspelt_in_it(name: str):
    config = prepare_config(read(name))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(config | {"max_worker": 3})


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOUDS)
def test_every_machine_is_labelled_as_what_it_is(name: str):
    config = read(name)
    option, key, value = SPOT[config["provider"]["type"]]
    for kind, one in config["available_node_types"].items():
        validate_node_label_syntax(one["labels"])
        is_spot = one["node_config"].get(option, {}).get(key) == value
        # Also the head: a selector `!spot` matches machines that have no such label.
        assert one["labels"]["ray.io/market-type"] == ("spot" if is_spot else "on-demand"), kind
        assert ("ray.io/accelerator-type" in one["labels"]) == ("GPU" in one["resources"]), kind
        assert one["labels"]["starling.io/role"] == ("head" if kind == config["head_node_type"] else "node")


def test_kuberays_groups_are_labelled():
    for group in kuberay()["spec"]["workerGroupSpecs"]:
        validate_node_label_syntax(group["labels"])
        is_spot = "nodeSelector" in group["template"]["spec"]
        assert group["labels"]["ray.io/market-type"] == ("spot" if is_spot else "on-demand")


# --- semantics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOUDS)
def test_numbers_of_machines(name: str):
    config = read(name)
    head = config["available_node_types"][config["head_node_type"]]
    workers = {kind: one for kind, one in config["available_node_types"].items() if one is not head}
    # The head comes first, costs little, is not taken away, and no node is placed on it.
    assert head["max_workers"] == 0
    assert head["resources"]["CPU"] == 0
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    # Nothing runs that nobody asked for, and everything ends that nobody uses.
    assert sum(one["min_workers"] for one in workers.values()) == 0
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert all(one["min_workers"] <= one["max_workers"] <= config["max_workers"] for one in workers.values())
    spot = [one for one in workers.values() if one["labels"]["ray.io/market-type"] == "spot"]
    fallback = [one for one in workers.values() if one not in spot]
    assert spot
    assert fallback
    assert min(one["priority"] for one in spot) > max(one["priority"] for one in fallback)
    assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", LAUNCHED)
def test_all_machines_get_this_version_with_the_tested_ones_of_all_else(name: str):
    config = read(name)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel = f"starling-{version}-py3-none-any.whl"
    mounted = {Path(remote).name: local for remote, local in config["file_mounts"].items()}
    assert mounted[wheel] == f"dist/{wheel}"
    assert mounted["constraints.txt"] == "constraints.txt"
    assert "ray" in PINNED
    (line,) = [line for line in config["setup_commands"] if "pip install" in line]
    assert f"--constraint ~/starling/constraints.txt ~/starling/{wheel}" in line


def test_kuberays_version_is_the_tested_one():
    assert kuberay()["spec"]["rayVersion"] == PINNED["ray"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_starts_with_a_token_and_bound_safely(name: str):
    config = read(name)
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])
    starts = [line for line in commands(config) if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert not any("0.0.0.0" in line for line in commands(config))
    (head,) = [line for line in starts if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--port=6379" in head
    assert "--autoscaling-config=" in head
    (worker,) = [line for line in starts if "--head" not in line]
    assert "--address=$RAY_HEAD_IP:6379" in worker


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_dead_machine_is_known_within_seconds(name: str):
    (head,) = [line for line in commands(read(name)) if "ray start --head" in line]
    said = {key: int(value) for key, value in re.findall(r"RAY_health_check_(\w+)=(\d+)", head)}
    # A machine that is only busy has this long to answer.
    assert 2000 <= said["period_ms"] * said["failure_threshold"] <= 10_000
    assert said["timeout_ms"] <= said["period_ms"] * said["failure_threshold"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_commands_may_be_repeated(name: str):
    appended = [line for line in commands(read(name)) if ">>" in line]
    assert all("grep -q" in line for line in appended)


def test_amazon_opens_nothing_but_what_ray_does():
    # Ray opens ssh, and nothing else; a second rule for the same port is an error of AWS.
    assert read("cluster.yaml")["provider"]["security_group"] == {"GroupName": "starling"}


def test_kuberay_has_a_token_and_no_way_in_from_outside():
    spec = kuberay()["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert spec["autoscalerOptions"]["version"] == "v2"
