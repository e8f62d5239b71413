"""Sweeps: many runs of one configuration with values from a search space, the best of them, and the Pareto front.

::

    from orchestrator.sweep import Options, sweep

    result = sweep("examples/diloco.yaml", Options(space="diloco", samples=8, scheduler="asha"))
    print(result.best.first.values, result.best.means, result.best_config)

The directory of a sweep::

    config.yaml      the configuration, all keys resolved
    sweep.json       what was asked for
    trials.jsonl     what happened (orchestrator.sweep_board)
    trials/          a run directory for each trial
    results.csv      a row for each trial
    best.yaml        the best trial's configuration; `starling run` takes it
    sweep.png        losses over rounds, and objectives against each other
    summary.json     what `--json` prints
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from algorithms.registry import carried
from orchestrator import identity, ray_session, run_files, yaml_file
from orchestrator.api import resolve
from orchestrator.config import MLflowTracking, parse
from orchestrator.errors import ClusterError, ConfigError, RunDirectoryError, RunError
from orchestrator.explain import shown
from orchestrator.given_path import given
from orchestrator.lease import Lease
from orchestrator.run_files import SweepFile
from orchestrator.safe_files import Folder
from orchestrator.searchers import Given, OptunaSource, RandomSource, Samples
from orchestrator.spool import TRIALS_OF
from orchestrator.sweep_board import TRIALS, Board, Objective, Trial
from orchestrator.sweep_result import SweepResult, write
from orchestrator.sweep_space import check
from orchestrator.tracking import probe
from orchestrator.yaml_loader import dump

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from orchestrator.api import Source
    from orchestrator.config import Config
    from orchestrator.sweep_tracking import SweepTracking
    from orchestrator.tuning import Watcher

_FILE = "sweep.json"
_MOST = 1000
"""Trials at a time."""


_MOST_TRIALS = 1_000_000
"""Of a sweep: more is a typing error, or damage."""


@dataclass(frozen=True)
class Options:
    """What is asked of a sweep."""

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
    """After a simulated sweep: how many of the best are run again on the cluster."""

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
        """What is to be small, or large."""
        return tuple(Objective.parse(text) for text in self.metrics)


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
    raw = yaml_file.read(folder / "config.yaml")
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
    """What may reach for code or for places elsewhere."""
    return {**config, "sweep": {"space": options.space}}


def _refuse(config: Config, options: Options) -> None:
    """Refuse what would fail later.

    Raises:
        StarlingError: one line for each thing that is wrong.
    """
    import tune_spaces
    from orchestrator.tuning import scheduler_of

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
    from orchestrator.tuning import Watcher

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
    import tune_spaces
    from orchestrator.sweep_tracking import SweepTracking

    if not isinstance(config.tracking, MLflowTracking):
        return None
    return SweepTracking(config.tracking, folder, config, options, tune_spaces.find(options.space))


def _search(folder: Path, config: Config, options: Options, board: Board, watcher: Watcher) -> None:
    import tune_spaces
    from orchestrator.tuning import scheduler_of, tune_all

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
    with _Ray(config, options, simulated=options.simulate) as place:
        stepwise = options.scheduler != "none"
        searcher = Samples(
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
        )


def _confirm(folder: Path, config: Config, options: Options, board: Board, watcher: Watcher) -> None:
    """Run the best samples again on the cluster."""
    from orchestrator.tuning import scheduler_of, tune_all

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
    with _Ray(config, options, simulated=False) as place:
        searcher = Given(trials, lambda trial: place.spec(folder, trial, stepwise=False))
        tune_all(
            folder,
            board,
            searcher,
            scheduler_of("none", config, board, {}),
            num_trials=len(trials),
            max_concurrent=min(place.room, len(trials)),
            watcher=watcher,
        )


class _Ray:
    """The Ray on which trials run, and how many of them at a time."""

    def __init__(self, config: Config, options: Options, *, simulated: bool) -> None:
        self._config, self._options, self._simulated = config, options, simulated
        self.room = 0
        self._machine: str | None = None

    def __enter__(self) -> Self:
        import ray

        from orchestrator.trial import bundles, count_fitting, machine_of_driver

        config = self._config
        wanted = bundles(config, simulated=self._simulated, machine=None)
        each = sum(one.get("CPU", 0.0) for one in wanted)
        address = config.cluster.address
        if self._simulated:  # which needs nothing but this machine
            address = "auto" if ray.is_initialized() else "local"
        self._session = ray_session.connect(
            address,
            num_cpus=max(os.cpu_count() or 1, each),
            object_store_bytes=config.cluster.object_store_bytes,
            runtime_env=config.cluster.runtime_env or None,
        )
        try:
            self._machine = machine_of_driver()
            wanted = bundles(config, simulated=self._simulated, machine=self._machine)
            asked = self._options.max_concurrent
            fits = count_fitting(wanted, asked or _MOST)
            self._refuse(asked, fits, each, sum(one.get("GPU", 0.0) for one in wanted))
            self.room = asked or fits
        except BaseException:
            self._session.close()
            raise
        return self

    def _refuse(self, asked: int | None, fits: int, cpus: float, gpus: float) -> None:
        if fits >= (asked or 1):
            return
        what = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        of = "the simulator" if self._simulated else f"{self._config.num_nodes} nodes"
        least = "lower cluster.num_cpus, or add machines (ray status)"
        if asked:
            raise ClusterError(
                f"--max-concurrent {asked}: {fits} trials fit at a time, each of which asks for {what} ({of}); "
                f"take that many, {least}"
            )
        raise ClusterError(f"cluster: no trial fits: it asks for {what} ({of}); {least}")

    def spec(self, folder: Path, trial: Trial, *, stepwise: bool) -> dict[str, Any]:
        """What Tune is to call the config of a trial."""
        return {
            "folder": str(folder),
            "number": trial.number,
            "seed": trial.seed,
            "values": trial.values,
            "simulated": self._simulated,
            "machine": self._machine,
            "stepwise": stepwise,
            "clones": self._options.scheduler == "pbt" and trial.stage == "search",
        }

    def __exit__(self, *_: object) -> None:
        self._session.close()
