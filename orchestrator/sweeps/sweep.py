"""Sweeps: many runs of one configuration with values from a search space, the best of them, and the Pareto front.

::

    from starling.orchestrator.sweeps.sweep import Options, sweep

    result = sweep("examples/diloco.yaml", Options(space="diloco", samples=8, scheduler="asha"))
    print(result.best.first.values, result.best.means, result.best_config)

The directory of a sweep::

    config.yaml      the configuration, all keys resolved
    sweep.json       what was asked for
    trials.jsonl     what happened (orchestrator.sweeps.trials)
    trials/          a run directory for each trial
    results.csv      a row for each trial
    best.yaml        the best trial's configuration; `starling run` takes it
    sweep.png        losses over rounds, and objectives against each other
    summary.json     what `--json` prints
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from starling.algorithms.registry import carried
from starling.orchestrator.config import yaml_io
from starling.orchestrator.config.schema import MLflowTracking, parse
from starling.orchestrator.config.yaml_loader import dump
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import ConfigError, RunDirectoryError, RunError
from starling.orchestrator.given_path import given
from starling.orchestrator.records import identity, run_files
from starling.orchestrator.records.lease import Lease
from starling.orchestrator.records.run_files import SweepFile
from starling.orchestrator.safe_files import Folder
from starling.orchestrator.sweeps.files import write
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.placement import _Ray
from starling.orchestrator.sweeps.result import SweepResult
from starling.orchestrator.sweeps.search import Given, OptunaSource, RandomSource, SampleTrials
from starling.orchestrator.sweeps.space import check
from starling.orchestrator.sweeps.trials import TRIALS, Board, Trial
from starling.orchestrator.tracking.mlflow_tracker import probe
from starling.orchestrator.tracking.spool import TRIALS_OF

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from starling.orchestrator.api import Source
    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.sweeps.tracking import SweepTracking
    from starling.orchestrator.sweeps.tune import Watcher

_FILE = "sweep.json"


def sweep(
    config: Source,
    options: Options,
    overrides: Sequence[str] = (),
    *,
    sweep_dir: str | Path | None = None,
    trust: bool = False,
    watcher: Callable[[Board, Options, Path], Watcher] | None = None,
    on_result: Callable[[SweepResult], None] = lambda _: None,
) -> SweepResult:
    """Run a sweep.

    Args:
        config: of all runs, but for what the space says; as for ``run``.
        options: what is asked for.
        overrides: as for ``run``.
        sweep_dir: new or empty; by default ``runs/<name>-sweep-<time>-<4 hex>``.
        trust: as for ``run``.
        watcher: makes what is told of trials as they run.
        on_result: told what it came to, also if it was interrupted or failed.

    Raises:
        StarlingError: it could not begin, or no trial came to a result.
        KeyboardInterrupt: it was interrupted; ``resume_sweep`` goes on with it.
    """
    resolved = resolve(config, overrides, trust=trust)
    _refuse(resolved, options)
    folder = _made(resolved, options, sweep_dir)
    board = Board(options.objectives, folder)
    return _carry_out(folder, resolved, options, board, watcher, on_result)


def resume_sweep(
    sweep_dir: str | Path,
    *,
    trust: bool = False,
    watcher: Callable[[Board, Options, Path], Watcher] | None = None,
    on_result: Callable[[SweepResult], None] = lambda _: None,
) -> SweepResult:
    """Go on with a sweep that was interrupted: trials that are over stay, others are run to their end.

    Raises:
        StarlingError: it is no sweep's directory, or as ``sweep``.
    """
    folder, config, options, board = reopen(sweep_dir, trust=trust)
    return _carry_out(folder, config, options, board, watcher, on_result)


def reopen(sweep_dir: str | Path, *, trust: bool = False) -> tuple[Path, Config, Options, Board]:
    """Read what a sweep left in its directory: where it is, its configuration, what was asked for, and its trials.

    Raises:
        ConfigError: it is no sweep's directory, is damaged, or not to be trusted.
    """
    folder = given(sweep_dir, "--resume")
    facts = run_files.read(Folder(folder), _FILE, TypeAdapter(SweepFile))
    if facts is None:
        raise ConfigError(f"--resume {folder}: is not the directory of a sweep (it has no {_FILE})")
    try:
        options = TypeAdapter(Options).validate_json(json.dumps(facts.options), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{folder / _FILE}: options.{run_files.problem(error)}") from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{folder / _FILE}: {line}" for line in str(error).splitlines())) from None
    raw = yaml_io.read(folder / "config.yaml")
    identity.require_trust(folder, _marked(raw, options), trust=trust)
    for entry in facts.sys_path if trust or identity.is_ours(folder) else ():
        if entry not in sys.path:
            sys.path.append(entry)
    resolved = parse(raw, source=str(folder / "config.yaml"))
    _refuse_links(folder)
    return folder, resolved, options, Board.load(options.objectives, folder)


def _refuse_links(folder: Path) -> None:
    """Refuse a sweep whose trials lie elsewhere: what cannot be gone on with is removed there, and made anew.

    Raises:
        ConfigError: a trial's folder is a link, or the folder of them.
    """
    files = Folder(folder)
    for top in (TRIALS, TRIALS_OF):
        try:
            files.refuse_link(top)
            for one in sorted((folder / top).iterdir()) if (folder / top).is_dir() else ():
                files.refuse_link(f"{top}/{one.name}")
        except OSError as error:
            raise ConfigError(f"{folder / top}/{error.filename or ''}: {run_files.reason(error)}") from None


def _marked(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the settings that may name code or places elsewhere, for the check of trust."""
    return {**config, "sweep": {"space": options.space}}


