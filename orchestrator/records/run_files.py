"""Reads the files of a run directory: bounded in size, opened safely, each field checked.

The directory may be damaged, of another version, or somebody else's. An error is one line that names file, field and
the right form. Keys that are not known are left alone: a later Starling may write more than this one.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, TypeAdapter, ValidationError

from starling.orchestrator.config.messages import shown
from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.observers import RoundRecord, Summary
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_JSON_BYTES = 16 * 1024 * 1024
"""Limit of a file that is one JSON object, for some thousand nodes at most."""

_MOST = 2**63 - 1

T = TypeVar("T")

Count: TypeAlias = Annotated[int, Field(ge=0, le=_MOST)]
Round: TypeAlias = Annotated[int, Field(ge=-1, le=2**31 - 1)]
"""−1: none yet."""
Node: TypeAlias = Annotated[int, Field(ge=-2, le=2**31 - 1)]
"""The server is −1; −2 stands for messages."""
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=1e15)]
Value: TypeAlias = float | None
"""``null`` stands for what JSON has no number for."""


class Stored(BaseModel):
    """An object in a file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RoundLine(Stored):
    """A line of ``metrics.jsonl``: a ``RoundRecord``."""

    round: Annotated[int, Field(ge=0, le=2**31 - 1)]
    loss: Value
    num_samples: Count
    nodes: Count
    contributing: Count
    alive: Count
    in_view: Count
    late: Count
    payload_bytes: Count
    transport_bytes: Count | None
    seconds: Value
    train_seconds: Value
    exchange_seconds: Value
    evaluate_seconds: Value = 0.0
    metrics: dict[str, Value] | None = None
    node_metrics: dict[int, dict[str, Value]] | None = None
    reported: dict[str, dict[str, Value]] = {}
    node_reported: dict[int, dict[str, Value]] | None = None
    samples: dict[str, int] = {}
    residuals_lost: Count | None = None
    residual_norm_lost: Value = None

    def record(self) -> RoundRecord:
        """Return the record that was written."""
        values: dict[str, Any] = self.model_dump()
        values["metrics"] = None if self.metrics is None else _numbers(self.metrics)
        values["reported"] = {name: _numbers(one) for name, one in self.reported.items()}
        for name, of_nodes in (("node_metrics", self.node_metrics), ("node_reported", self.node_reported)):
            if of_nodes is not None:
                values[name] = {node: _numbers(one) for node, one in of_nodes.items()}
        return RoundRecord(**values)


class SummaryFile(Stored):
    """``summary.json``: a ``Summary``."""

    status: Literal["finished", "failed", "interrupted"]
    run_id: str
    run_dir: str
    algorithm: str
    rounds: Count
    metrics: dict[str, Value]
    bytes: dict[str, int | float | None]
    nodes: dict[str, Count]
    samples: dict[str, int]
    replicas: str | None
    digest: str | None
    seconds: Value
    virtual_seconds: Value
    lost: dict[str, int | float] = {}
    baselines: dict[str, float] = {}
    checkpoints: dict[str, int] | None = None
    average_digest: str | None = None

    def summary(self) -> Summary:
        """Return the summary that was written."""
        data: dict[str, Any] = self.model_dump()
        data["metrics"] = _numbers(self.metrics)
        return Summary(**data)


class LeaseFile(Stored):
    """``lease.json``: who drives the run."""

    token: Count
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: float | None
    renewed: NonNegativeFloat


class SentFile(Stored):
    """``mlflow.json``: how far a run's spool has been sent."""

    offset: NonNegativeInt = 0
    """Bytes."""
    run_id: str | None = None
    """The tracker's name for the run."""
    tried: bool = False
    """The tracker was asked to make the run, and may have done so."""
    ended: bool = False
    experiment_id: str | None = None
    """The tracker's name for the experiment that the run is in."""


