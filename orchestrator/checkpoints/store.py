"""Checkpoints: all that a run needs to go on, in plain files, whole or not there.

    round-000012/                   in `checkpoints/` of the run directory, or below `checkpoint.uri` and the run's id
        tensors-000.safetensors     tensors by content (checkpoints.tensor_files): what nodes have alike is there once
        state.json                  the controller's state, and each node's: its trees, and the keys of its tensors
        manifest.json               written last: schema, run, round, time; bytes and checksum of each of the others

A folder without a manifest is no checkpoint. Nothing is unpickled. A round that is written again, after a resume from
an earlier round, gets files with other names (``state.1.json``). The existing files stay whole until the new manifest
is in place.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from starling.algorithms.words import listed
from starling.orchestrator.checkpoints.draft import Draft
from starling.orchestrator.checkpoints.filesystems import one_line, open_storage, remove_files
from starling.orchestrator.checkpoints.manifest import MANIFEST, folder_of
from starling.orchestrator.checkpoints.reader import CheckpointReader
from starling.orchestrator.checkpoints.tensor_files import DamagedError
from starling.orchestrator.errors import CheckpointError, CheckpointReadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from starling.actors.replica.state_transfer import StateExport
    from starling.algorithms.api import NodeId
    from starling.orchestrator.checkpoints.filesystems import Storage
    from starling.orchestrator.checkpoints.reader import Checkpoint

FOLDER = "checkpoints"

_NAME = re.compile(r"round-(\d{6,})")
_FILE_BYTES = 64 * 1024 * 1024


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
        is_shared = uri is not None or storage is not None
        self._reader = CheckpointReader(self._storage, run_id if is_shared else None)
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
        draft = Draft(self._storage, self._run_id, number, self._file_bytes)
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

    def _tidy(self, number: int, draft: Draft) -> None:
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
            checkpoint = self._reader.read(chosen)
        except DamagedError as error:
            hint = _hint(rounds, chosen, asked=number is not None, previous=from_previous)
            raise CheckpointReadError(f"{where}/{folder_of(chosen)}/{error}; {hint}") from None
        self._begun_from = chosen
        return checkpoint

    def adopt(self, number: int) -> None:
        """Put this user's mark on the checkpoint of a round, which was read and is gone on from."""
        with suppress(OSError, DamagedError):  # then it is asked about once more
            self._storage.put_whole(
                f"{folder_of(number)}/{MANIFEST}", self._reader.manifest(number).sealed().to_bytes()
            )

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


def _whole(folders: Mapping[str, set[str]]) -> list[int]:
    """The rounds of folders with a manifest, ascending."""
    matches = ((_NAME.fullmatch(name), files) for name, files in folders.items())
    return sorted(int(match[1]) for match, files in matches if match and MANIFEST in files)


def _remove(storage: Storage, folder: str, files: set[str]) -> None:
    """Remove a checkpoint. One of which the manifest is gone is none any more, should this be interrupted."""
    if MANIFEST in files:
        storage.remove(f"{folder}/{MANIFEST}")
    storage.remove_folder(folder)


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
