"""Reads a checkpoint, and checks every byte of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from starling.actors.replica.state_transfer import StateExport
from starling.orchestrator.checkpoints import tensor_files
from starling.orchestrator.checkpoints.filesystems import one_line
from starling.orchestrator.checkpoints.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    check_sums,
    checksum_of,
    folder_of,
)
from starling.orchestrator.checkpoints.tensor_files import DamagedError
from starling.orchestrator.errors import CheckpointReadError
from starling.orchestrator.records.run_files import memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.filesystems import Storage
    from starling.orchestrator.checkpoints.tensor_files import Bytes

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


class CheckpointReader:
    """Reads the checkpoints of a storage.

    Args:
        storage: has the checkpoints.
        run_id: of the run; None: checkpoints of any run are read.
    """

    def __init__(self, storage: Storage, run_id: str | None) -> None:
        self._storage, self._run_id = storage, run_id

    def read(self, number: int) -> Checkpoint:
        """Read the checkpoint of a round.

        Raises:
            DamagedError: it cannot be used; the message begins with the file's name.
            CheckpointReadError: it is another run's.
        """
        folder = folder_of(number)
        manifest = self.manifest(number)
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
            raise DamagedError(f"{MANIFEST}: names no {name}")
        try:
            whole = json.loads(state)
            check_sums(name, whole)
            nodes = {int(node): _export(meta, tensors) for node, meta in whole["nodes"].items()}
            where = f"{self._storage.shown}/{folder}"
            return Checkpoint(number, dict(whole["controller"]), nodes, where, manifest.is_ours)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise DamagedError(f"{name}: does not fit the other files") from None

    def manifest(self, number: int) -> Manifest:
        """Read the manifest of a round's checkpoint; raises as ``read``."""
        folder = folder_of(number)
        raw = self._get(f"{folder}/{MANIFEST}", _MAX_MANIFEST_BYTES).tobytes()
        try:
            data = json.loads(raw)
            version = data["schema_version"]
            if isinstance(version, int) and version > SCHEMA_VERSION:
                message = f"{MANIFEST}: schema {version} is of a newer Starling; this one reads up to {SCHEMA_VERSION}"
                raise DamagedError(message)
            manifest = Manifest.model_validate(data)
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
            raise DamagedError(f"{MANIFEST}: is damaged") from None
        if manifest.to_bytes() != raw:
            raise DamagedError(f"{MANIFEST}: is damaged")
        if self._run_id is not None and manifest.run_id != self._run_id:
            where = f"{self._storage.shown}/{folder}/{MANIFEST}"
            raise CheckpointReadError(f"{where}: is of run {manifest.run_id}, and not of {self._run_id}")
        whole = sum(one.bytes for one in manifest.files.values())
        if whole > memory_bytes():
            raise DamagedError(f"{MANIFEST}: names {whole} bytes, more than the memory of this machine")
        if manifest.round != number:
            raise DamagedError(f"{MANIFEST}: is of round {manifest.round}")
        return manifest

    def _file(self, folder: str, name: str, entry: FileEntry) -> bytes | dict[str, Bytes]:
        """Return a file's content, checked: tensors by their keys, or the state as it is."""
        data = self._get(f"{folder}/{name}", entry.bytes + 1)
        if data.nbytes != entry.bytes:
            more = "more than" if data.nbytes > entry.bytes else f"{data.nbytes} of"
            raise DamagedError(f"{name}: has {more} {entry.bytes} bytes")
        if name.endswith(".json"):
            if checksum_of(data.data) != entry.checksum:
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


def _export(meta: dict[str, Any], tensors: Mapping[str, Bytes]) -> StateExport:
    """Return a node's state, of the tensors that its ``meta`` names.

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
