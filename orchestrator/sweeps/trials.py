"""The board of a sweep: trials, reports, the best sample, the Pareto front. Plain data, no Ray.

``trials.jsonl`` in the sweep's directory has all of it, a line for each thing that happened, written by one process::

    {"trial": 3, "sample": 1, "seed": 1, "stage": "search", "values": {"optimizer.lr": 0.01}}
    {"trial": 3, "report": {"rounds": 4, "loss": 2.1, …}}
    {"trial": 3, "end": "finished", "summary": {…}, "error": null}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import TypeAdapter

from starling.algorithms.registry import did_you_mean
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import run_files
from starling.orchestrator.records.observers import finite
from starling.orchestrator.records.run_files import Count, Stored
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from starling.orchestrator.sweeps.space import Values

Stage: TypeAlias = Literal["search", "confirm"]
End: TypeAlias = Literal["finished", "stopped", "failed", "interrupted"]
"""``stopped``: by the scheduler, as others were better; ``interrupted``: with the sweep."""


class _Report(Stored):
    rounds: Count


class _Line(Stored):
    """A line of ``trials.jsonl``; which fields it has depends on what happened."""

    trial: Count
    sample: Count = 0
    seed: int = 0
    stage: Stage = "search"
    of: Count | None = None
    values: dict[str, Any] = {}
    change: dict[str, Any] = {}
    report: _Report = _Report(rounds=0)
    reopen: Count = 0
    end: End = "finished"
    summary: dict[str, Any] | None = None
    error: str | None = None


_LINE = TypeAdapter(_Line)
_KINDS: dict[str, tuple[str, ...]] = {
    "values": ("sample", "seed", "stage"), "report": (), "change": (), "reopen": (), "end": ("summary", "error"),
}  # fmt: skip
"""Kinds of lines, each with the keys that it has besides."""

JOURNAL = "trials.jsonl"
TRIALS = "trials"

_MAXIMIZED = ("accuracy", "top_")
"""Beginnings of the names of metrics of which more is better."""


@dataclass(frozen=True)
class Objective:
    """A metric, and which way is better."""

    metric: str
    mode: Literal["min", "max"] = "min"

    @classmethod
    def parse(cls, text: str) -> Objective:
        """``NAME``, ``NAME:min`` or ``NAME:max``.

        Raises:
            ConfigError: it is none of them.
        """
        name, colon, mode = text.partition(":")
        if not name or (colon and mode not in ("min", "max")):
            raise ConfigError(f"--metric {text}: write it as NAME, NAME:min or NAME:max")
        if colon:
            return cls(name, "max" if mode == "max" else "min")
        return cls(name, "max" if name.startswith(_MAXIMIZED) else "min")

    @property
    def sign(self) -> float:
        """Factor, 1 or -1, that makes smaller values better."""
        return 1.0 if self.mode == "min" else -1.0


@dataclass
class Trial:
    """One run of a sweep."""

    number: int
    sample: int
    """Index of the sample of the search space; with several seeds, several trials have one index."""
    seed: int
    values: Values
    stage: Stage = "search"
    of: int | None = None
    """Number of the trial that a confirmation confirms."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Reports after evaluated rounds: ``rounds`` (done so far), metrics, ``train_loss``, ``bytes``, ``seconds``."""
    end: End | None = None
    summary: dict[str, Any] | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return name_of(self.number)

    @property
    def rounds(self) -> int:
        """Done, as far as is known."""
        return self.reports[-1]["rounds"] if self.reports else 0

    def value(self, metric: str) -> float | None:
        """Return the last value of a metric; None if there is none, or it is no number."""
        value = self.reports[-1].get(metric) if self.reports else None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def name_of(number: int) -> str:
    """Return the name of a trial's run directory."""
    return f"trial-{number:04}"


@dataclass(frozen=True)
class Row:
    """A sample with the means of its trials, by which samples are compared."""

    trials: tuple[Trial, ...]
    means: dict[str, float]
    deviations: dict[str, float]
    """Standard deviations over the seeds; empty with one."""

    @property
    def first(self) -> Trial:
        """The trial with the first seed."""
        return self.trials[0]


