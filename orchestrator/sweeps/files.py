"""The files that a sweep leaves: its table, the best configuration, pictures."""

from __future__ import annotations

import csv
import logging
from typing import TYPE_CHECKING

from starling.orchestrator.config.yaml_loader import dump
from starling.orchestrator.sweeps.result import SweepResult, _trial_json, board_metrics
from starling.orchestrator.sweeps.space import assigned

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.sweeps.trials import Board


_LOG = logging.getLogger("starling")


def write(result: SweepResult, board: Board, config: Config) -> None:
    """Write everything that is made of a sweep's trials into its directory; what cannot be written is said."""
    import json

    folder = result.sweep_dir
    try:
        _write_table(result, folder / "results.csv")
        (folder / "summary.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        if result.best is not None:
            _write_config(result, config, folder / "best.yaml")
            from starling.orchestrator.sweeps.plots import draw

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
