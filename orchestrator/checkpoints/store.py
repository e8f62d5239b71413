"""Checkpoints: all that a run needs to go on, in plain files, whole or not there.

    round-000012/                   in `checkpoints/` of the run directory, or below `checkpoint.uri` and the run's id
        tensors-000.safetensors     tensors by content (checkpoints.tensor_files): what nodes have alike is there once
        state.json                  the controller's state, and each node's: its trees, and the keys of its tensors
        manifest.json               written last: schema, run, round, time; bytes and checksum of each of the others

A folder without a manifest is no checkpoint. Nothing is unpickled. A round that is written again, after a resume from
one before it, gets files with other names (``state.1.json``): those that are there stay whole until the manifest is
the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError

from starling.actors.replica.state_transfer import StateExport
from starling.algorithms.words import listed
from starling.orchestrator.checkpoints import tensor_files
from starling.orchestrator.checkpoints.filesystems import one_line, open_storage, remove_files
from starling.orchestrator.checkpoints.tensor_files import DamagedError
from starling.orchestrator.errors import CheckpointError, CheckpointReadError
from starling.orchestrator.records import identity
from starling.orchestrator.records.run_files import memory_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.filesystems import Piece, Storage
    from starling.orchestrator.checkpoints.tensor_files import Bytes, StoredTensor

SCHEMA_VERSION = 1
FOLDER = "checkpoints"

_MANIFEST = "manifest.json"
_SEALED = "checkpoint"
_NAME = re.compile(r"round-(\d{6,})")
_FILE = r"^(state(\.\d+)?\.json|tensors-\d{3,}(\.\d+)?\.safetensors)$"
_FILE_BYTES = 64 * 1024 * 1024
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_READERS = 4
"""Files that are read and hashed at the same time."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read."""

    number: int
    """Round after which it was made."""
    controller: dict[str, Any]
    """Plain JSON as given."""
    nodes: Mapping[NodeId, StateExport]
    """Node states in the order given. Arrays are read-only; arrays of equal content are one object."""
    where: str
    """Path or address of the checkpoint, for messages."""
    is_ours: bool = False
    """Whether this user wrote the checkpoint and nobody has edited it since."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: NonNegativeInt
    checksum: str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    round: NonNegativeInt
    time: str
    files: dict[
        Annotated[str, StringConstraints(pattern=r"^(state|tensors-\d{3,})(\.\d+)?\.(json|safetensors)$")], _File
    ]
    mark: Annotated[str, Field(exclude=True)] = ""
    """Keyed hash (HMAC) by this user's key over the fields before it; empty: no place to keep a key."""
    checksum: Annotated[str, Field(exclude=True)] = ""
    """Checksum of all of the above: damage is noticed without a key, too."""

    def sealed(self) -> _Manifest:
        """Return a copy with this user's mark."""
        return self.model_copy(update={"mark": identity.seal(_SEALED, self._content)})

    @property
    def is_ours(self) -> bool:
        """Whether the mark is this user's."""
        return identity.is_sealed(_SEALED, self._content, self.mark)

    @property
    def _content(self) -> bytes:
        return json.dumps(self.model_dump()).encode()

    def to_bytes(self) -> bytes:
        data = self.model_dump() | ({"mark": self.mark} if self.mark else {})
        return json.dumps(data | {"checksum": _checksum(json.dumps(data).encode())}, indent=2).encode() + b"\n"


