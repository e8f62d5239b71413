"""What a sweep came to, as data, as files, and as a picture."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.records import finite
from orchestrator.sweep_board import TRIALS
from orchestrator.sweep_space import assigned
from orchestrator.yaml_loader import dump

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.config import Config
    from orchestrator.sweep import Options
    from orchestrator.sweep_board import Board, Row, Trial

_LOG = logging.getLogger("starling")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    status: Literal["finished", "failed", "interrupted"]
    sweep_dir: Path
    options: Options
    trials: tuple[Trial, ...]
    rows: tuple[Row, ...]
    """Samples that can be compared, best first."""
    best: Row | None
    front: tuple[Row, ...]
    """The Pareto front, if there are several objectives; else empty."""
    confirmed: tuple[Row, ...]
    """The same of what was run again on the cluster."""
    seconds: float

    @classmethod
    def of(cls, board: Board, folder: Path, options: Options, status: Any, seconds: float) -> SweepResult:  # noqa: ANN401
        """What a board says."""
        front = tuple(board.front()) if len(board.objectives) > 1 else ()
        confirmed = tuple(board.rows("confirm"))
        best = board.best()
        if confirmed and best is not None:
            # What the cluster says of the best few counts.
            best = next((row for row in board.rows() if row.first.number == confirmed[0].first.of), best)
        return cls(
            status,
            folder,
            options,
            tuple(board.trials.values()),
            tuple(board.rows()),
            best,
            front,
            confirmed,
            seconds,
        )

    @property
    def best_config(self) -> Path:
        """A configuration that ``run`` takes."""
        return self.sweep_dir / "best.yaml"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return finite(
            {
                "status": self.status,
                "sweep_dir": str(self.sweep_dir),
                "objectives": {one.metric: one.mode for one in self.options.objectives},
                "trials": [_trial_json(trial) for trial in self.trials],
                "best": None if self.best is None else _row_json(self.best),
                "best_config": str(self.best_config) if self.best is not None else None,
                "pareto_front": [_row_json(row) for row in self.front],
                "confirmed": [_row_json(row) for row in self.confirmed],
                "seconds": self.seconds,
            }
        )


def _trial_json(trial: Trial) -> dict[str, Any]:
    last = trial.reports[-1] if trial.reports else {}
    return {
        "trial": trial.number,
        "sample": trial.sample,
        "seed": trial.seed,
        "stage": trial.stage,
        "status": trial.end or "unfinished",
        "values": trial.values,
        "rounds": trial.rounds,
        "metrics": finite({name: value for name, value in last.items() if name != "round"}),
        "run_dir": f"{TRIALS}/{trial.name}",
        "digest": (trial.summary or {}).get("digest"),
        "error": trial.error,
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "sample": row.first.sample,
        "trials": [trial.number for trial in row.trials],
        "status": row.first.end,
        "values": row.first.values,
        "metrics": finite({name: value for name, value in row.means.items() if name != "round"}),
        "deviations": finite({name: value for name, value in row.deviations.items() if name != "round"}),
    }


def write(result: SweepResult, board: Board, config: Config) -> None:
    """Write everything that is made of a sweep's trials into its directory; what cannot be written is said."""
    import json

    folder = result.sweep_dir
    try:
        _write_table(result, folder / "results.csv")
        (folder / "summary.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        if result.best is not None:
            _write_config(result, config, folder / "best.yaml")
            from orchestrator.sweep_report import draw

            draw(folder / "sweep.png", result, board, config)
    except Exception as error:  # noqa: BLE001 - the journal has everything, and the result is worth more than its picture
        _LOG.warning("what the sweep came to could not be written into %s: %s: %s", folder, type(error).__name__, error)


def _write_table(result: SweepResult, path: Path) -> None:
    rows = [_trial_json(trial) for trial in result.trials]
    paths = list(dict.fromkeys(name for row in rows for name in row["values"]))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    plain = ["trial", "sample", "seed", "stage", "status", "rounds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *metrics, *paths, "digest", "run_dir", "error"])
        for row in rows:
            writer.writerow(
                [
                    *(row[name] for name in plain),
                    *(row["metrics"].get(name, "") for name in metrics),
                    *(row["values"].get(name, "") for name in paths),
                    row["digest"] or "",
                    row["run_dir"],
                    row["error"] or "",
                ]
            )


def _write_config(result: SweepResult, config: Config, path: Path) -> None:
    best = result.best
    assert best is not None
    trial = best.first
    resolved = assigned(config, {"seed": trial.seed, **trial.values})
    values = ", ".join(f"{name}={value}" for name, value in trial.values.items())
    metrics = ", ".join(f"{name} {best.means[name]:.6g}" for name in board_metrics(result) if name in best.means)
    head = (
        f"# The best of {len(result.rows)} samples of {result.options.space}, trial {trial.number}: {metrics}\n"
        f"# {values}\n"
    )
    body = dump(resolved.dump())
    path.write_text(head + body, encoding="utf-8")


def board_metrics(result: SweepResult) -> tuple[str, ...]:
    """What the sweep's objectives are about."""
    return tuple(one.metric for one in result.options.objectives)
