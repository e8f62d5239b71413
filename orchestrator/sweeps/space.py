"""Search spaces applied to configurations: keys are paths, and values are checked beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from ray.tune.search.sample import Categorical, Float, Integer

from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.messages import explain
from starling.orchestrator.config.schema import Config
from starling.orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray.tune.search.sample import Domain

    from starling.tune_spaces import Space

Values = dict[str, Any]
"""Values that a sample sets, by path; plain data."""

_FIXED = {
    "name": "a sweep names its trials itself",
    "schema_version": "it names the format",
    "tracking": "all trials of a sweep are tracked in one place",
    "cluster.address": "all trials of a sweep share a cluster",
    "cluster.runtime_env": "all trials of a sweep share a cluster",
    "checkpoint": "a sweep keeps what its trials need",
}
"""Keys that no trial may have of its own, each with the reason."""


def assigned(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with a sample's values.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    data: dict[str, Any] = config.dump()
    for path, value in values.items():
        data = yaml_io.assigned(data, path.split("."), value, Config)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(line for _, line in explain(_errors(error), Config))) from None


def _errors(error: ValidationError) -> list[Mapping[str, Any]]:
    return [dict(one) for one in error.errors()]


def check(space: Space, name: str, config: Config, *, seeds: int = 1) -> None:
    """Check that each key is a path of ``config``, and what it may hold can stand there.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    problems: list[str] = []
    for path, domain in space.items():
        fixed = next((why for key, why in _FIXED.items() if path == key or path.startswith(f"{key}.")), None)
        if fixed is not None:
            problems.append(f"{path} cannot be varied: {fixed}")
            continue
        if path == "seed" and seeds > 1:
            problems.append("seed cannot be varied with --seeds, which varies it")
            continue
        for value in extremes(domain):
            try:
                assigned(config, {path: value})
            except ConfigError as error:
                problems.append(str(error).partition("\n")[0])
                break
    if problems:
        raise ConfigError("\n".join(f"--space {name}: {problem}" for problem in problems))


def extremes(domain: Domain) -> Iterator[Any]:
    """Return the values of a domain that are likeliest to be refused: all of a choice, the ends of an interval."""
    if isinstance(domain, Categorical):
        yield from domain.categories
    elif isinstance(domain, Integer):
        yield from (domain.lower, domain.upper - 1)
    elif isinstance(domain, Float) and np.isfinite([domain.lower, domain.upper]).all():
        yield from (domain.lower, domain.upper)
    else:
        yield from (sampled({"x": domain}, 0, number)["x"] for number in range(2))


def sampled(space: Space, seed: int, number: int) -> Values:
    """Draw random sample ``number``; it depends on ``seed``, not on earlier draws."""
    generator = np.random.default_rng((seed & 0xFFFFFFFFFFFFFFFF, number))
    return {path: plain(domain.sample(random_state=generator)) for path, domain in space.items()}


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever a domain holds
    """Turn a value of numpy's into Python's."""
    return value.item() if isinstance(value, np.generic) else value
