"""Search spaces: each key is a path of the configuration, each value can stand there, each algorithm has one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import tune

from starling import tune_spaces
from starling.algorithms.api import Algorithm
from starling.algorithms.errors import SettingsError
from starling.algorithms.registry import table
from starling.orchestrator.driver import resolve
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.sweeps.space import assigned, check, sampled

SPACES = tune_spaces.table()


def algorithm_of(name: str) -> str:
    """A space is called like its algorithm, or like it and what it is about."""
    return next(known for known in table(Algorithm) if name in (known, f"{known}_bytes"))


def configuration(algorithm: str):
    return resolve({"algorithm": algorithm, "task": "digits", "tracking": "none"})


def test_each_algorithm_has_a_space():
    # Other tests register toys of their own.
    ours = {name for name, part in table(Algorithm).items() if part.__module__.startswith("starling.algorithms.")}
    assert sorted(ours - set(SPACES)) == []


@pytest.mark.parametrize("name", SPACES)
def test_each_key_is_a_path_and_each_value_can_stand_there(name):
    config = configuration(algorithm_of(name))
    check(SPACES[name], name, config)
    seen = set()
    for number in range(20):
        values = sampled(SPACES[name], 7, number)
        assert values.keys() == SPACES[name].keys()
        varied = assigned(config, values)
        assert varied.algorithm.name == config.algorithm.name
        flat = varied.flat()
        for path, value in values.items():
            assert flat.get(path, flat.get(f"{path}.name")) == str(value), path
        seen.add(tuple(values.values()))
    assert len(seen) > 10


def test_a_sample_depends_on_its_number_alone():
    space = SPACES["diloco"]
    assert sampled(space, 3, 5) == sampled(space, 3, 5)
    assert sampled(space, 3, 5) != sampled(space, 3, 6)
    assert sampled(space, 4, 5) != sampled(space, 3, 5)


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (
            {"optimizer.lrr": tune.uniform(0, 1)},
            "--space mine: optimizer: lrr is not an option of sgd (did you mean lr?)",
        ),
        ({"algorithm.mu": tune.uniform(0, 1)}, "--space mine: algorithm.mu is not a field of fedavg"),
        ({"optimizer.lr": tune.uniform(-1, 1)}, "--space mine: optimizer.lr should be greater than 0"),
        ({"algorithm.epochs": tune.choice([1, "x"])}, "--space mine: algorithm.epochs should be a valid integer"),
        ({"algorithm.codec": tune.choice(["int8", "int9"])}, "--space mine: algorithm.codec: no codec is called"),
        ({"tracking.uri": tune.choice(["a"])}, "--space mine: tracking.uri cannot be varied: all trials of a sweep"),
        ({"seed": tune.choice([1])}, "--space mine: seed cannot be varied with --seeds"),
    ],
)
def test_what_is_no_path_or_no_value_is_refused(space, line):
    with pytest.raises(ConfigError) as refused:
        check(space, "mine", configuration("fedavg"), seeds=2)
    (first, *rest) = str(refused.value).splitlines()
    assert first.startswith(line)
    assert not rest


def test_a_space_of_ones_own(tmp_path: Path, monkeypatch):
    (tmp_path / "my_own_spaces.py").write_text(
        "from ray import tune\nmine = {'optimizer.lr': tune.loguniform(1e-3, 1)}\nnone = {'optimizer.lr': 3}\n"
    )
    assert tune_spaces.find(f"{tmp_path}/my_own_spaces.py:mine").keys() == {"optimizer.lr"}
    monkeypatch.syspath_prepend(tmp_path)
    assert tune_spaces.find("my_own_spaces:mine").keys() == {"optimizer.lr"}
    for name, line in [
        ("my_own_spaces:yours", "my_own_spaces has no 'yours'"),
        ("my_own_spaces:none", "optimizer.lr must be a domain of ray.tune"),
        ("no_such_module_here:mine", "cannot import 'no_such_module_here:mine'"),
        (f"{tmp_path}/nowhere.py:mine", "there is no file"),
        ("dilocoo", "no space is called 'dilocoo' (did you mean diloco or eager_diloco?)"),
    ]:
        with pytest.raises(SettingsError) as refused:
            tune_spaces.find(name)
        assert line in str(refused.value)
        assert "\n" not in str(refused.value)
