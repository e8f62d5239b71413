"""For tests of checkpoints: nodes' states out of plain tensors, and an object store that fails when it is told to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from starling.actors.replica.state_transfer import StateExport, _pack
from starling.actors.wire.buffers import as_buffer
from starling.orchestrator.checkpoints.filesystems import RemoteStorage

if TYPE_CHECKING:
    from torch import Tensor

    from starling.orchestrator.checkpoints.reader import Checkpoint


def export_of(*leaves: Tensor, **meta: Any) -> StateExport:
    """A state with these tensors."""
    forms = [{"dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)} for leaf in leaves]
    return StateExport({"round": 7, **meta, "tensors": forms}, [as_buffer(leaf.contiguous()) for leaf in leaves])


def packed(state: Any) -> StateExport:
    """A tree of state, as a replica would export it."""
    leaves: list[Tensor] = []
    tree = _pack(state, leaves)
    return export_of(*leaves, shared=tree)


def contents(nodes: Any) -> dict[int, tuple[dict[str, Any], list[bytes]]]:
    """What can be compared."""
    return {node: (export.meta, [array.tobytes() for array in export.arrays]) for node, export in dict(nodes).items()}


def states(seed: int, num_nodes: int = 2) -> list[tuple[int, StateExport]]:
    """Different nodes with something in common."""
    common = torch.full((40,), float(seed))
    own = (torch.arange(9, dtype=torch.int64) + 100 * node + seed for node in range(num_nodes))
    return [(node, export_of(common, mine, seed=seed)) for node, mine in enumerate(own)]


def is_of(checkpoint: Checkpoint, seed: int) -> bool:
    """Whether it holds ``states(seed)``, whole."""
    return checkpoint.controller == {"seed": seed} and contents(checkpoint.nodes) == contents(states(seed))


class LostAnswerError(OSError):
    """The store did what it was asked, and nobody heard of it."""


@dataclass
class ObjectStore(FileSystemHandler):
    """Objects by their keys, as S3 has them: they appear whole, folders are not there, listings are by prefix.

    Operations are counted; ``fails`` says of each whether it is refused (``"refused"``), done without an answer
    (``"unheard"``) or done.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    operations: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    """By the number of the operation, the first is 0."""
    dead_from: int | None = None
    """From this operation on all are refused."""
    log: list[str] = field(default_factory=list)

    def storage(self, root: str = "bucket/runs/r1") -> RemoteStorage:
        """As the store sees it."""
        return RemoteStorage(PyFileSystem(self), root, f"mock://{root}", is_flat=True)

    def heal(self) -> None:
        """Fail no more."""
        self.failures, self.dead_from = {}, None

    def _operation(self, what: str, act: Any) -> Any:
        number = self.operations
        self.operations += 1
        self.log.append(what)
        failure = self.failures.get(number)
        if failure == "refused" or (self.dead_from is not None and number >= self.dead_from):
            raise OSError(f"When {what}: AWS Error NETWORK_CONNECTION\nsecond line")
        result = act()
        if failure == "unheard":
            raise LostAnswerError(f"When {what}: timeout")
        return result

    # --- what FileSystemHandler asks for ---------------------------------------------------------------------------

    def get_type_name(self) -> str:
        return "mock"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        def look() -> list[FileInfo]:
            return [
                FileInfo(path, FileType.File, size=len(self.objects[path]))
                if path in self.objects
                else FileInfo(path, FileType.NotFound)
                for path in paths
            ]

        return self._operation(f"looking for {paths}", look)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        def listed() -> list[FileInfo]:
            prefix = f"{selector.base_dir}/"
            files = [key for key in sorted(self.objects) if key.startswith(prefix)]
            folders = sorted({key.rpartition("/")[0] for key in files} - {selector.base_dir})
            return [FileInfo(path, FileType.Directory) for path in folders] + [
                FileInfo(path, FileType.File, size=len(self.objects[path])) for path in files
            ]

        return self._operation(f"listing {selector.base_dir}", listed)

    def delete_file(self, path: str) -> None:
        def delete() -> None:
            if path not in self.objects:
                raise FileNotFoundError(path)
            del self.objects[path]

        self._operation(f"deleting {path}", delete)

    def delete_dir(self, path: str) -> None:
        # One request for each object: any of them may be the one that fails.
        for key in sorted(self.objects):
            if key.startswith(f"{path}/"):
                self._operation(f"deleting {key}", lambda key=key: self.objects.pop(key))

    def open_input_file(self, path: str) -> pa.NativeFile:
        def read() -> pa.NativeFile:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return pa.BufferReader(self.objects[path])

        return self._operation(f"reading {path}", read)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        self._operation(f"opening {path}", lambda: None)
        return pa.PythonFile(_Upload(self, path), mode="w")

    def _unused(self, *_: Any) -> Any:
        raise AssertionError("an object store is not asked for this")

    create_dir = copy_file = move = delete_dir_contents = delete_root_dir_contents = _unused
    open_input_stream = open_append_stream = _unused


class _Upload:
    """Parts of an object that appears when it is closed; never if one of them has failed, as with pyarrow's client."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        self._store, self._path, self._parts = store, path, list[bytes]()
        self._failed: OSError | None = None
        self.closed = False

    def write(self, data: Any) -> int:
        try:
            self._store._operation(f"writing {self._path}", lambda: self._parts.append(bytes(data)))
        except OSError as error:
            self._failed = error
            raise
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self._failed:
                raise self._failed
            self._store._operation(f"closing {self._path}", self._complete)

    def _complete(self) -> None:
        self._store.objects[self._path] = b"".join(self._parts)