class Board:
    """All trials of a sweep; with a ``path``, also on disk."""

    def __init__(self, objectives: Sequence[Objective], path: Path | None = None) -> None:
        self.objectives: tuple[Objective, ...] = tuple(objectives)
        self.trials: dict[int, Trial] = {}
        self._path = path
        self._file: IO[str] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the objectives."""
        return tuple(one.metric for one in self.objectives)

    # --- what happens ------------------------------------------------------------------------------------------------

    def add(self, trial: Trial) -> None:
        """Add a trial that is to be run."""
        self.trials[trial.number] = trial
        self._write(
            trial=trial.number,
            sample=trial.sample,
            seed=trial.seed,
            stage=trial.stage,
            of=trial.of,
            values=trial.values,
        )

    def change(self, number: int, values: Values) -> None:
        """Give a trial other values, as a scheduler decided."""
        self.trials[number].values = values
        self._write(trial=number, change=values)

    def report(self, number: int, report: dict[str, Any]) -> None:
        """Add a report of a trial."""
        self.trials[number].reports.append(report)
        self._write(trial=number, report=report)

    def close(self, number: int, end: End, summary: dict[str, Any] | None = None, error: str | None = None) -> None:
        """Book the end of a trial."""
        trial = self.trials[number]
        trial.end, trial.summary, trial.error = end, summary, error
        self._write(trial=number, end=end, summary=summary, error=error)

    def reopen(self, number: int, *, keep: int) -> None:
        """Let an unfinished trial go on; forget its reports of rounds after ``keep``."""
        trial = self.trials[number]
        trial.reports = [report for report in trial.reports if report["rounds"] <= keep]
        trial.end = trial.summary = trial.error = None
        self._write(trial=number, reopen=keep)

    def _write(self, **line: Any) -> None:  # noqa: ANN401 - plain data of any kind
        if self._path is None:
            return
        if self._file is None:
            self._file = Folder(self._path).append_text(JOURNAL)
        self._file.write(json.dumps(finite(line)) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @classmethod
    def load(cls, objectives: Sequence[Objective], path: Path) -> Board:
        """Read ``trials.jsonl``; a last line that was cut off is left out.

        Raises:
            ConfigError: there is none, or it is none.
        """
        board = cls(objectives)
        folder, whole = Folder(path), list[bytes]()
        is_cut = False
        try:
            for place, line in enumerate(folder.lines(JOURNAL), 1):
                where = f"{path / JOURNAL}, line {place}"
                is_cut = not line.endswith(b"\n")
                if not is_cut:
                    whole.append(line)
                    run_files.checked(_LINE, line, where)
                    board._read(json.loads(line), where)
            if is_cut:
                folder.write(JOURNAL, b"".join(whole))
        except FileNotFoundError:
            pass  # it was interrupted before its first trial
        except OSError as error:
            raise ConfigError(f"{path / JOURNAL}: {run_files.reason(error)}") from None
        board._path = path
        return board

    def _read(self, line: dict[str, Any], where: str) -> None:
        number = line["trial"]
        kinds = [kind for kind in _KINDS if kind in line]
        lacking = [name for kind in kinds[:1] for name in _KINDS[kind] if name not in line]
        if not kinds or lacking:
            raise ConfigError(f"{where}: {lacking[0] if lacking else ' or '.join(_KINDS)} is missing")
        if "values" not in line and number not in self.trials:
            raise ConfigError(f"{where}: trial {number} was not begun before")
        if "values" in line:
            self.trials[number] = Trial(
                number, line["sample"], line["seed"], line["values"], line["stage"], line.get("of")
            )
        elif "report" in line:
            self.report(number, line["report"])
        elif "change" in line:
            self.change(number, line["change"])
        elif "reopen" in line:
            self.reopen(number, keep=line["reopen"])
        else:
            self.close(number, line["end"], line["summary"], line["error"])

    # --- what it comes to --------------------------------------------------------------------------------------------

    def of_stage(self, stage: Stage) -> list[Trial]:
        """Return the trials of a stage, in order."""
        return [trial for trial in self.trials.values() if trial.stage == stage]

    def rows(self, stage: Stage = "search") -> list[Row]:
        """Return the samples all of whose trials have a value of the first metric, best first.

        Those that went to their end come before those that were stopped on the way.
        """
        samples: dict[int, list[Trial]] = {}
        for trial in self.of_stage(stage):
            samples.setdefault(trial.sample, []).append(trial)
        rows = [self._row(trials) for trials in samples.values()]
        good = [row for row in rows if row is not None]
        first = self.objectives[0]

        def rank(row: Row) -> tuple[bool, float]:
            return any(one.end != "finished" for one in row.trials), first.sign * row.means[first.metric]

        return sorted(good, key=rank)

    def _row(self, trials: Sequence[Trial]) -> Row | None:
        metric = self.objectives[0].metric
        if any(trial.value(metric) is None or trial.end in (None, "failed", "interrupted") for trial in trials):
            return None
        names = [name for name in trials[0].reports[-1] if all(trial.value(name) is not None for trial in trials)]
        columns = {name: [float(trial.reports[-1][name]) for trial in trials] for name in names}
        means = {name: sum(column) / len(column) for name, column in columns.items()}
        deviations = {
            name: math.sqrt(sum((value - means[name]) ** 2 for value in column) / (len(column) - 1))
            for name, column in columns.items()
            if len(column) > 1
        }
        return Row(tuple(trials), means, deviations)

    def best(self, stage: Stage = "search") -> Row | None:
        """Return the best sample that went to its end, else the best of all; None without samples."""
        return next(iter(self.rows(stage)), None)

    def front(self, stage: Stage = "search") -> list[Row]:
        """Return the Pareto front of finished samples: no other is as good in all objectives and better in one."""
        rows = [row for row in self.rows(stage) if all(trial.end == "finished" for trial in row.trials)]
        rows = [row for row in rows if all(metric in row.means for metric in self.metrics)]
        points = [tuple(one.sign * row.means[one.metric] for one in self.objectives) for row in rows]
        return [row for row, point in zip(rows, points, strict=True) if not any(_dominates(q, point) for q in points)]

    def check(self, report: dict[str, Any]) -> None:
        """Check that a report has what the objectives are about.

        Raises:
            ConfigError: it has not.
        """
        for metric in self.metrics:
            if metric not in report:
                raise ConfigError(f"--metric {metric}: the runs do not report it{did_you_mean(metric, _known(report))}")


def _known(report: Iterable[str]) -> list[str]:
    return [name for name in report if name != "rounds"]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
