"""Taking a run's records back to where a checkpoint was written: what came after it is done again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from orchestrator import sealed_log
from orchestrator.errors import ConfigError
from orchestrator.records import RoundRecord
from orchestrator.sealed_log import Sealed, SealedLog

if TYPE_CHECKING:
    from pathlib import Path


def metrics(path: Path, last: int) -> list[RoundRecord]:
    """Leave the rounds up to ``last`` in ``metrics.jsonl``, and return them."""
    kept: list[str] = []
    records: list[RoundRecord] = []
    for line in _lines(path):
        try:
            record = RoundRecord(**json.loads(line))
        except (ValueError, TypeError):
            break  # torn: the process was killed while it wrote
        if record.round <= last:
            kept.append(line + "\n")
            records.append(record)
    _replace(path, "".join(kept))
    return records


def events(path: Path, size: int, undone: Path) -> None:
    """Leave the first ``size`` bytes of ``events.jsonl``; the others are appended to ``undone``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    if data[size:]:
        with undone.open("ab") as file:
            file.write(data[size:])
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data[:size])
    partial.replace(path)


def rounds_log(path: Path, run_id: str, last: int) -> SealedLog | None:
    """Leave the rounds up to ``last`` in ``rounds.log``; return it, to be gone on with; ``None`` if there is none."""
    if not path.exists():
        return None
    log, data = SealedLog(run_id), b""
    try:
        for entry in sealed_log.read(path, run_id):
            if isinstance(entry, Sealed) and entry.round > last:
                break
            if not isinstance(entry, sealed_log.End):
                data += log.append(entry)
    except ConfigError:
        pass  # torn, behind what is kept
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
    return log


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
