"""The results of a sweep as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starling.orchestrator.records.observers import finite
from starling.orchestrator.sweeps.trials import TRIALS

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.sweeps.options import Options
    from starling.orchestrator.sweeps.trials import Board, Row, Trial


@dataclass(frozen=True)
class SweepResult:
    """Results of a sweep."""

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
    """Results of trials that were run again on the cluster."""
    seconds: float

    @classmethod
    def of(cls, board: Board, folder: Path, options: Options, status: Any, seconds: float) -> SweepResult:  # noqa: ANN401
        """Return the results that a board has."""
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
        """File of the best configuration, which ``run`` takes."""
        return self.sweep_dir / "best.yaml"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
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
        "metrics": finite({name: value for name, value in last.items() if name != "rounds"}),
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
        "metrics": finite({name: value for name, value in row.means.items() if name != "rounds"}),
        "deviations": finite({name: value for name, value in row.deviations.items() if name != "rounds"}),
    }


def board_metrics(result: SweepResult) -> tuple[str, ...]:
    """Return the metrics of the sweep's objectives."""
    return tuple(one.metric for one in result.options.objectives)
