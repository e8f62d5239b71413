"""Images: classify pictures, from a folder with one subfolder per class, or from a Parquet column of encoded images.

* A folder: ``path/<class>/<any>.png``; classes are numbered in the order of their names. A pattern or URI will do too.
* Parquet: ``image`` is a column of encoded images (binary, or the struct with ``bytes`` that Hugging Face's datasets
  write), ``label`` one of whole numbers or of texts. Row groups are dealt and read as in the task ``parquet``.
* Every picture that Pillow can read is taken, of several frames the first. An image is turned as its EXIF data say,
  laid on white where it is transparent, and scaled to ``size`` × ``size``. Values are scaled to [0, 1] (16 bits to 8
  bits first). Values of which nobody knows the range (floats, 32 bits) are refused.
* Without ``validation``, every tenth image is held out; of Parquet, every tenth row group, as in ``parquet``.
"""

from __future__ import annotations

import io
import logging
from collections import Counter, OrderedDict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from starling.actors.data import contents, files, row_groups
from starling.actors.data.classes import Classes, ClassesField, find_classes
from starling.actors.data.row_groups import RowGroupSamples, UnreadableError, open_row_groups
from starling.actors.data.samples import Samples
from starling.actors.tasks import supervised
from starling.actors.tasks.base import Task
from starling.actors.tasks.models import CNN, Model
from starling.algorithms.errors import DataError
from starling.algorithms.words import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import NDArray
    from PIL import Image

