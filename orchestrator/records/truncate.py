"""Taking a run's records back to where a checkpoint was written: what came after it is done again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records import round_log, run_files
from starling.orchestrator.records.round_log import Sealed, SealedLog
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from pathlib import Path

    from starling.orchestrator.records.observers import RoundRecord


def metrics(path: Path, last: int) -> list[RoundRecord]:
    """Leave the rounds up to ``last`` in ``metrics.jsonl``, and return them.

    Raises:
        ConfigError: one of them is damaged.
        OSError: the file cannot be read or written.
    """
    folder, name = Folder(path.parent), path.name
    kept: list[bytes] = []
    records: list[RoundRecord] = []
    with suppress(FileNotFoundError):
        for number, line in enumerate(folder.lines(name), 1):
            if not line.endswith(b"\n"):
                break  # torn: the process was killed while it wrote
            try:
                record = run_files.round_line(line, f"{path}, line {number}")
            except ConfigError as error:
                raise ConfigError(f"{error}; if that file is moved elsewhere, the run goes on without it") from None
            if record.round > last:
                break
            kept.append(line)
            records.append(record)
    folder.write(name, b"".join(kept))
    return records


def events(path: Path, size: int, undone: Path) -> None:
    """Leave the first ``size`` bytes of ``events.jsonl``; the others are appended to ``undone``."""
    folder, name = Folder(path.parent), path.name
    try:
        data = folder.read(name, run_files.memory_bytes())
    except FileNotFoundError:
        return
    if data[size:]:
        with folder.append(undone.name) as file:
            file.write(data[size:])
    kept = data[:size]
    # A machine that lost its power may have less of the file than of the checkpoint.
    folder.write(name, kept[: kept.rfind(b"\n") + 1])


def rounds_log(path: Path, run_id: str, last: int) -> SealedLog | None:
    """Leave the rounds up to ``last`` in ``rounds.log``; return it, to be gone on with; ``None`` if there is none."""
    folder = Folder(path.parent)
    if not folder.exists(path.name):
        return None
    log, data = SealedLog(run_id), b""
    try:
        for entry in round_log.read(path):
            if isinstance(entry, Sealed) and entry.round > last:
                break
            if not isinstance(entry, round_log.RunEnd):
                data += log.append(entry)
    except ConfigError:
        pass  # torn, behind what is kept
    folder.write(path.name, data)
    return log
