"""Options of a sweep: search space, number of trials, search and scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starling.orchestrator.config.messages import shown
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.sweeps.trials import Objective

_MOST_TRIALS = 1_000_000
"""Trials of a sweep at most: more is a typing error, or damage."""


@dataclass(frozen=True)
class Options:
    """Options of a sweep."""

    space: str
    """A name in ``tune_spaces``, ``file.py:name`` or ``module:name``."""
    samples: int
    seeds: int = 1
    """Runs of each sample, with the configuration's seed and those after it."""
    scheduler: Literal["asha", "pbt", "hyperband", "none"] = "none"
    search: Literal["random", "optuna"] = "random"
    max_concurrent: int | None = None
    """Trials at a time; by default as many as there is room for."""
    metrics: tuple[str, ...] = ("loss",)
    """``NAME[:min|max]``; schedulers follow the first."""
    simulate: bool = False
    confirm: int = 0
    """Number of the best trials of a simulated sweep that run again on the cluster."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: one line for each thing that is wrong.
        """
        problems = [
            f"--{name.replace('_', '-')} {shown(value)}: must be at "
            + (f"least {least}" if value < least else f"most {_MOST_TRIALS}")
            for name, value, least in (
                ("samples", self.samples, 1),
                ("seeds", self.seeds, 1),
                ("max_concurrent", self.max_concurrent, 1),
                ("confirm", self.confirm, 0),
            )
            if value is not None and not least <= value <= _MOST_TRIALS
        ]
        if self.confirm and not self.simulate:
            problems.append("--confirm goes with --simulate: what is swept on the cluster needs no confirmation")
        if self.scheduler == "pbt" and (self.search != "random" or self.seeds > 1):
            problems.append("--scheduler pbt begins with random samples, of one seed each, and makes its own of them")
        if self.scheduler == "pbt" and self.max_concurrent is not None:
            problems.append(
                "--scheduler pbt takes no --max-concurrent: a population goes on together, as many at a time as fit"
            )
        if self.scheduler == "pbt" and self.samples < 2:
            problems.append(f"--scheduler pbt: a population has at least 2 samples, got --samples {self.samples}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Metrics to minimize or maximize."""
        return tuple(Objective.parse(text) for text in self.metrics)
