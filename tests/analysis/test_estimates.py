"""Check looks ahead: what a run takes of memory and time, without taking either."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
import torch

from starling.orchestrator.analysis.estimates import Estimate, bounded_memory, layout_of, span
from starling.orchestrator.analysis.plan import make_plan
from starling.orchestrator.config.schema import Config
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import ConfigError


def config(*overrides: str, task: object = "digits") -> Config:
    return resolve({"algorithm": "fedavg", "task": task, "tracking": "none"}, overrides)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0014, "0.0014 seconds"),
        (90, "90 seconds"),
        (121, "2.02 minutes"),
        (7200, "2 hours"),
        (2e5, "2.31 days"),
        (1e9, "31.7 years"),
    ],
)
def test_a_span_is_said_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str):
    assert span(seconds) == text


@pytest.mark.parametrize("shape", [(2**36,), (2**20, 2**16)])
@pytest.mark.parametrize("make", [torch.zeros, np.zeros], ids=["torch", "numpy"])
def test_more_memory_than_allowed_is_one_line(make: Any, shape: tuple[int, ...]):
    before = resource.getrlimit(resource.RLIMIT_AS)
    message = r"need more memory than a check may take, 1.07 GB .* at once\); lower it"
    with pytest.raises(ConfigError, match=message), bounded_memory(2**30, "lower it"):
        make(shape)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_another_error_is_left_alone():
    with pytest.raises(RuntimeError, match="^other$"), bounded_memory(2**30, "lower it"):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    "task",
    [
        {"name": "quadratic", "dimension": 200_000},
        {"name": "quadratic", "dimension": 1000, "samples_per_node": 100_000_000},
    ],
    ids=["matrix", "samples"],
)
def test_a_task_that_is_too_large_is_refused_by_a_check(task: object):
    with pytest.raises(ConfigError, match="need more memory than a check may take") as caught:
        make_plan(config(task=task))
    assert "\n" not in str(caught.value)


def test_a_large_model_is_laid_out_without_its_memory():
    # 256 GB of parameters.
    plan = make_plan(config(task={"name": "digits", "model": {"name": "mlp", "width": 10**9}}))
    assert plan.parameters == 64 * 10**9 + 10**9 + 10 * 10**9 + 10
    assert any("of memory, and this machine has" in warning for warning in plan.warnings)
    assert plan.estimate["step_s"] is None


def test_a_layout_without_values_is_that_of_the_model():
    spec = config(task={"name": "text_lm", "model": {"width": 16, "layers": 1, "heads": 1}}).replica_spec()
    assert layout_of(spec, 1) == layout_of(spec, 2**40) == spec.bench(torch.device("cpu")).shared.layout


def test_memory_of_a_node_counts_what_its_optimizer_keeps():
    plain, adam = (make_plan(config(f"optimizer={{name: {name}}}")) for name in ("sgd", "adamw"))
    # Parameters, a committed copy and the gradient; Adam has two moments.
    assert (plain.estimate["node_bytes"], adam.estimate["node_bytes"]) == (3 * plain.model_bytes, 5 * plain.model_bytes)


def test_a_long_simulation_is_warned_of():
    plan = make_plan(config("rounds=1000000000"))
    assert any(warning.startswith("a simulation takes some") for warning in plan.warnings)
    assert make_plan(config()).warnings == ()
    short = "a simulation needs at least 10 B of memory, and this machine has 5 B left"
    assert Estimate(1, 10, 5, None, None).warnings == (short,)


def test_rounds_of_different_sizes_are_not_all_added_up():
    plan = make_plan(resolve({"algorithm": "edit", "task": "digits", "tracking": "none", "rounds": 10**12}))
    assert plan.payload_bytes is not None
    assert plan.payload_bytes["total"] > 10**12


@pytest.mark.parametrize("override", ["rounds=10000000000000", "cluster.nodes.target=1000000"])
def test_numbers_beyond_all_use_are_refused(override: str):
    with pytest.raises(ConfigError, match="should be less than or equal to"):
        config(override)
