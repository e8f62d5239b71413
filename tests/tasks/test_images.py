"""Images: from folders and from Parquet, scaled, held out, learned from; and what cannot be read is named."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from starling import simulate
from starling.actors.data import DataConfig, files
from starling.actors.data.indices import concrete
from starling.actors.data.row_groups import UnreadableError
from starling.actors.host.build import load_data
from starling.actors.tasks import images
from starling.actors.tasks.images import Images
from starling.algorithms.errors import DataError

COLORS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def encoded(color: tuple[int, int, int], size: tuple[int, int] = (12, 10), form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, form)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, color in COLORS.items():
        for number in range(20):
            path = root / name / ("deep" if number % 2 else ".") / f"{number:02}.{('png', 'bmp')[number % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(color, (8 + number, 9), path.suffix[1:].upper()))
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "images.parquet"
    images = [{"bytes": encoded(color), "path": name} for name, color in COLORS.items()] * 20
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2] * 20}), path, row_group_size=3)
    return path


def small(path: Path | str, **fields: Any) -> Images:
    return Images.model_validate({"path": str(path), "size": 8, "model": {"name": "cnn", "width": 4}} | fields)


def test_a_folder_per_class(folder: Path):
    task = small(folder)
    train, validation = task.train_samples(1), task.validation_samples(1)
    assert (len(train), len(validation)) == (54, 6)
    images, labels = train.batch(torch.arange(54))
    assert (images.shape, images.dtype) == ((54, 3, 8, 8), torch.uint8)
    assert labels.tolist() == [0] * 18 + [1] * 18 + [2] * 18
    for image, label in zip(images, labels.tolist(), strict=True):
        color = list(COLORS.values())[label]  # the names are in their order
        assert image.float().mean(dim=(1, 2)).tolist() == list(color)
    assert train.class_names == ["blue", "green", "red"]
    grey = small(folder, channels=1).train_samples(1).batch(torch.arange(2))[0]
    assert grey.shape == (2, 1, 8, 8)
    assert task.build()(images.float()).shape == (54, 3)


def test_by_the_folder_that_they_lie_in(folder: Path):
    data = load_data(
        small(folder), DataConfig.model_validate({"partition": {"name": "column", "column": "folder"}}), 6, 0
    )
    assert sorted(len(part) for part in data.parts) == [9, 9, 9, 9, 9, 9]
    for part in data.parts:
        assert len(data.train.batch(concrete(part))[1].unique()) == 1


def test_a_parquet_column(table: Path):
    task = small(table)
    train, validation = task.train_samples(1), task.validation_samples(1)
    assert (len(train), len(validation)) == (54, 6)
    images, labels = train.batch(torch.arange(3))
    assert labels.tolist() == [0, 1, 2]
    assert [image.float().mean(dim=(1, 2)).tolist() for image in images] == [list(one) for one in COLORS.values()]
    plain = table.parent / "plain.parquet"
    pq.write_table(pa.table({"image": [encoded(COLORS["red"])] * 30, "label": [0] * 30}), plain)
    assert small(plain).train_samples(1).batch(torch.arange(1))[0].float().mean(dim=(2, 3)).tolist() == [
        [250.0, 0.0, 0.0]
    ]


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_colors_are_learned(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    raw = {
        "rounds": 6,
        "algorithm": {"name": "fedavg", "epochs": 2},
        "task": small(request.getfixturevalue(kind)).model_dump(),
        "data": {"batch_size": 4},
        "optimizer": {"name": "adamw", "lr": 0.02},
        "evaluation": {"every_rounds": 0},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
    }
    assert simulate(raw, run_dir=tmp_path / "run").metrics["accuracy"] == 1.0


def test_few_decoded_images_are_kept(folder: Path):
    train: Any = small(folder, size=200, memory_mb=1).train_samples(1)
    train.batch(torch.arange(20))
    assert len(train._cache) <= 9  # of 120 kB each


def test_what_cannot_be_read_is_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(20):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{number:02}.png").write_bytes(encoded((9, 9, 9)) if number != 5 else b"no image")
    train = small(tmp_path).train_samples(1)
    with pytest.raises(
        DataError, match=r"a/05.png cannot be read as an image: .*; task.on_bad_image: skip leaves such"
    ):
        train.batch(torch.arange(10))
    skipping: Any = small(tmp_path, on_bad_image="skip").train_samples(1)
    with caplog.at_level(logging.WARNING, logger="starling"):
        logging.getLogger("starling").propagate = True
        assert skipping.present(torch.arange(10)).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert skipping.present(torch.tensor([5])).tolist() == []
    assert len(caplog.records) == 1


# --- what is in the files ---------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype("u2")
GREY = np.arange(256).reshape(16, 16).astype("u1")


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(data: bytes, channels: int = 1) -> np.ndarray[Any, Any]:
    return images._decoded(data, "it", 16, channels).numpy()


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(RAMP)),
        saved(Image.fromarray(RAMP), "TIFF"),
        b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "pgm"],
)
def test_sixteen_bits_are_scaled(data: bytes):
    assert np.array_equal(decoded(data)[0], GREY)
    assert np.array_equal(decoded(data, 3), np.stack([GREY] * 3))


@pytest.mark.parametrize(
    ("kind", "form"),
    [("1", "PNG"), ("L", "GIF"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")],
)
def test_all_that_has_eight_bits_is_read(kind: str, form: str):
    image = Image.fromarray(GREY).convert("RGB").convert(kind)
    assert np.array_equal(decoded(saved(image, form), 3), np.array(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_camera_was_held(orientation: int):
    meant = np.zeros((16, 16), "u1")
    meant[:8], meant[:, :4] = 200, 255
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the one of the tag undoes
    image = Image.fromarray(meant)
    image = image if orientation == 1 else image.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(saved(image, exif=exif))[0], meant)


def test_what_is_transparent_is_white():
    pixels = np.zeros((16, 16, 4), "u1")  # black on black, but for what covers it
    pixels[4:12, 4:12, 3] = 255
    expected = np.full((16, 16), 255)
    expected[4:12, 4:12] = 0
    assert np.array_equal(decoded(saved(Image.fromarray(pixels)))[0], expected)
    palette = Image.fromarray(GREY).convert("P")
    assert decoded(saved(palette, transparency=int(np.array(palette)[0, 0])))[0, 0, 0] == 255


def test_of_several_frames_one_is_taken_and_that_is_said(caplog: pytest.LogCaptureFixture):
    frames = [Image.fromarray(GREY), Image.fromarray(GREY.T)]
    logging.getLogger("starling").propagate = True
    files.forget()
    for _ in range(2):
        data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert np.array_equal(decoded(data)[0], GREY)
    (record,) = caplog.records
    assert "it has several frames; the first is taken" in record.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>", "it cannot be read as an image: its bytes are those of no format that Pillow knows"),
        (b"", "it cannot be read as an image: it is empty"),
        (saved(Image.fromarray(RAMP.astype("i4")), "TIFF"), "it has values of 32 bits, whose range nobody knows"),
        (saved(Image.fromarray(RAMP.astype("f4")), "TIFF"), "it has values of floats, whose range nobody knows"),
        (saved(Image.fromarray(GREY), "JPEG")[:-90], "it cannot be read as an image: .*[Tt]runcated"),
        (saved(Image.new("L", (8001, 8000))), "8001×8000 pixels are too many"),
        (saved(Image.fromarray(GREY))[:20], "it cannot be read as an image: [^<]*$"),
    ],
    ids=["html", "empty", "int32", "float", "truncated", "large", "header"],
)
def test_what_no_picture_can_be_made_of_is_said_in_a_line(data: bytes, message: str):
    with pytest.raises(UnreadableError, match=message):
        decoded(data)


def test_pictures_of_a_kind_that_is_not_read_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    files.forget()
    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number:02}.png").write_bytes(encoded((1, 1, 1)))
    for name in ("x.heic", "y.heic", "notes.txt", ".z.raw"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert len(small(tmp_path).train_samples(1)) == 18
    (record,) = caplog.records
    assert record.message.endswith("has files that are not taken for images, left out: 2 .heic")


def test_pictures_beside_tables_are_not_left_out_in_silence(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(encoded((1, 1, 1)))
    pq.write_table(pa.table({"image": [encoded((1, 1, 1))] * 20, "label": [0] * 20}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"has Parquet files and images \(.*t.parquet, .*0.png\)"):
        small(tmp_path).train_samples(1)


def test_images_that_are_left_out_are_not_counted(tmp_path: Path):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(12):
            data = b"" if name == "a" and number in (3, 4, 5) else encoded((9 * number, 1, 1))
            (tmp_path / "d" / name / f"{number:02}.png").write_bytes(data)
    raw = {
        "rounds": 1,
        "algorithm": "fedavg",
        "task": {"name": "images", "path": str(tmp_path / "d"), "size": 8, "on_bad_image": "skip"},
        "data": {"batch_size": 8},
        "cluster": {"nodes": {"target": 2}},
        "tracking": "none",
    }
    samples = simulate(raw, run_dir=tmp_path / "run").samples
    assert (samples["drawn"], samples["committed"], samples["redrawn"]) == (19, 19, 0)  # of 22


def test_a_bad_image_in_parquet_names_its_row(tmp_path: Path):
    path = tmp_path / "t.parquet"
    images = [encoded((1, 1, 1))] * 20
    images[12] = b"\x00\x01"
    pq.write_table(pa.table({"image": images, "label": [0] * 20}), path, row_group_size=10)
    with pytest.raises(
        DataError, match=r"t.parquet, row group 1, row 2 cannot be read as an image: .*on_bad_image: skip"
    ):
        small(path).train_samples(1).batch(torch.arange(15))
    skipping: Any = small(path, on_bad_image="skip").train_samples(1)
    assert skipping.present(torch.arange(18)).tolist() == list(range(9))


def test_errors(folder: Path, table: Path, tmp_path: Path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "loose.png").write_bytes(encoded((1, 1, 1)))
    other = tmp_path / "other" / "purple"
    other.mkdir(parents=True)
    (other / "1.png").write_bytes(encoded((1, 1, 1)))
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"image": range(30), "label": [0] * 30}), numbers)
    for task, message in (
        (small(tmp_path / "nowhere"), "task.path: .*/nowhere does not exist here"),
        (small(tmp_path / "mixed"), "task.path: .*/loose.png lies in no class's folder; images must be in .*/<class>/"),
        (
            small(folder, validation=str(other.parent)),
            "task.validation: .*/other has the class purple, which .* has not",
        ),
        (small(numbers), "task.image: column image is int64; it must hold encoded images: binary, or a struct with"),
        (small(table, image="picture"), "task.image: there is no column 'picture'"),
        (small(table, label="class"), "task.label: there is no column 'class'"),
        (small(table, classes=2), "column label has the class 2, and classes are 0 to 1"),
        (
            small(folder, model={"name": "cnn", "stages": 4}),
            "task.model.stages: 4 stages halve images of 8×8 below one",
        ),
    ):
        with pytest.raises(Exception, match=message) as caught:
            _ = task.validation_samples(1), task.train_samples(1).batch(torch.arange(3)), task.build()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["folder", "table"])
def test_each_node_opens_its_own_images(tmp_path: Path, folder: Path, table: Path, form: str):
    for node, (name, color) in enumerate(COLORS.items()):
        if form == "folder":
            (tmp_path / f"site-{node}" / name).mkdir(parents=True)
            (tmp_path / f"site-{node}" / name / "1.png").write_bytes(encoded(color))
        else:
            (tmp_path / f"site-{node}").mkdir()
            pq.write_table(
                pa.table({"image": [encoded(color)], "label": [node]}), tmp_path / f"site-{node}" / "a.parquet"
            )
    common = folder if form == "folder" else table
    task = small(tmp_path / "site-{node}", validation=str(common))
    data = load_data(task, DataConfig(source="federated"), 3, 0)
    for node in range(3):
        images, labels = data.train.batch(concrete(data.parts[node]))
        assert labels.tolist() == [node]
        assert images.float().mean(dim=(2, 3)).tolist() == [list(list(COLORS.values())[node])]
    assert len(data.validation) == 60
    assert task.build()(images.float()).shape == (1, 3)
    with pytest.raises(DataError, match="set data.source: federated"):
        load_data(task, DataConfig(), 3, 0)


def test_an_array_is_not_an_image_file(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match="has no .apng or .avif"):
        small(tmp_path).train_samples(1)
