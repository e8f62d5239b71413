"""What a sweep knows of its trials: the journal, what is compared, the Pareto front."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.sweeps.options import Options
from starling.orchestrator.sweeps.search import OptunaSource, RandomSource, SampleTrials
from starling.orchestrator.sweeps.trials import Board, Objective, Trial

LOSS, BYTES = Objective("loss"), Objective("bytes")


def board_of(*points: tuple[float, float], objectives=(LOSS, BYTES), seeds: int = 1) -> Board:
    """One finished trial for each point of loss and bytes; ``seeds`` that follow one another are of one sample."""
    board = Board(objectives)
    for number, (loss, nbytes) in enumerate(points):
        board.add(Trial(number, number // seeds, number % seeds, {"optimizer.lr": 0.1 * (number // seeds + 1)}))
        board.report(number, {"rounds": 4, "loss": loss, "bytes": nbytes})
        board.close(number, "finished", {"digest": str(number)})
    return board


def numbers(rows) -> list[int]:
    return [row.first.number for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss", Objective("loss", "min")),
        ("accuracy", Objective("accuracy", "max")),
        ("top_5", Objective("top_5", "max")),
        ("accuracy:min", Objective("accuracy", "min")),
        ("mine:max", Objective("mine", "max")),
    ],
)
def test_objectives(text, expected):
    assert Objective.parse(text) == expected


@pytest.mark.parametrize("text", ["", "loss:down", ":min"])
def test_what_is_no_objective(text):
    with pytest.raises(ConfigError, match="write it as NAME, NAME:min or NAME:max"):
        Objective.parse(text)


def test_rows_are_ranked_by_the_first_objective_and_front_by_all():
    board = board_of((3.0, 10), (1.0, 40), (2.0, 20), (2.5, 30), (1.0, 50))
    assert numbers(board.rows()) == [1, 4, 2, 3, 0]
    assert sorted(numbers(board.front())) == [0, 1, 2]
    assert board.best() == board.rows()[0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    front = set(numbers(board_of(*points).front()))
    for number, point in enumerate(points):
        dominated = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert (number in front) != dominated


def test_more_is_better_where_it_is_said():
    board = board_of((0.9, 10), (0.5, 5), (0.4, 20), objectives=(Objective("loss", "max"), BYTES))
    assert numbers(board.rows()) == [0, 1, 2]
    assert sorted(numbers(board.front())) == [0, 1]


def test_seeds_of_a_sample_are_averaged():
    board = board_of((1.0, 8), (3.0, 8), (1.5, 8), (1.7, 8), seeds=2)
    first, second = board.rows()
    assert first.means["loss"] == pytest.approx(1.6)
    assert second.means["loss"] == pytest.approx(2.0)
    assert second.deviations["loss"] == pytest.approx(2**0.5)
    assert second.deviations["bytes"] == 0


def test_those_that_were_stopped_come_after_those_that_finished():
    board = board_of((1.0, 8), (3.0, 8))
    board.trials[0].end = "stopped"
    assert numbers(board.rows()) == [1, 0]
    assert numbers(board.front()) == [1]
    board.trials[1].end = "failed"
    assert numbers(board.rows()) == [0]


def test_a_loss_that_is_no_number_is_compared_with_nothing():
    assert numbers(board_of((float("nan"), 1), (2.0, 8)).rows()) == [1]


def test_the_journal_is_read_again(tmp_path):
    board = Board((LOSS,), tmp_path)
    board.add(Trial(0, 0, 7, {"optimizer.lr": 0.1}))
    board.report(0, {"rounds": 2, "loss": 3.0})
    board.report(0, {"rounds": 4, "loss": 2.0})
    board.add(Trial(1, 1, 7, {"optimizer.lr": 0.2}))
    board.close(0, "finished", {"digest": "d"})
    board.report(1, {"rounds": 2, "loss": float("nan")})
    board.change(1, {"optimizer.lr": 0.3})
    board.reopen(1, keep=1)
    board.release()
    again = Board.load((LOSS,), tmp_path)
    assert again.trials == board.trials
    assert again.trials[1].reports == []
    assert again.trials[1].values == {"optimizer.lr": 0.3}


def test_a_line_that_was_cut_off_is_left_out_and_gone_on_after(tmp_path):
    board = Board((LOSS,), tmp_path)
    board.add(Trial(0, 0, 0, {}))
    board.release()
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"trial": 0, "rep')
    again = Board.load((LOSS,), tmp_path)
    again.report(0, {"rounds": 1, "loss": 1.0})
    again.release()
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert ["report" in json.loads(line) for line in lines] == [False, True]
    assert Board.load((LOSS,), tmp_path).trials[0].rounds == 1


def test_a_line_that_is_none_is_named(tmp_path):
    (tmp_path / "trials.jsonl").write_text('{"trial": 3, "report": {"rounds": 1}}\n')
    with pytest.raises(ConfigError, match="trials.jsonl, line 1: trial 3 was not begun before"):
        Board.load((LOSS,), tmp_path)


def test_a_metric_that_is_not_reported_is_named():
    board = Board((Objective("acuracy"),))
    with pytest.raises(ConfigError) as refused:
        board.check({"rounds": 1, "loss": 1.0, "accuracy": 0.5})
    assert str(refused.value) == "--metric acuracy: the runs do not report it (did you mean accuracy?)"


# --- where samples come from ----------------------------------------------------------------------------------------


def suggestions(board: Board, source, num_samples: int, seeds=(0,)) -> list[Trial]:
    searcher = SampleTrials(board, source, num_samples, seeds, lambda trial: {"number": trial.number})
    found = []
    for place in itertools.count():
        spec = searcher.suggest(f"t{place}")
        if spec == "FINISHED":
            return found
        found.append(board.trials[spec["number"]])
    raise AssertionError


def space():
    from ray import tune

    return {"optimizer.lr": tune.loguniform(1e-3, 1), "algorithm.epochs": tune.choice([1, 2])}


def test_each_sample_is_run_with_each_seed():
    trials = suggestions(Board((LOSS,)), RandomSource(space(), 3), 3, seeds=(5, 6))
    assert [(one.number, one.sample, one.seed) for one in trials] == [
        *((0, 0, 5), (1, 0, 6), (2, 1, 5)),
        *((3, 1, 6), (4, 2, 5), (5, 2, 6)),
    ]
    assert trials[0].values == trials[1].values != trials[2].values


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_sweep_that_goes_on_runs_what_is_not_over_and_what_is_missing(kind):
    def source():
        return RandomSource(space(), 3) if kind == "random" else OptunaSource(space(), (LOSS,), 3)

    board = Board((LOSS,))
    first = suggestions(board, source(), 4)
    known = Board((LOSS,))
    for trial in first[:3]:
        known.add(Trial(trial.number, trial.sample, trial.seed, trial.values))
    for number in (0, 2):
        known.report(number, {"rounds": 1, "loss": 1.0})
        known.close(number, "finished")
    rest = suggestions(known, source(), 4)
    assert [one.number for one in rest] == [1, 3]
    assert rest[0].values == first[1].values
    if kind == "random":
        assert rest[1].values == first[3].values


def test_optuna_learns_from_what_it_is_told():
    source = OptunaSource(space(), (LOSS,), 0)
    board = Board((LOSS,))
    searcher = SampleTrials(board, source, 60, (0,), lambda trial: {"number": trial.number})
    for place in range(60):
        number = searcher.suggest(f"t{place}")["number"]
        value = board.trials[number].values["optimizer.lr"]
        board.report(number, {"rounds": 1, "loss": abs(math.log(value / 0.03))})
        board.close(number, "finished")
        searcher.sample_done(number)
    losses = [board.trials[number].reports[-1]["loss"] for number in range(60)]
    assert statistics.median(losses[40:]) < 0.5 * statistics.median(losses[:10])


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"samples": -3}, "--samples -3: must be at least 1"),
        ({"seeds": 0}, "--seeds 0: must be at least 1"),
        ({"max_concurrent": 0}, "--max-concurrent 0: must be at least 1"),
        ({"confirm": 2}, "--confirm goes with --simulate"),
        ({"scheduler": "pbt", "search": "optuna"}, "--scheduler pbt begins with random samples"),
        ({"scheduler": "pbt", "samples": 1}, "--scheduler pbt: a population has at least 2 samples"),
    ],
)
def test_what_cannot_be_asked_for(options, line):
    with pytest.raises(ConfigError) as refused:
        Options(**{"space": "diloco", "samples": 4} | options)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)
