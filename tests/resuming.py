"""A run resumed from each of its checkpoints, as if it had been killed behind every one of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from starling.orchestrator import api
from starling.orchestrator.errors import StarlingError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from starling.orchestrator.records.observers import Summary

_ABOUT_SAVING = {"saving", "checkpoint", "resume"}
_OF_THIS_MACHINE = ("evaluate_seconds",)


def end(raw: dict[str, Any], path: Path) -> Summary | str:
    """What a run in ``path`` comes to: its summary, or why it failed."""
    try:
        return api.simulate(raw, run_dir=path)
    except StarlingError as error:
        return str(error)


def differences(raw: dict[str, Any], where: Path, rounds: Collection[int] | None = None) -> list[str]:
    """Of a run that is saved at every commit, what is not as in the undisturbed one if it is resumed from there.

    Args:
        raw: the configuration.
        where: an empty folder.
        rounds: only these are resumed from; default: all.
    """
    raw = raw | {"tracking": "none", "checkpoint": {"every_rounds": 1, "keep": 10_000}}
    # Resumed runs have the same name: it is in their messages.
    whole, path = where / "whole", where / "copy" / "whole"
    outcome = end(raw, whole)
    wrong: list[str] = []
    folders = sorted((whole / "checkpoints").glob("round-*")) if (whole / "checkpoints").exists() else []
    for folder in folders:
        number = int(folder.name.removeprefix("round-"))
        if rounds is not None and number not in rounds:
            continue
        shutil.copytree(whole, path)
        for later in folders:
            if later.name > folder.name:
                shutil.rmtree(path / "checkpoints" / later.name)
        (path / "summary.json").unlink(missing_ok=True)
        try:
            resumed: Summary | str = api.resume(path)
        except StarlingError as error:
            resumed = str(error)
        wrong += [f"from round {number}: {one}" for one in _compared(outcome, resumed)]
        wrong += [f"from round {number}: {one}" for one in _compared_files(whole, path)]
        shutil.rmtree(path)
    return wrong


def _compared(whole: Summary | str, resumed: Summary | str) -> list[str]:
    if isinstance(whole, str) or isinstance(resumed, str):
        one, other = (text if isinstance(text, str) else "it finished" for text in (whole, resumed))
        return [] if one == other else [f"{one!r} became {other!r}"]
    wrong: list[str] = []
    for key in ("digest", "status", "rounds", "metrics", "bytes", "nodes", "samples", "lost", "virtual_seconds"):
        one, other = getattr(whole, key), getattr(resumed, key)
        if one != other:
            wrong.append(f"{key}: {one} became {other}")
    return wrong


def _compared_files(whole: Path, resumed: Path) -> list[str]:
    wrong: list[str] = []
    for name in ("metrics.jsonl", "events.jsonl"):
        one, other = _lines(whole / name), _lines(resumed / name)
        if one != other:
            place = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(one), len(other)) if place is None else place
            wrong.append(f"{name}, line {place}: {one[place : place + 1]} became {other[place : place + 1]}")
    return wrong


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in one.items() if key not in _OF_THIS_MACHINE}
        for one in found
        if one.get("event") not in _ABOUT_SAVING
    ]
