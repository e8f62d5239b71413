"""A checkpoint that is being written: tensors as they come, then the state, then the manifest."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starling.orchestrator.checkpoints import tensor_files
from starling.orchestrator.checkpoints.filesystems import remove_files
from starling.orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest, checksum_of, folder_of, sum_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.filesystems import Piece, Storage
    from starling.orchestrator.checkpoints.tensor_files import StoredTensor


@dataclass
class Draft:
    """A checkpoint that is being written."""

    storage: Storage
    run_id: str
    number: int
    file_bytes: int
    nbytes: int = 0
    _files: dict[str, FileEntry] = field(default_factory=dict[str, FileEntry])
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
        """Name of its folder."""
        return folder_of(self.number)

    @property
    def names(self) -> set[str]:
        """Names of its files."""
        return {*self._files, MANIFEST}

    def begin(self) -> None:
        """Find a place for it."""
        files = self.storage.folders().get(self.folder)
        if files is not None and MANIFEST not in files:
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
        sums = {node: sum_of(meta) for node, meta in self._nodes.items()} | {"controller": sum_of(controller)}
        state = json.dumps({"controller": controller, "nodes": self._nodes, "sums": sums}).encode()
        self._put(self._name("state", "json"), [state], checksum_of(state))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        facts = Manifest(run_id=self.run_id, round=self.number, time=time, files=self._files)
        manifest = facts.sealed().to_bytes()
        self._may_be_there = True
        try:
            self.storage.put_whole(f"{self.folder}/{MANIFEST}", manifest)
        except OSError:
            # An object may be there although the answer was lost; and if it is, then the checkpoint is.
            if not self._is_there(manifest):
                raise
        self.nbytes += len(manifest)

    def _is_there(self, manifest: bytes) -> bool:
        try:
            found = self.storage.get(f"{self.folder}/{MANIFEST}", len(manifest) + 1).tobytes()
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
                    self.storage.remove(f"{self.folder}/{MANIFEST}")
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
        self._files[name] = FileEntry(bytes=nbytes, checksum=checksum)
        self.storage.put(f"{self.folder}/{name}", pieces)
        self.nbytes += nbytes

    def _name(self, stem: str, suffix: str) -> str:
        return f"{stem}.{self._again}.{suffix}" if self._again else f"{stem}.{suffix}"
