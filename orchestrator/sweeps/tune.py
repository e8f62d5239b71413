"""Ray Tune, driven: it decides which trial runs when, and which is stopped; the board knows what happened."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchGenerator
from ray.tune.search.sample import Float, Integer
from ray.tune.stopper import Stopper

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.signals import ENDING
from starling.orchestrator.sweeps.space import plain
from starling.orchestrator.sweeps.trial_actor import STOP_FILE, StarlingTrial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from starling.orchestrator.config.schema import Config
    from starling.orchestrator.sweeps.search import Trials
    from starling.orchestrator.sweeps.trials import Board, Trial
    from starling.tune_spaces import Space

Scheduler: TypeAlias = Literal["asha", "pbt", "hyperband", "none"]

REDUCTION = 3
"""Reduction factor: one in three trials passes a rung (Li et al., arXiv:1603.06560, section 3.6: 3 or 4)."""
_BRACKETS = 3
_MAX_LOSSES = 2
"""Losses of a trial's controller at most."""

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # csv, json and TensorBoard files: the board has all of it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # its own snapshots are older than our checkpoints, and pickled
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


class Watcher:
    """Told what happens in a sweep; every method does nothing unless overridden."""

    def on_trial_start(self, trial: Trial) -> None:
        """Hear that a trial runs."""

    def on_report(self, trial: Trial) -> None:
        """Hear a report of a trial."""

    def on_trial_end(self, trial: Trial) -> None:
        """Hear that a trial is over."""


def scheduler_of(kind: Scheduler, config: Config, board: Board, space: Space) -> TrialScheduler:
    """Tune's scheduler; asynchronous ones count in rounds.

    ``hyperband`` is asynchronous Hyperband: ASHA with three brackets, of which the later ones stop nobody early.

    Raises:
        ConfigError: it could not decide anything.
    """
    if kind == "none":
        return FIFOScheduler()
    every, rounds = config.evaluation.every_rounds, config.rounds
    objective = board.objectives[0]
    if not 0 < every < rounds:
        raise ConfigError(
            f"--scheduler {kind}: trials are compared when they are evaluated, and with evaluation.every_rounds: "
            f"{every} of {rounds} rounds that is at their end alone; set it lower, or use --scheduler none"
        )
    if kind == "pbt":
        return Population(
            time_attr="rounds",
            metric=objective.metric,
            mode=objective.mode,
            perturbation_interval=every,
            hyperparam_mutations={"values": dict(space)},
            require_attrs=False,
            log_config=False,
        )
    found = AsyncHyperBandScheduler(
        time_attr="rounds",
        metric=objective.metric,
        mode=objective.mode,
        max_t=rounds,
        grace_period=every,
        reduction_factor=REDUCTION,
        brackets=_BRACKETS if kind == "hyperband" else 1,
        stop_last_trials=False,
    )
    for trial in board.of_stage("search"):
        if trial.end in ("finished", "stopped"):
            _tell(found, trial)
    return found