_LOG = logging.getLogger("starling")
_SUFFIXES = frozenset(
    [
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".dib", ".gif", ".webp", ".avif"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    ]
)
_NOTES = frozenset(
    {"", ".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".ini", ".db"}
)
"""Names of files that lie beside images."""
_PARQUET = frozenset({".parquet", ".pq"})
_HOLD_OUT_EVERY = 10
_MAX_PIXELS = 64_000_000
"""Most pixels of one image; a larger image is refused as an attack on memory, as Pillow refuses decompression bombs."""


class Images(Task, name="images"):
    """Classify pictures."""

    path: str  # of a folder with a folder per class, or of Parquet files
    image: str = "image"  # the column of encoded images, of Parquet
    label: str = "label"  # the column of their classes, of Parquet
    validation: str | None = None  # held-out images, in the same form; null: a tenth of the training data
    classes: ClassesField = None  # how many, or their names; null: the folders, or as in the task parquet
    size: PositiveInt = 32  # to which images are scaled, each way
    channels: Literal[1, 3] = 3  # grey or red, green and blue
    model: Model = CNN()
    memory_mb: PositiveInt = 256  # of decoded images that a process keeps, in 10⁶ bytes; a byte per value
    on_bad_image: Literal["stop", "skip"] = "stop"  # end the run, or leave it out (of Parquet, with its row group)

    def train_samples(self, num_nodes: int) -> Samples:
        """The images that are not held out."""
        files.refuse_per_node("task.path", self.path)
        if self._is_parquet:
            groups = open_row_groups("task.path", self.path)[1]
            groups = groups if self.validation is not None else row_groups.held_out(groups)[0]
            return self._row_groups("task.path", self.path, groups, whole=len(groups) >= 2 * num_nodes)
        return self._folder("task.path", self.path, None if self.validation is not None else "training")

    def own_samples(self, node: int, num_nodes: int) -> Samples | None:
        """The images of the node's own folder or files."""
        if not files.is_per_node(self.path):
            return None
        path = files.of_node(self.path, node)
        if self._is_parquet:
            return self._row_groups("task.path", path, open_row_groups("task.path", path)[1], whole=True)
        return self._folder("task.path", path, None)

    def validation_samples(self, num_nodes: int) -> Samples:
        """The held-out images."""
        self._common()
        key, path = ("task.path", self.path) if self.validation is None else ("task.validation", self.validation)
        if self._is_parquet:
            groups = open_row_groups(key, path)[1]
            groups = groups if self.validation is not None else row_groups.held_out(groups)[1]
            if not groups:
                raise DataError(f"task.path: {path} has too few images to hold out a tenth; name task.validation")
            return self._row_groups(key, path, groups, whole=False)
        return self._folder(key, path, None if self.validation is not None else "held-out")

    def build(self) -> nn.Module:
        """The chosen model."""
        return self.model.build((self.channels, self.size, self.size), self._classes.count)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy, in nats."""
        return supervised.classification_loss(*self.predictions(module, batch))

    def metrics(self, module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss and accuracy."""
        return supervised.classification_metrics(*self.predictions(module, batch))

    def predictions(self, module: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Logits, shape (b, classes), and labels."""
        images, labels = batch
        values = images.to(next(module.parameters()).dtype) / 255
        return module(values), labels

    # --- files -------------------------------------------------------------------------------------------------------

    def _common(self) -> str:
        """The path from which every process learns what classes there are."""
        return files.require_common("task.validation", self.validation) if files.is_per_node(self.path) else self.path

    @property
    def _is_parquet(self) -> bool:
        return _holds_parquet(self._common())

    @property
    def _classes(self) -> Classes:
        skip = self.on_bad_image == "skip"
        if self._is_parquet:
            return find_classes("task.path", self._common(), self.label, self.classes, skip_bad=skip)
        found = _list_folder("task.path", self._common())[1]
        names = self.classes if isinstance(self.classes, tuple) else tuple(found)
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise DataError(f"task.classes: {self._common()} has the class {unknown[0]}, which is not among them")
        if isinstance(self.classes, int) and self.classes < len(found):
            raise DataError(f"task.classes: {self._common()} has {len(found)} classes; raise it, or leave it out")
        return Classes(self.classes if isinstance(self.classes, int) else len(names), names)

    def _folder(self, key: str, path: str, part: str | None) -> ImageFolder:
        listing, classes, labels = _list_folder(key, path)
        known = list(self._classes.names or ())
        unknown = sorted(set(classes) - set(known))
        if unknown:
            raise DataError(f"{key}: {path} has the class {unknown[0]}, which {self._common()} has not")
        chosen = np.arange(len(labels))
        if part is not None:
            out = chosen % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
            chosen = chosen[out if part == "held-out" else ~out]
        numbers = torch.tensor([known.index(classes[labels[place]]) for place in chosen.tolist()], dtype=torch.int64)
        if not len(chosen):
            raise DataError(f"{key}: {path} has too few images to hold out a tenth; name task.validation")
        paths = [listing.files[place] for place in chosen.tolist()]
        return ImageFolder(listing, paths, numbers, known, self)

    def _row_groups(self, key: str, path: str, groups: list[row_groups.RowGroup], *, whole: bool) -> RowGroupSamples:
        schema = open_row_groups(key, path)[0]
        kind = row_groups.require_column("task.image", schema, self.image).type
        if not _is_encoded(kind):
            what = f"column {self.image} is {kind}; it must hold encoded images: binary, or a struct with a field bytes"
            raise DataError(f"task.image: {what}")
        row_groups.require_column("task.label", schema, self.label)
        if self.label == self.image:
            raise DataError(f"task.label: {self.label} is the column of images; name the one of classes")
        decoder = _ImageDecoder(self)
        samples = RowGroupSamples(
            groups,
            decoder,
            label=decoder.labels,
            label_columns=(self.label,),
            memory_mb=self.memory_mb,
            whole=whole,
            skip_bad=self.on_bad_image == "skip",
            option="on_bad_image",
        )
        samples.class_names = self._classes.names
        return samples


class ImageFolder:
    """Images in files, decoded when they are drawn."""

    owners = None
    columns = ("folder",)

    def __init__(
        self, listing: files.Listing, paths: list[str], labels: Tensor, class_names: list[str], task: Images
    ) -> None:
        self._listing, self._paths = listing, paths
        self._task = task
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._bad: set[int] = set()
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._paths)

    def content(self) -> Iterator[bytes]:
        """Pieces of the files, for a fingerprint."""
        return contents.of_files(self._listing.filesystem, self._paths)

    def column(self, name: str) -> NDArray[Any] | None:
        """Return column ``folder``: the path of each image's folder."""
        return np.array([path.rpartition("/")[0] for path in self._paths]) if name == "folder" else None

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Images, uint8 of shape (b, channels, size, size), and their classes.

        Raises:
            DataError: one cannot be read.
        """
        task = self._task
        images = torch.empty(len(indices), task.channels, task.size, task.size, dtype=torch.uint8)
        for row, place in enumerate(indices.tolist()):
            try:
                images[row] = self._image(place)
            except UnreadableError as error:
                raise DataError(f"{error}; task.on_bad_image: skip leaves such images out") from None
        return images, self.labels[indices]

    def present(self, indices: Tensor) -> Tensor:
        """Return the indices of images that can be read; all of them unless bad ones are skipped."""
        if self._task.on_bad_image == "stop":
            return indices
        return indices[torch.tensor([self._is_good(place) for place in indices.tolist()], dtype=torch.bool)]

    def _is_good(self, place: int) -> bool:
        if place in self._bad:
            return False
        try:
            self._image(place)
        except UnreadableError as error:
            _LOG.warning("%s; left out", error)
            self._bad.add(place)
            return False
        return True

    def _image(self, place: int) -> Tensor:
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        path = self._paths[place]
        try:
            with self._listing.filesystem.open_input_stream(path) as stream:
                data = stream.read()
        except OSError as error:
            raise UnreadableError(files.unreachable("task.path", path, error)) from None
        image = _decoded(data, path, self._task.size, self._task.channels)
        self._cache[place] = image
        if len(self._cache) * image.numel() > self._task.memory_mb * 1_000_000:
            self._cache.popitem(last=False)
        return image


class _ImageDecoder:
    """Images, uint8 of shape (r, channels, size, size), and classes, of a row group."""

    def __init__(self, task: Images) -> None:
        self._task, self._classes = task, task._classes  # noqa: SLF001 - ours
        self.columns = (task.image, task.label)

    def __call__(self, table: pa.Table, place: str) -> tuple[Tensor, ...]:
        task = self._task
        images = torch.empty(table.num_rows, task.channels, task.size, task.size, dtype=torch.uint8)
        for row, value in enumerate(table.column(task.image).to_pylist()):
            data = value["bytes"] if isinstance(value, dict) else value
            where = f"{place}, row {row}"
            if data is None:
                raise UnreadableError(f"{where}: column {task.image} has no bytes")
            images[row] = _decoded(data, where, task.size, task.channels)
        return images, self.labels(table, place)

    def labels(self, table: pa.Table, place: str) -> Tensor:
        """The classes."""
        return self._classes.of(table, self._task.label, place)


def _decoded(data: bytes, place: str, size: int, channels: int) -> Tensor:
    from PIL import Image

    if not data:
        raise UnreadableError(f"{place} cannot be read as an image: it is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check(image)
            if getattr(image, "is_animated", False) and image.format not in _WITH_PREVIEWS:
                files.say_once("frames", f"{place} has several frames; the first is taken, also of other images")
            plain = _eight_bits(image, "L" if channels == 1 else "RGB")
            pixels = np.asarray(plain.resize((size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # noqa: BLE001 - of damaged files Pillow's plugins raise whatever they stumble upon
        raise UnreadableError(f"{place} cannot be read as an image: {_reason(error)}") from None
    return torch.from_numpy(pixels.reshape(size, size, channels).copy()).permute(2, 0, 1)


_WITH_PREVIEWS = frozenset({"MPO", "ICO", "ICNS"})
"""Formats whose further frames show the same in another size, or from another eye."""


def _check(image: Image.Image) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}×{image.height} pixels are too many")
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        what = "floats" if image.mode == "F" else "32 bits"
        raise ValueError(f"it has values of {what}, whose range nobody knows; write it with 8 or 16 bits")


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The picture as it is meant to be seen, in ``mode`` "L" or "RGB"."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    # Pillow cuts off what is greater than 255. A PGM of more than 8 bits comes scaled to 16 bits, in a mode of 32.
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values * 255 + _MAX_16_BITS // 2) // _MAX_16_BITS).astype(np.uint8))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image.convert(mode)


_MAX_16_BITS = 65535


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its bytes are those of no format that Pillow knows"
    text = str(error).strip().partition("\n")[0][:120]
    return files.printable(text) or type(error).__name__


def _is_encoded(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")  # pyright: ignore[reportAttributeAccessIssue] - of structs
        return index >= 0 and _is_encoded(kind.field(index).type)  # pyright: ignore[reportAttributeAccessIssue]
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


@files.remembered
def _holds_parquet(path: str) -> bool:
    found = files.find("task.path", path, _PARQUET | _SUFFIXES).files
    tables = [name for name in found if name.lower().endswith((".parquet", ".pq"))]
    if tables and len(tables) < len(found):
        other = next(name for name in found if name not in tables)
        raise DataError(
            f"task.path: {path} has Parquet files and images ({tables[0]}, {other}); name the ones that are meant: "
            "a folder of theirs, or a pattern"
        )
    return bool(tables)


@files.remembered
def _list_folder(key: str, path: str) -> tuple[files.Listing, list[str], list[int]]:
    """The images, the names of their classes, sorted, and the class of each."""
    listing = files.find(key, path, _SUFFIXES)
    names = [listing.relative(file).split("/")[0] for file in listing.files]
    if any("/" not in listing.relative(file) for file in listing.files):
        loose = next(file for file in listing.files if "/" not in listing.relative(file))
        raise DataError(f"{key}: {loose} lies in no class's folder; images must be in {path}/<class>/")
    others = Counter(PurePosixPath(file).suffix.lower() for file in files.find(key, path).files)
    strange = sorted(set(others) - _SUFFIXES - _NOTES)
    if strange:
        told = listed(f"{others[suffix]} {suffix}" for suffix in strange)
        files.say_once(f"others {path}", f"{key}: {path} has files that are not taken for images, left out: {told}")
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return listing, classes, [numbers[name] for name in names]