class CheckpointStore:
    """The checkpoints of one run. One thread at a time writes.

    Args:
        uri: of any file system that pyarrow knows, or a local path; the run's id is appended. Default: ``run_dir``.
        run_dir: of the run.
        run_id: of the run; checkpoints of others are refused.
        keep: how many are kept.
        storage: instead of ``uri``.
        file_bytes: files of tensors have at least so many, but for the last one.

    Raises:
        ConfigError: the URI cannot be used.
    """

    def __init__(
        self,
        uri: str | None,
        run_dir: Path,
        run_id: str,
        *,
        keep: int = 3,
        storage: Storage | None = None,
        file_bytes: int = _FILE_BYTES,
    ) -> None:
        self._storage = storage or open_storage(uri, run_dir / FOLDER, run_id)
        self._run_id = run_id
        # A folder of the run's own directory has nobody else's; and directories are renamed and copied.
        self._is_shared = uri is not None or storage is not None
        self._keep = keep
        self._file_bytes = file_bytes
        self._begun_from: int | None = None
        self._written: set[int] = set()
        self.untidy: str | None = None
        """Error of the last removal of old checkpoints, or None; the next ``write`` tries again."""

    @property
    def where(self) -> str:
        """The checkpoints lie, for people; without a password."""
        return self._storage.shown

    def stop(self) -> None:
        """Refuse all from now on: what another thread is writing fails within ``storage.LONGEST_S``."""
        self._storage.stop()

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, number: int, controller: Mapping[str, Any], nodes: Iterable[tuple[NodeId, StateExport]]) -> int:
        """Write a checkpoint, then remove all but the last ``keep``; return its bytes.

        Besides what ``nodes`` yields, about one file of tensors is referred to at a time.

        Args:
            number: of the round after which it is made.
            controller: plain JSON, with texts as keys.
            nodes: each node's state, once; consumed as it is written. What it raises is raised on.

        Raises:
            CheckpointError: the storage does not take it. What was written of it is removed as far as possible, and the
                checkpoints that were there are there.
        """
        draft = _Draft(self._storage, self._run_id, number, self._file_bytes)
        where = f"checkpoint {self._storage.shown}/{draft.folder}"
        try:
            with _trouble(where, "written"):
                draft.begin()
            for node, export in nodes:
                with _trouble(where, "written"):
                    draft.add(node, export)
            with _trouble(where, "written"):
                draft.end(controller)
        except BaseException:
            draft.abandon()
            raise
        self._written.add(number)
        self._tidy(number, draft)
        return draft.nbytes

    def _tidy(self, number: int, draft: _Draft) -> None:
        """Remove what is not needed now that ``number`` is there."""
        self.untidy = None
        try:
            folders = self._storage.folders()
            remove_files(self._storage, draft.folder, folders.get(draft.folder, set()) - draft.names)
            whole = _whole(folders)
            kept = [one for one in whole if not self._is_abandoned(one, number)][-self._keep :]
            for name, files in folders.items():
                match = _NAME.fullmatch(name)
                if match and int(match[1]) not in kept:
                    _remove(self._storage, name, files)
        except OSError as error:
            self.untidy = f"{self._storage.shown}: old checkpoints cannot be removed: {one_line(error)}"

    def _is_abandoned(self, one: int, number: int) -> bool:
        """Whether a checkpoint is of a future that the run has turned its back on, going on from one before."""
        return one > number or (self._begun_from is not None and one > self._begun_from and one not in self._written)

    # --- reading -----------------------------------------------------------------------------------------------------

    def rounds(self) -> list[int]:
        """Return the rounds of all checkpoints that have a manifest, ascending.

        Raises:
            CheckpointReadError: the storage cannot be reached.
        """
        try:
            return _whole(self._storage.folders())
        except OSError as error:
            raise CheckpointReadError(f"{self._storage.shown} cannot be read: {one_line(error)}") from None

    def read(self, *, from_previous: bool = False, number: int | None = None) -> Checkpoint:
        """Read the latest checkpoint, and check every byte of it.

        Args:
            from_previous: the one before it instead.
            number: that of this round instead.

        Raises:
            CheckpointReadError: it is not there, or cannot be used: what, which file, and what to do.
        """
        rounds = self.rounds()
        where = self._storage.shown
        if not rounds:
            raise CheckpointReadError(f"{where}: there is no checkpoint that was written to its end")
        if number is not None and number not in rounds:
            there = f"there are {_listed(rounds)}, counted from 0"
            raise CheckpointReadError(f"{where}: there is no checkpoint of round {number}; {there}")
        if from_previous and len(rounds) == 1:
            raise CheckpointReadError(
                f"{where}: there is no checkpoint before that of round {rounds[0]}; leave out --from-previous"
            )
        chosen = rounds[-2 if from_previous else -1] if number is None else number
        try:
            checkpoint = self._read(chosen)
        except DamagedError as error:
            hint = _hint(rounds, chosen, asked=number is not None, previous=from_previous)
            raise CheckpointReadError(f"{where}/{_folder(chosen)}/{error}; {hint}") from None
        self._begun_from = chosen
        return checkpoint

    def adopt(self, number: int) -> None:
        """Put this user's mark on the checkpoint of a round, which was read and is gone on from."""
        with suppress(OSError, DamagedError):  # then it is asked about once more
            self._storage.put_whole(f"{_folder(number)}/{_MANIFEST}", self._manifest(number).sealed().to_bytes())

    def forget_after(self, number: int) -> None:
        """Remove the checkpoints of later rounds than ``number``: the run goes on from there, and they are of no run.

        Raises:
            CheckpointReadError: they cannot be removed.
        """
        try:
            for name, files in self._storage.folders().items():
                match = _NAME.fullmatch(name)
                if match and int(match[1]) > number:
                    _remove(self._storage, name, files)
        except OSError as error:
            what = f"the checkpoints after round {number} cannot be removed, and the run not taken back to it"
            raise CheckpointReadError(f"{self._storage.shown}: {what}: {one_line(error)}") from None

    def _read(self, number: int) -> Checkpoint:
        folder = _folder(number)
        manifest = self._manifest(number)
        with ThreadPoolExecutor(_READERS, "checkpoint-read") as pool:
            read = list(pool.map(lambda item: self._file(folder, *item), manifest.files.items()))
        tensors: dict[str, Bytes] = {}
        state: Any = None
        for content in read:
            if isinstance(content, bytes):
                state = content
            else:
                tensors |= content
        name = next((name for name in manifest.files if name.endswith(".json")), "state.json")
        if state is None:
            raise DamagedError(f"{_MANIFEST}: names no {name}")
        try:
            whole = json.loads(state)
            _check_sums(name, whole)
            nodes = {int(node): _export(meta, tensors) for node, meta in whole["nodes"].items()}
            where = f"{self._storage.shown}/{folder}"
            return Checkpoint(number, dict(whole["controller"]), nodes, where, manifest.is_ours)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise DamagedError(f"{name}: does not fit the other files") from None

    def _manifest(self, number: int) -> _Manifest:
        folder = _folder(number)
        raw = self._get(f"{folder}/{_MANIFEST}", _MAX_MANIFEST_BYTES).tobytes()
        try:
            data = json.loads(raw)
            version = data["schema_version"]
            if isinstance(version, int) and version > SCHEMA_VERSION:
                message = f"{_MANIFEST}: schema {version} is of a newer Starling; this one reads up to {SCHEMA_VERSION}"
                raise DamagedError(message)
            manifest = _Manifest.model_validate(data)
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
            raise DamagedError(f"{_MANIFEST}: is damaged") from None
        if manifest.to_bytes() != raw:
            raise DamagedError(f"{_MANIFEST}: is damaged")
        if self._is_shared and manifest.run_id != self._run_id:
            where = f"{self._storage.shown}/{folder}/{_MANIFEST}"
            raise CheckpointReadError(f"{where}: is of run {manifest.run_id}, and not of {self._run_id}")
        whole = sum(one.bytes for one in manifest.files.values())
        if whole > memory_bytes():
            raise DamagedError(f"{_MANIFEST}: names {whole} bytes, more than the memory of this machine")
        if manifest.round != number:
            raise DamagedError(f"{_MANIFEST}: is of round {manifest.round}")
        return manifest

    def _file(self, folder: str, name: str, entry: _File) -> bytes | dict[str, Bytes]:
        """A file's content, checked: tensors by their keys, or the state as it is."""
        data = self._get(f"{folder}/{name}", entry.bytes + 1)
        if data.nbytes != entry.bytes:
            more = "more than" if data.nbytes > entry.bytes else f"{data.nbytes} of"
            raise DamagedError(f"{name}: has {more} {entry.bytes} bytes")
        if name.endswith(".json"):
            if _checksum(data.data) != entry.checksum:
                raise DamagedError(f"{name}: its checksum is wrong")
            return data.tobytes()
        data.flags.writeable = False
        try:
            return dict(tensor_files.read(data, entry.checksum))
        except DamagedError as error:
            raise DamagedError(f"{name}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise DamagedError(f"{name}: has no header of tensors") from None

    def _get(self, path: str, most: int) -> Bytes:
        name = path.rpartition("/")[2]
        try:
            return self._storage.get(path, most)
        except FileNotFoundError:
            raise DamagedError(f"{name}: is missing") from None
        except OSError as error:
            raise DamagedError(f"{name}: cannot be read: {one_line(error)}") from None


@dataclass
class _Draft:
    """A checkpoint that is being written."""

    storage: Storage
    run_id: str
    number: int
    file_bytes: int
    nbytes: int = 0
    _files: dict[str, _File] = field(default_factory=dict[str, _File])
    _nodes: dict[str, Any] = field(default_factory=dict[str, Any])
    _keys: set[str] = field(default_factory=set[str])
    """Keys of all tensors so far."""
    _pending: list[StoredTensor] = field(default_factory=list)  # pyright: ignore[reportUnknownVariableType]
    _pending_bytes: int = 0
    _replaces: bool = False
    """Whether a checkpoint of this round exists; the old one stays until the new manifest replaces its manifest."""
    _again: int = 0
    """Number that keeps file names from those already taken."""
    _has_begun: bool = False
    _may_be_there: bool = False
    """Whether the manifest in the folder may be this writer's."""

    @property
    def folder(self) -> str:
        return _folder(self.number)

    @property
    def names(self) -> set[str]:
        """Names of its files."""
        return {*self._files, _MANIFEST}

    def begin(self) -> None:
        """Find a place for it."""
        files = self.storage.folders().get(self.folder)
        if files is not None and _MANIFEST not in files:
            self.storage.remove_folder(self.folder)  # somebody's half-written one
        elif files is not None:
            self._replaces = True
            while not files.isdisjoint({self._name("state", "json"), self._name("tensors-000", "safetensors")}):
                self._again += 1
        self._has_begun = True

    def add(self, node: NodeId, export: StateExport) -> None:
        """Take a node's state; write a file if there is enough for one."""
        if str(node) in self._nodes:
            raise ValueError(f"node {node} is in the checkpoint already")
        forms: list[dict[str, Any]] = []
        for form, data in zip(export.meta["tensors"], export.arrays, strict=True):
            tensor = tensor_files.stored(form, data)
            forms.append(form | {"key": tensor.key})
            if tensor.key not in self._keys:
                self._keys.add(tensor.key)
                self._pending.append(tensor)
                self._pending_bytes += data.nbytes
                if self._pending_bytes >= self.file_bytes:
                    self._flush()
        self._nodes[str(node)] = export.meta | {"tensors": forms}

    def end(self, controller: Mapping[str, Any]) -> None:
        """Write what is left, and the manifest."""
        if self._pending:
            self._flush()
        sums = {node: _sum(meta) for node, meta in self._nodes.items()} | {"controller": _sum(controller)}
        state = json.dumps({"controller": controller, "nodes": self._nodes, "sums": sums}).encode()
        self._put(self._name("state", "json"), [state], _checksum(state))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        facts = _Manifest(run_id=self.run_id, round=self.number, time=time, files=self._files)
        manifest = facts.sealed().to_bytes()
        self._may_be_there = True
        try:
            self.storage.put_whole(f"{self.folder}/{_MANIFEST}", manifest)
        except OSError:
            # An object may be there although the answer was lost; and if it is, then the checkpoint is.
            if not self._is_there(manifest):
                raise
        self.nbytes += len(manifest)

    def _is_there(self, manifest: bytes) -> bool:
        try:
            found = self.storage.get(f"{self.folder}/{_MANIFEST}", len(manifest) + 1).tobytes()
        except FileNotFoundError:
            found = b""
        except OSError:
            return False  # and nobody knows
        self._may_be_there = found == manifest
        return self._may_be_there

    def abandon(self) -> None:
        """Remove what was written, as far as the storage lets it; a manifest goes before what it vouches for."""
        if not self._has_begun:
            return
        with suppress(OSError):
            if not self._replaces:
                if self._may_be_there:
                    self.storage.remove(f"{self.folder}/{_MANIFEST}")
                self.storage.remove_folder(self.folder)
            elif not self._may_be_there:
                remove_files(self.storage, self.folder, self._files)

    def _flush(self) -> None:
        header, pieces = tensor_files.layout(self._pending)
        place = len(self._files)
        self._put(self._name(f"tensors-{place:03}", "safetensors"), [header, *pieces], tensor_files.checksum(header))
        self._pending.clear()
        self._pending_bytes = 0

    def _put(self, name: str, pieces: list[Piece], checksum: str) -> None:
        nbytes = sum(len(piece) for piece in pieces)
        self._files[name] = _File(bytes=nbytes, checksum=checksum)
        self.storage.put(f"{self.folder}/{name}", pieces)
        self.nbytes += nbytes

    def _name(self, stem: str, suffix: str) -> str:
        return f"{stem}.{self._again}.{suffix}" if self._again else f"{stem}.{suffix}"


def _folder(number: int) -> str:
    return f"round-{number:06}"


def _whole(folders: Mapping[str, set[str]]) -> list[int]:
    """The rounds of folders with a manifest, ascending."""
    matches = ((_NAME.fullmatch(name), files) for name, files in folders.items())
    return sorted(int(match[1]) for match, files in matches if match and _MANIFEST in files)


def _remove(storage: Storage, folder: str, files: set[str]) -> None:
    """Remove a checkpoint. One of which the manifest is gone is none any more, should this be interrupted."""
    if _MANIFEST in files:
        storage.remove(f"{folder}/{_MANIFEST}")
    storage.remove_folder(folder)


def _checksum(data: Piece) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _sum(data: object) -> str:
    """Checksum of one part of a state: names the edited part of a file that was sealed again."""
    return _checksum(json.dumps(data).encode())


def _check_sums(name: str, whole: dict[str, Any]) -> None:
    """Compare the parts of a state with their own checksums; older checkpoints have none.

    Raises:
        DamagedError: one is another's; it is named.
    """
    sums = whole.get("sums")
    if sums is None:
        return
    parts: dict[str, Any] = {**whole["nodes"], "controller": whole["controller"]}
    for part in sorted({*sums, *parts}):
        if part not in parts or sums.get(part) != _sum(parts[part]):
            what = part if part == "controller" else f"node {part}"
            raise DamagedError(f"{name}: the state of {what} is not what was saved")


def _export(meta: dict[str, Any], tensors: Mapping[str, Bytes]) -> StateExport:
    """A node's state, of the tensors that its ``meta`` names.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they do not fit together.
    """
    forms, arrays = list[dict[str, Any]](), list["Bytes"]()
    for form in meta["tensors"]:
        array = tensors[form["key"]]
        if array.nbytes != tensor_files.nbytes(form):
            raise ValueError(form["key"])
        forms.append({name: value for name, value in form.items() if name != "key"})
        arrays.append(array)
    return StateExport(meta | {"tensors": forms}, arrays)


def _hint(rounds: list[int], chosen: int, *, asked: bool, previous: bool) -> str:
    """Advise on a checkpoint that cannot be used."""
    others = [one for one in rounds if one != chosen]
    before = [one for one in rounds if one < chosen]
    if asked:
        return f"there are also {_listed(others)}" if others else "there is no other checkpoint"
    if not before:
        return "there is no checkpoint before it"
    if previous:
        return f"if that folder is moved elsewhere, --from-previous uses round {before[-1]}'s"
    return f"--from-previous uses round {before[-1]}'s"


def _listed(rounds: list[int]) -> str:
    return f"round{'s' if len(rounds) > 1 else ''} {listed(rounds)}"


@contextmanager
def _trouble(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{where} cannot be {what}: {one_line(error)}") from None