class Population(PopulationBasedTraining):
    """Population based training: who is behind goes on from a better one's checkpoint, with values a bit off its own.

    Reference: Jaderberg et al., "Population Based Training of Neural Networks", 2017, arXiv:1711.09846.
    """

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401 - Tune's
        """Return the trial's own configuration with values mutated from the donor's, clipped to the search space."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        domains: Any = self._hyperparam_mutations["values"]
        values = {path: _inside(domains[path], value) for path, value in config["values"].items()}
        return {**trial.config, "values": values}, operations


def _inside(domain: Any, value: Any) -> Any:  # noqa: ANN401 - a domain and what it holds
    if isinstance(domain, Float | Integer):
        most = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
        return domain.cast(min(max(value, domain.lower), most))
    return plain(value)


class Unlimited:
    """A search generator that population based training does not take for one, as it refuses those."""

    def __init__(self, inner: SearchGenerator) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever Tune asks for
        return getattr(self._inner, name)


class _Known:
    """A trial of an earlier session, as a scheduler sees it."""

    def __init__(self, trial: Trial) -> None:
        self.trial_id = f"known-{trial.number}"
        self.config: dict[str, Any] = {}


def _tell(scheduler: AsyncHyperBandScheduler, trial: Trial) -> None:
    known: Any = _Known(trial)
    runner: Any = None
    scheduler.on_trial_add(runner, known)
    for report in trial.reports:
        scheduler.on_trial_result(runner, known, report)


class Interrupt(Stopper):
    """Ends all trials of the sweep in ``folder`` when it is told to, also by another thread."""

    def __init__(self, folder: Path) -> None:
        self._stop_file = folder / STOP_FILE
        self.problem: BaseException | None = None
        self._set = threading.Event()

    def set(self, problem: BaseException) -> None:
        """End; ``problem`` is why."""
        if not self._set.is_set():
            self.problem = problem
            self._set.set()
            # Trials look for it: their actors are busy, and would hear of nothing else.
            self._stop_file.touch()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune writes a snapshot of all that it has, which nobody reads."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._set.is_set()


class _Callback(tune.Callback):
    """Tells the board and the watcher what Tune tells."""

    def __init__(self, board: Board, searcher: Trials, watcher: Watcher, interrupt: Interrupt) -> None:
        self._board, self._searcher, self._watcher, self._interrupt = board, searcher, watcher, interrupt

    def _trial(self, trial: Any) -> Trial:  # noqa: ANN401 - Tune's
        return self._board.trials[self._searcher.numbers[trial.trial_id]]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:  # noqa: ANN401
        known = self._trial(trial)
        if trial.config["values"] != known.values:
            self._board.change(known.number, trial.config["values"])
        self._watcher.on_trial_start(known)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,  # noqa: ANN401
        result: Mapping[str, Any],
        **_: object,
    ) -> None:
        known = self._trial(trial)
        report = {name: result[name] for name in result.get("reported", ()) if name in result}
        if report and (not known.reports or report["rounds"] > known.rounds):
            self._board.report(known.number, report)
            try:
                self._board.check(report)
            except ConfigError as error:
                self._interrupt.set(error)
        end = result.get("end")
        if end is not None:
            self._close(known, end, result["summary"], result["error"])
        else:
            self._watcher.on_report(known)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:  # noqa: ANN401
        known = self._trial(trial)
        if known.end is None:
            self._close(known, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:  # noqa: ANN401
        known = self._trial(trial)
        if known.end is None and self._interrupt.problem is None:  # else it may go on another time
            text = str(trial.get_pickled_error() or "its controller's process died").strip()
            self._close(known, "failed", error=text.splitlines()[-1][:300])

    def _close(self, trial: Trial, end: Any, summary: dict[str, Any] | None = None, error: str | None = None) -> None:  # noqa: ANN401
        if end == "interrupted":
            return  # it may go on another time
        self._board.close(trial.number, end, summary, error)
        self._searcher.sample_done(trial.number)
        self._watcher.on_trial_end(trial)


def tune_all(
    folder: Path,
    board: Board,
    searcher: Trials,
    scheduler: TrialScheduler,
    *,
    num_trials: int,
    max_concurrent: int,
    watcher: Watcher,
    interrupt: Interrupt,
) -> None:
    """Run trials until all are over, or ``interrupt`` is set.

    Raises:
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; all trials have been closed.
        ConfigError: the trials do not report what they are to be judged by; all trials have been closed.
        RunError: the sweep's own Ray is gone.
    """
    algorithm: Any = SearchGenerator(ConcurrencyLimiter(searcher, max_concurrent=max_concurrent))
    if isinstance(scheduler, Population):
        algorithm = Unlimited(algorithm)
    storage = folder / ".tune"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_actors())
        stack.enter_context(_environment())
        stack.enter_context(_quiet())
        stack.enter_context(_signals(lambda: interrupt.set(KeyboardInterrupt())))
        stack.callback(shutil.rmtree, storage, ignore_errors=True)
        stack.callback((folder / STOP_FILE).unlink, missing_ok=True)
        (folder / STOP_FILE).unlink(missing_ok=True)
        tune.run(
            StarlingTrial,
            name="trials",
            storage_path=str(storage),
            search_alg=algorithm,
            scheduler=scheduler,
            num_samples=num_trials,
            stop=interrupt,
            reuse_actors=True,
            # A run that fails says so; what raises is the death of its controller's process. It goes on elsewhere.
            max_failures=_MAX_LOSSES,
            callbacks=[_Callback(board, searcher, watcher, interrupt)],
            trial_dirname_creator=lambda trial: trial.trial_id,
            raise_on_failed_trial=False,
            verbose=0,
        )
    if interrupt.problem is not None:
        raise interrupt.problem


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _plain_actors() -> Iterator[None]:
    """Keep Tune from giving trials environment variables, unless somebody has set one of those that it passes on.

    Ray boots each process that has variables of its own twice, and so all nodes of a trial, by 0.4 s of a core each.
    """
    cache: Any = class_cache._ActorClassCache  # noqa: SLF001 - there is no other way
    before = cache.get
    if not any(name in os.environ for name in class_cache.ENV_VARS_TO_PROPAGATE):
        cache.get = lambda _, trainable: ray.remote(trainable)
    try:
        yield
    finally:
        cache.get = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.train", "ray.air")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """An exception that is raised anywhere in Tune's loop would leave actors behind: it is told to end instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGUSR1)}
    for number in ENDING:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda *_: interrupt())
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
