"""Weights: the values that training begins from, and a finished model as a module again."""

from __future__ import annotations

import json
import os
import struct
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from starling.algorithms.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

_NAME = "model.safetensors"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000  # as safetensors has it


class HeaderError(ValueError):
    """The header of a safetensors file is none, or not that of this file."""


def read_weights(key: str, path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a run's directory; local, or a URI of pyarrow's file systems.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    from pyarrow.fs import FileSystem, FileType
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    from starling.actors.data.files import is_uri, shown, unreachable

    try:
        if is_uri(path):
            filesystem, place = FileSystem.from_uri(path)
            if filesystem.get_file_info(place).type == FileType.Directory:
                place = f"{place.rstrip('/')}/{_NAME}"
            with filesystem.open_input_stream(place) as stream:
                data = stream.read()
                check_header(BytesIO(data), len(data))
                return load(data)
        local = Path(path).expanduser()
        if local.is_dir():
            if not (local / _NAME).is_file():
                raise DataError(
                    f"{key}: {local} has no {_NAME}; name a finished run's directory, or a safetensors file"
                )
            local /= _NAME
        if not local.is_file():
            raise DataError(f"{key}: {local} does not exist here; name a safetensors file, or a run's directory")
        with local.open("rb") as file:
            check_header(file, os.fstat(file.fileno()).st_size)
        return load_file(local)
    except HeaderError as error:
        raise DataError(f"{key}: {shown(path)} {error}") from None
    except SafetensorError as error:
        raise DataError(f"{key}: {shown(path)} is not a safetensors file: {error}") from None
    except (OSError, ValueError) as error:
        raise DataError(unreachable(key, path, error)) from None


def check_header(file: BinaryIO, size: int) -> None:
    """Check, before anything is allocated, that the header of a safetensors file is that of a file of ``size`` bytes.

    Raises:
        HeaderError: it is not, or its tensors are more than this machine's memory holds.
    """
    head = file.read(_LENGTH.size)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
    if length > min(size - _LENGTH.size, _MAX_HEADER):
        raise HeaderError("is not a safetensors file: its header is longer than the file")
    try:
        entries: dict[str, Any] = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        end = max([0, *ends])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise HeaderError("is not a safetensors file: its header is none") from None
    if _LENGTH.size + length + end != size:
        raise HeaderError(f"is not a whole safetensors file: its header describes {end} bytes of tensors")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise HeaderError(f"has {size} bytes, more than the memory of this machine ({memory})")


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], key: str, path: str) -> None:
    """Copy tensors into the trainable parameters and the buffers of their names.

    Raises:
        DataError: they are those of another model: names or shapes differ.
    """
    trainable = {name: one for name, one in module.named_parameters() if one.requires_grad}
    buffers = dict(module.named_buffers())
    missing = sorted(trainable.keys() - tensors.keys())
    more = sorted(tensors.keys() - trainable.keys() - buffers.keys())
    for names, what in ((missing, "lacks"), (more, "has")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            not_ours = "" if names is missing else ", which the model has not"
            raise DataError(
                f"{key}: {path} {what} {names[0]}{others}{not_ours}; it is of another model than task.model"
            )
    for name, target in (trainable | buffers).items():
        value = tensors.get(name)
        if value is None:
            continue
        if value.shape != target.shape:
            shapes = f"{list(value.shape)} in {path} and {list(target.shape)} in the model"
            hint = " (another vocabulary, or tokenizer?)" if value.shape[1:] == target.shape[1:] else ""
            raise DataError(f"{key}: {name} is {shapes}{hint}; task.model must be as it was when that was trained")
        if value.is_complex() != target.is_complex() or (value.is_floating_point() and not target.is_floating_point()):
            kinds = [str(one.dtype).removeprefix("torch.") for one in (value, target)]
            raise DataError(
                f"{key}: {name} is {kinds[0]} in {path} and {kinds[1]} in the model, which would lose values"
            )
        target.data.copy_(value)
