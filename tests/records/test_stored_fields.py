"""Each field of what runs and sweeps leave, one at a time: missing, of another type or huge, it is one line."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from starling.orchestrator.checkpoints import saved_state
from starling.orchestrator.checkpoints.store import CheckpointStore
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import event_lines
from starling.orchestrator.sweeps import sweep
from starling.orchestrator.sweeps.trials import Board, Objective
from tests import damage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MISSING = object()
WRONG: tuple[Any, ...] = (MISSING, None, True, -3, 2**80, 1e300, "x", "9" * 5000, [], {}, [[0]], {"a": {"b": 0}})
OPTIONAL = {
    "trials.jsonl": {"of", "rounds", "loss", "bytes", "optimizer.lr", "status"},  # the last five: whatever was reported
    "sweep.json": {"seeds", "scheduler", "search", "max_concurrent", "metrics", "simulate", "confirm"},
}
"""Fields that may be left out: those with a default."""


@pytest.fixture(scope="module", params=["fedavg", "fedbuff"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> damage.Original:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "RUNS", {request.param: damage.RUNS[request.param]})
        (made,) = damage.originals(tmp_path_factory.mktemp(request.param))
    return made


def variants(data: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Each place in ``data`` below the top, what is put there, and the whole of it then."""
    for place in damage._places(data):
        for wrong in WRONG if place else ():
            changed = copy.deepcopy(data)
            owner = changed
            for step in place[:-1]:
                owner = owner[step]
            if wrong is MISSING:
                del owner[place[-1]]
            elif type(owner[place[-1]]) is type(wrong) and owner[place[-1]] == wrong:
                continue
            else:
                owner[place[-1]] = wrong
            yield place, wrong, changed


def problem_of(read: Callable[[], object]) -> str | None:
    """What is said; whatever else is raised is a fault of ours."""
    said = None
    try:
        read()
    except ConfigError as error:
        said = str(error)
    assert said is None or ("\n" not in said and len(said) < 1000)
    return said


def test_each_field_of_each_line_of_a_sweeps_journal(original: damage.Original, tmp_path: Path):
    lines = (original.sweep / "trials.jsonl").read_text().splitlines()
    refused = 0
    for number, line in enumerate(lines):
        for place, wrong, changed in variants(json.loads(line)):
            text = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
            (tmp_path / "trials.jsonl").write_text("\n".join(text) + "\n")
            said = problem_of(lambda: Board.load((Objective("loss"),), tmp_path).rows())
            refused += said is not None
            if said is not None:
                assert said.startswith(f"{tmp_path}/trials.jsonl, line ")
            elif wrong is MISSING:
                assert place[-1] in OPTIONAL["trials.jsonl"], (place, line)
    assert refused > 5 * len(lines)


def test_each_field_of_what_a_sweep_was_asked_for(original: damage.Original, tmp_path: Path):
    path = tmp_path / "sweep"
    shutil.copytree(original.sweep, path)
    whole = json.loads((path / "sweep.json").read_text())
    whole["sys_path"] = whole["sys_path"][:2]
    for place, wrong, changed in variants(whole):
        (path / "sweep.json").write_text(json.dumps(changed))
        said = problem_of(lambda: sweep.reopen(path))
        if said is not None:
            assert said.startswith(f"{path}/sweep.json: "), said
        elif wrong is MISSING:
            assert place[-1] in OPTIONAL["sweep.json"] or isinstance(place[-1], int), place
        if place == ("options", "samples") and wrong is not MISSING:
            assert said is not None, wrong


def test_each_field_of_a_saved_state(original: damage.Original, tmp_path: Path):
    """Its checksums are right again, as of somebody's who has the key: what is left are types, bounds and what fits."""
    path = tmp_path / "run"
    shutil.copytree(original.stopped, path)
    store = CheckpointStore(None, path, "run")
    file = max((path / "checkpoints").iterdir()) / "state.json"
    whole = json.loads(file.read_text())
    del whole["controller"]["config"]  # which is read as any configuration is
    number = 0
    for place, wrong, changed in variants(whole):
        number += 1
        if number % 23 or place[0] == "sums":  # thousands, of which many are alike
            continue
        damage._sum_again(changed)
        changed["controller"] = changed.get("controller") or {}
        file.write_text(json.dumps(changed))
        damage.reseal(file)
        said = problem_of(lambda: saved_state.check(store.read()))
        if said is not None:
            assert f"{file.parent}/state.json: " in said, (place, wrong)
    assert number > 1000


def test_each_field_of_an_event_that_a_replay_needs(original: damage.Original, tmp_path: Path):
    lines = (original.finished / "events.jsonl").read_text().splitlines()
    first = {json.loads(line)["event"]: line for line in reversed(lines)}
    for kind, line in first.items():
        needed = event_lines._MODELS.get(kind)
        for place, wrong, changed in variants(json.loads(line)):
            (tmp_path / "events.jsonl").write_text(json.dumps(changed) + "\n")
            said = problem_of(lambda: list(event_lines.read(tmp_path)))
            if said is not None:
                assert said.startswith(f"{tmp_path}/events.jsonl, line 1: ")
            if place == ("event",) and (wrong is MISSING or not isinstance(wrong, str)):
                assert said is not None
            if len(place) == 1 and needed is not None and place[0] in needed.model_fields:
                field = needed.model_fields[place[0]]
                if wrong is MISSING and field.is_required():
                    assert said is not None
                    assert f"{place[0]} is missing" in said
                if wrong == {"a": {"b": 0}}:
                    assert said is not None
