"""Sources of samples, and the searchers that give Ray Tune their trials."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.search import Searcher

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.sweeps.space import Values, plain, sampled
from starling.orchestrator.sweeps.trials import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starling.orchestrator.sweeps.trials import Board, Objective, Row
    from starling.tune_spaces import Space


class Source(Protocol):
    """Thinks of samples."""

    def ask(self, number: int) -> Values:
        """Return sample ``number``."""
        ...

    def tell(self, number: int, values: Values, row: Row | None) -> None:
        """Hear the results of a sample; None: it has none that can be compared."""
        ...


class RandomSource:
    """Samples that are independent; the ``number``-th is always the same."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def ask(self, number: int) -> Values:
        return sampled(self._space, self._seed, number)

    def tell(self, number: int, values: Values, row: Row | None) -> None:
        del number, values, row


class OptunaSource:
    """Optuna's tree-structured Parzen estimator, of one objective or several.

    Reference: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; Optuna's ``TPESampler``.
    """

    def __init__(self, space: Space, objectives: Sequence[Objective], seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError("--search optuna: Optuna is not installed here: pip install 'optuna>=5,<6'") from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._objectives = tuple(objectives)
        self._distributions: dict[str, Any] = OptunaSearch.convert_search_space(space)
        self._study = optuna.create_study(
            directions=["minimize" if one.mode == "min" else "maximize" for one in objectives],
            sampler=optuna.samplers.TPESampler(seed=seed & 0xFFFFFFFF),
        )
        self._open: dict[int, Any] = {}

    def ask(self, number: int) -> Values:
        trial = self._open[number] = self._study.ask(self._distributions)
        return {path: plain(value) for path, value in trial.params.items()}

    def tell(self, number: int, values: Values, row: Row | None) -> None:
        found = None
        if row is not None and all(one.metric in row.means for one in self._objectives):
            found = [row.means[one.metric] for one in self._objectives]
        state = self._optuna.trial.TrialState.FAIL if found is None else self._optuna.trial.TrialState.COMPLETE
        trial = self._open.pop(number, None)
        if trial is not None:
            self._study.tell(trial, found, state=state)
        else:  # of an earlier session
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=values, distributions=self._distributions, values=found, state=state
                )
            )


class Trials(Searcher):
    """Gives Tune trials, one after the other."""

    numbers: dict[str, int]
    """Numbers of trials, by Tune's names for them."""
    _trials: Iterator[Trial]
    _spec: Callable[[Trial], dict[str, Any]]

    def suggest(self, trial_id: str) -> Any:  # noqa: ANN401 - a config, or a word of Tune's
        trial = next(self._trials, None)
        if trial is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        return self._spec(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002
        """Do nothing: the board knows the trial's end."""

    def sample_done(self, number: int) -> None:
        """Hear that a trial is over."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: all is in the sweep's own directory, and nothing is read back with pickle."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: nothing was saved."""


class SampleTrials(Trials):
    """Gives Tune the trials of a sweep, a sample's seeds one after the other.

    Args:
        board: knows what there was before: trials that are over are not run again, others go on.
        source: of new samples.
        num_samples: in all.
        seeds: of each sample's trials.
        spec: what Tune calls the config of a trial.
    """

    def __init__(
        self,
        board: Board,
        source: Source,
        num_samples: int,
        seeds: Sequence[int],
        spec: Callable[[Trial], dict[str, Any]],
    ) -> None:
        objective = board.objectives[0]
        super().__init__(metric=objective.metric, mode=objective.mode)
        self.numbers = {}
        self._board, self._source, self._spec = board, source, spec
        self._num_samples, self._seeds = num_samples, tuple(seeds)
        self._trials = self._all()
        for trials in self._by_sample(list(board.of_stage("search"))):
            if len(trials) == len(self._seeds) and all(one.end is not None for one in trials):
                self._tell(trials[0])

    def _all(self) -> Iterator[Trial]:
        known = {(trial.sample, trial.seed): trial for trial in self._board.of_stage("search")}
        for sample in range(self._num_samples):
            values: Values | None = next((one.values for one in known.values() if one.sample == sample), None)
            for seed in self._seeds:
                trial = known.get((sample, seed))
                if trial is None:
                    values = self._source.ask(sample) if values is None else values
                    trial = Trial(len(self._board.trials), sample, seed, values)
                    self._board.add(trial)
                if trial.end is None:
                    yield trial

    @staticmethod
    def _by_sample(trials: list[Trial]) -> list[list[Trial]]:
        trials.sort(key=lambda one: (one.sample, one.number))
        return [list(group) for _, group in itertools.groupby(trials, key=lambda one: one.sample)]

    def _tell(self, trial: Trial) -> None:
        row = next((one for one in self._board.rows() if one.first.sample == trial.sample), None)
        self._source.tell(trial.sample, trial.values, row)

    def sample_done(self, number: int) -> None:
        """Tell the source, if all trials of the sample are over."""
        trial = self._board.trials[number]
        others = [one for one in self._board.of_stage(trial.stage) if one.sample == trial.sample]
        if trial.stage == "search" and len(others) == len(self._seeds) and all(one.end for one in others):
            self._tell(trial)


class Given(Trials):
    """Trials that are there already, in order."""

    def __init__(self, trials: Sequence[Trial], spec: Callable[[Trial], dict[str, Any]]) -> None:
        super().__init__()
        self.numbers = {}
        self._trials = iter([one for one in trials if one.end is None])
        self._spec = spec
