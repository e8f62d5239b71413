"""A checkpoint's manifest: the files that it consists of, with their checksums and this user's mark."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints

from starling.orchestrator.checkpoints.tensor_files import DamagedError
from starling.orchestrator.records import identity

if TYPE_CHECKING:
    from starling.orchestrator.checkpoints.filesystems import Piece

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
"""Name of the file."""

_SEALED = "checkpoint"


def folder_of(number: int) -> str:
    """Return the name of the folder with the checkpoint of a round."""
    return f"round-{number:06}"


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: NonNegativeInt
    checksum: str


class Manifest(BaseModel):
    """The files of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    round: NonNegativeInt
    time: str
    files: dict[
        Annotated[str, StringConstraints(pattern=r"^(state|tensors-\d{3,})(\.\d+)?\.(json|safetensors)$")], FileEntry
    ]
    mark: Annotated[str, Field(exclude=True)] = ""
    """Keyed hash (HMAC) by this user's key over the fields before it; empty: no place to keep a key."""
    checksum: Annotated[str, Field(exclude=True)] = ""
    """Checksum of all of the above: damage is noticed without a key, too."""

    def sealed(self) -> Manifest:
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
        """Return the content of the file."""
        data = self.model_dump() | ({"mark": self.mark} if self.mark else {})
        return json.dumps(data | {"checksum": checksum_of(json.dumps(data).encode())}, indent=2).encode() + b"\n"


def checksum_of(data: Piece) -> str:
    """Return the checksum of bytes, with its algorithm's name."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sum_of(data: object) -> str:
    """Return the checksum of one part of a state: it names the edited part of a file that was sealed again."""
    return checksum_of(json.dumps(data).encode())


def check_sums(name: str, whole: dict[str, Any]) -> None:
    """Compare the parts of a state with their own checksums; older checkpoints have none.

    Raises:
        DamagedError: one is another's; it is named.
    """
    sums = whole.get("sums")
    if sums is None:
        return
    parts: dict[str, Any] = {**whole["nodes"], "controller": whole["controller"]}
    for part in sorted({*sums, *parts}):
        if part not in parts or sums.get(part) != sum_of(parts[part]):
            what = part if part == "controller" else f"node {part}"
            raise DamagedError(f"{name}: the state of {what} is not what was saved")
