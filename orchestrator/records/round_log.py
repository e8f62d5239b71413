"""The log of sealed rounds: from it a model is rebuilt without computing, where the algorithm says how.

``rounds.log`` in the run directory is written by the controller alone, at each commit, and only appended to::

    "starling rounds 1", {"run_id": …}        a line each: the run that it belongs to
    kind (1 byte), length (4), content, checksum (4)        one after the other

    V: the view's number, and its members, whenever that changes
    R: the round, and what ``Algorithm.sealed`` gives: the same on all members
    S: the round after which a snapshot was written, and the SHA-256 of its model
    E: the SHA-256 of the run's model

A checksum is the CRC-32 of all bytes before it except the checksums, so that nothing can be left out, doubled or moved
unnoticed. Checksums are excluded because data followed by their own CRC always have one constant CRC, at which each
checksum would begin anew. All numbers are little-endian.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from starling.orchestrator.errors import ConfigError
from starling.orchestrator.records.run_files import memory_bytes, reason
from starling.orchestrator.safe_files import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starling.algorithms.api import NodeId

NAME = "rounds.log"
SNAPSHOTS = "snapshots"

_TITLE = b"starling rounds 1\n"
_HEAD = struct.Struct("<cI")
_NUMBER = struct.Struct("<I")
_MAX_HEADER = 10_000
_SNAPSHOT = re.compile(r"round-([0-9]{6,18})\.safetensors")


@dataclass(frozen=True)
class MembersEntry:
    """View from this entry on: its number and its members."""

    number: int
    """Number of the view."""
    members: tuple[NodeId, ...]


@dataclass(frozen=True)
class Sealed:
    """A committed round."""

    round: int
    record: bytes


@dataclass(frozen=True)
class Snapshot:
    """Snapshot of the model in a file: the round after which it was written, and the model's digest."""

    round: int
    digest: str


@dataclass(frozen=True)
class RunEnd:
    """The run ended with a model of this digest."""

    digest: str


Entry: TypeAlias = MembersEntry | Sealed | Snapshot | RunEnd


def snapshot_name(number: int) -> str:
    """The file of the snapshot after a round, in the run directory."""
    return f"{SNAPSHOTS}/round-{number:06}.safetensors"


def snapshot_round(name: str) -> int | None:
    """The round of a file in ``snapshots/``; ``None``: it is no snapshot."""
    found = _SNAPSHOT.fullmatch(name)
    return int(found[1]) if found and snapshot_name(int(found[1])).endswith(f"/{name}") else None


class SealedLog:
    """Makes the bytes to be appended to the log."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._checksum: int | None = None
        self._members: MembersEntry | None = None

    def append(self, entry: Entry) -> bytes:
        """The bytes of an entry, behind those of all before it."""
        out = b""
        if self._checksum is None:
            out = _TITLE + json.dumps({"run_id": self._run_id}).encode() + b"\n"
            self._checksum = zlib.crc32(out)
        if isinstance(entry, MembersEntry):
            if entry == self._members:
                return out
            self._members = entry
        framed = _framed(entry)
        self._checksum = zlib.crc32(framed, self._checksum)
        return out + framed + _NUMBER.pack(self._checksum)


def _framed(entry: Entry) -> bytes:
    match entry:
        case MembersEntry(number, members):
            kind, content = b"V", _NUMBER.pack(number) + struct.pack(f"<{len(members)}i", *members)
        case Sealed(number, record):
            kind, content = b"R", _NUMBER.pack(number) + record
        case Snapshot(number, digest):
            kind, content = b"S", _NUMBER.pack(number) + bytes.fromhex(digest)
        case RunEnd(digest):
            kind, content = b"E", bytes.fromhex(digest)
    return _HEAD.pack(kind, len(content)) + content


def read(path: Path, run_id: str | None = None) -> Iterator[Entry]:
    """The entries of a log, in order, each after it was checked.

    Args:
        path: of the file.
        run_id: of the run that it must belong to; default: whichever.

    Raises:
        ConfigError: it is not there, of another run, damaged, or has a hole; raised when that place is reached.
    """
    try:
        data = Folder(path.parent).read(path.name, memory_bytes())
    except FileNotFoundError as error:
        message = f"{path}: {error.strerror}; only algorithms whose rounds can be replayed have this log"
        raise ConfigError(message) from None
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from None
    offset = data.find(b"\n", len(_TITLE), _MAX_HEADER) + 1
    found = _run_id_of(data[len(_TITLE) : offset]) if data.startswith(_TITLE) and offset else None
    if found is None:
        raise ConfigError(f"{path}: this is no log of rounds")
    if run_id is not None and found != run_id:
        raise ConfigError(f"{path}: the log is that of run {found}, and not of {run_id}")
    checksum, expected = zlib.crc32(data[:offset]), 0
    while offset < len(data):
        where = f"{path}: byte {offset}, round {expected}"
        end = offset + _HEAD.size
        kind, length = _HEAD.unpack_from(data, offset) if end <= len(data) else (b"", 0)
        last = end + length + _NUMBER.size
        if last > len(data):
            whole = f"--to {expected - 1} is the last that is whole" if expected else "no round of it is whole"
            raise ConfigError(f"{where}: the log ends within an entry; {whole}")
        checksum = zlib.crc32(data[offset : end + length], checksum)
        if _NUMBER.unpack_from(data, end + length)[0] != checksum:
            raise ConfigError(f"{where}: bad checksum; the log is damaged from here on")
        entry = _entry(kind, data[end : end + length])
        if entry is None:
            raise ConfigError(f"{where}: an entry of an unknown kind {kind!r}; written by another version?")
        if isinstance(entry, Sealed):
            if entry.round != expected:
                raise ConfigError(f"{where}: round {entry.round} is next; the log has a hole")
            expected += 1
        yield entry
        offset = last


def latest(run_dir: Path, run_id: str) -> tuple[Path | None, list[bytes]]:
    """The file of the last snapshot, ``None`` if there was none, and the records of the rounds since.

    Of a log that is not there, or damaged, they are ``None`` and none.
    """
    base: Path | None = None
    records: list[bytes] = []
    try:
        for entry in read(run_dir / NAME, run_id):
            if isinstance(entry, Sealed):
                records.append(entry.record)
            elif isinstance(entry, Snapshot):
                base, records = run_dir / snapshot_name(entry.round), []
    except ConfigError:
        return None, []
    return base, records


def _run_id_of(header: bytes) -> str | None:
    try:
        return str(json.loads(header)["run_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _entry(kind: bytes, content: bytes) -> Entry | None:
    try:
        match kind:
            case b"V":
                return MembersEntry(
                    _NUMBER.unpack_from(content)[0], struct.unpack(f"<{len(content) // 4 - 1}i", content[4:])
                )
            case b"R":
                return Sealed(_NUMBER.unpack_from(content)[0], content[4:])
            case b"S":
                return Snapshot(_NUMBER.unpack_from(content)[0], content[4:].hex())
            case b"E":
                return RunEnd(content.hex())
            case _:
                return None
    except struct.error:
        return None