class SweepFile(Stored):
    """``sweep.json``: what was asked for, and where Python looked for modules."""

    options: dict[str, Any]
    sys_path: list[str]


class OriginFile(Stored):
    """``origin.json``: from whose checkpoint a trial goes on."""

    run_id: str


_ROUND_LINE, _SUMMARY = TypeAdapter(RoundLine), TypeAdapter(SummaryFile)


def summary(path: Path) -> Summary | None:
    """Read the summary of a run; return None if its directory has no ``summary.json``.

    Raises:
        ConfigError: there is one, and it cannot be used.
    """
    found = read(Folder(path), "summary.json", _SUMMARY)
    return None if found is None else found.summary()


def rounds(path: Path) -> Iterator[RoundRecord]:
    """The rounds in ``metrics.jsonl``; a last line that was cut off is left out. None if there is no such file.

    Raises:
        ConfigError: a line is none of a round; raised when it is reached.
    """
    for line in lines(Folder(path), "metrics.jsonl", _ROUND_LINE):
        yield line.record()


def round_line(line: bytes, where: str) -> RoundRecord:
    """A line of ``metrics.jsonl``.

    Raises:
        ConfigError: it is none.
    """
    return checked(_ROUND_LINE, line, where).record()


def read(folder: Folder, name: str, adapter: TypeAdapter[T], most: int = MOST_JSON_BYTES) -> T | None:
    """The object in a JSON file, checked; ``None`` if there is no such file.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    where = f"{folder}/{name}"
    try:
        data = folder.read(name, most)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{where}: {reason(error)}") from None
    return checked(adapter, data, where)


def lines(folder: Folder, name: str, adapter: TypeAdapter[T]) -> Iterator[T]:
    """The objects in a file that has one in each line; a last line without an end was cut off, and is left out.

    Raises:
        ConfigError: the file cannot be read, or a line is something else; raised when that place is reached.
    """
    where = f"{folder}/{name}"
    try:
        for number, line in enumerate(folder.lines(name), 1):
            if line.endswith(b"\n"):
                yield checked(adapter, line, f"{where}, line {number}")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{where}: {reason(error)}") from None


def checked(adapter: TypeAdapter[T], data: bytes, where: str, *, nan: bool = False) -> T:
    """Parse JSON and return it as ``adapter``'s type; with ``nan``, numbers may be NaN or infinite.

    Raises:
        ConfigError: it is no JSON, or something else.
    """
    plain(data, where, nan=nan)
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where}: {problem(error)}") from None


def plain(data: bytes, where: str, *, nan: bool = False) -> Any:  # noqa: ANN401 - plain data
    """The data in some JSON.

    Raises:
        ConfigError: it is none; or has a key twice, or, unless ``nan``, a number that is none.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=float if nan else _refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no text in UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} at byte {error.pos}" if data.strip() else "it is empty"
        raise ConfigError(f"{where}: is not whole JSON: {what}") from None
    except ValueError as error:  # of ours, or a number of thousands of digits
        raise ConfigError(f"{where}: {str(error).partition(';')[0]}") from None


def problem(error: ValidationError) -> str:
    """Return a pydantic error in one line: the first wrong field, and the number of others."""
    found = error.errors(include_url=False)
    first = found[0]
    place = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "missing":
        text = f"{place} is missing"
    elif first["type"] in ("json_invalid", "model_type") and not place:
        text = "must be an object" if first["type"] == "model_type" else message
    else:
        text = f"{place or 'it'} {message}, got {shown(first['input'])}"
    return " ".join(text.split()) + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def reason(error: OSError) -> str:
    """Return what is wrong with a file, as the end of a sentence."""
    text = error.strerror or str(error)
    return text if text.startswith(("is ", "has ", "a line ", "leads ")) else f"cannot be read: {text}"


def memory_bytes() -> int:
    """Return this machine's memory: nothing larger can be held, whatever a file says."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _numbers(values: dict[str, Value]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return data


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number that JSON has")