def _refuse(config: Config, options: Options) -> None:
    """Refuse what would fail later.

    Raises:
        StarlingError: one line for each thing that is wrong.
    """
    from starling import tune_spaces
    from starling.orchestrator.sweeps.tune import scheduler_of

    for path in carried(config.dump()):
        where = "is defined in a script, a notebook or a function, which the processes of trials cannot import"
        raise ConfigError(
            f"{path} {where}: put it in a module (train.py, say) and name it as train:{path.split(':')[1]}"
        )
    space = tune_spaces.find(options.space)
    check(space, options.space, config, seeds=options.seeds)
    scheduler_of(options.scheduler, config, Board(options.objectives), space)
    if isinstance(config.tracking, MLflowTracking):
        probe(config.tracking)


def _made(config: Config, options: Options, path: str | Path | None) -> Path:
    if path is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        path = Path("runs") / f"{config.name}-sweep-{stamp}-{secrets.token_hex(2)}"
    folder = given(path, "sweep directory", RunDirectoryError)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunDirectoryError(
                f"sweep directory {folder} is in use: it is not empty; name another one, or go on with it: "
                f"starling sweep --resume {folder}"
            )
        text = dump(config.dump())
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        identity.write(folder, folder.name, _marked(config.dump(), options), text.encode())
        facts = {"options": asdict(options), "sys_path": [entry for entry in sys.path if entry]}
        (folder / _FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"sweep directory {folder} cannot be made: {error.strerror}") from None
    return folder


def _carry_out(
    folder: Path,
    config: Config,
    options: Options,
    board: Board,
    watch: Callable[[Board, Options, Path], Watcher] | None,
    on_result: Callable[[SweepResult], None],
) -> SweepResult:
    from starling.orchestrator.sweeps.tune import Watcher

    began = time.monotonic()
    lease = Lease(folder)
    status = "failed"
    tracked = _tracking(folder, config, options)
    try:
        watcher = watch(board, options, folder) if watch else Watcher()
        _search(folder, config, options, board, watcher)
        if options.confirm:
            _confirm(folder, config, options, board, watcher)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        board.release()
        result = SweepResult.of(board, folder, options, status, time.monotonic() - began)
        if board.trials:
            write(result, board, config)
            on_result(result)
        if tracked is not None:
            tracked.end(result)
        lease.release()
    if result.best is None:
        first = next((trial for trial in board.trials.values() if trial.error), None)
        reason = f"; the first said: {first.error}" if first else ""
        raise RunError(f"no trial of the sweep came to a result{reason} ({folder})")
    return result


def _tracking(folder: Path, config: Config, options: Options) -> SweepTracking | None:
    from starling import tune_spaces
    from starling.orchestrator.sweeps.tracking import SweepTracking

    if not isinstance(config.tracking, MLflowTracking):
        return None
    return SweepTracking(config.tracking, folder, config, options, tune_spaces.find(options.space))


def _search(folder: Path, config: Config, options: Options, board: Board, watcher: Watcher) -> None:
    from starling import tune_spaces
    from starling.orchestrator.sweeps.tune import Interrupt, scheduler_of, tune_all

    space = tune_spaces.find(options.space)
    scheduler = scheduler_of(options.scheduler, config, board, space)
    source = (
        OptunaSource(space, board.objectives, config.seed)
        if options.search == "optuna"
        else RandomSource(space, config.seed)
    )
    seeds = [config.seed + number for number in range(options.seeds)]
    num_trials = options.samples * len(seeds)
    there = board.of_stage("search")
    if len(there) == num_trials and all(trial.end is not None for trial in there):
        return
    interrupt = Interrupt(folder)
    with _Ray(config, options, interrupt.set, simulated=options.simulate) as place:
        stepwise = options.scheduler != "none"
        searcher = SampleTrials(
            board, source, options.samples, seeds, lambda trial: place.spec(folder, trial, stepwise=stepwise)
        )
        tune_all(
            folder,
            board,
            searcher,
            scheduler,
            num_trials=num_trials,
            # Those that pause for others count too.
            max_concurrent=num_trials if options.scheduler == "pbt" else min(place.room, num_trials),
            watcher=watcher,
            interrupt=interrupt,
        )


def _confirm(folder: Path, config: Config, options: Options, board: Board, watcher: Watcher) -> None:
    """Run the best samples again on the cluster."""
    from starling.orchestrator.sweeps.tune import Interrupt, scheduler_of, tune_all

    there = {trial.of for trial in board.of_stage("confirm")}
    for row in board.rows()[: options.confirm]:
        for trial in row.trials:
            if trial.number not in there:
                board.add(
                    Trial(len(board.trials), trial.sample, trial.seed, trial.values, stage="confirm", of=trial.number)
                )
    trials = board.of_stage("confirm")
    if all(trial.end is not None for trial in trials):
        return
    interrupt = Interrupt(folder)
    with _Ray(config, options, interrupt.set, simulated=False) as place:
        searcher = Given(trials, lambda trial: place.spec(folder, trial, stepwise=False))
        tune_all(
            folder,
            board,
            searcher,
            scheduler_of("none", config, board, {}),
            num_trials=len(trials),
            max_concurrent=min(place.room, len(trials)),
            watcher=watcher,
            interrupt=interrupt,
        )
