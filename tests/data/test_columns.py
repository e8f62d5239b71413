"""Columns of tables: what their values become, what is refused, and how files of one table may differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from starling.actors.data import files
from starling.actors.data.columns import codes_of, numbers_of
from starling.actors.tasks.parquet import Parquet
from starling.algorithms.errors import DataError

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


@pytest.fixture(autouse=True)
def anew():
    files.forget()


def numbers(values: Any, kind: pa.DataType, dtype: np.dtype[Any] = FLOAT) -> np.ndarray[Any, Any]:
    return numbers_of(pa.chunked_array([pa.array(values, kind)]), "x", "place", dtype)


def written(path: Path, size: int = 4, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=size)
    return str(path)


def task(path: Path | str, label: str = "y", **fields: Any) -> Parquet:
    return Parquet.model_validate({"path": str(path), "label": label, "model": {"name": "mlp", "hidden": [2]}} | fields)


def read(one: Parquet) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, training ones first."""
    both = [one.train_samples(1), one.validation_samples(1)]
    features, labels = zip(*(part.batch(torch.arange(len(part))) for part in both), strict=True)
    return torch.cat(features), torch.cat(labels)


def inputs(one: Parquet) -> int:
    return next(one.build().parameters()).shape[1]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([-1.5, 2.25], pa.float16(), [-1.5, 2.25]),
        ([1, 2], pa.decimal128(10, 0), [1, 2]),
        (["1.25", "-3"], pa.decimal128(10, 2), [1.25, -3]),
        ([True, False], pa.bool_(), [1, 0]),
        ([2**24, -(2**24), 2**30], pa.int64(), [2**24, -(2**24), 2**30]),
        ([2**63, 0], pa.uint64(), [2**63, 0]),
        ([-(2**63)], pa.int64(), [-(2**63)]),
        ([1, 2, 1], pa.dictionary(pa.int8(), pa.int64()), [1, 2, 1]),
        ([[1, 2], [3, 4]], pa.list_view(pa.int64()), [[1, 2], [3, 4]]),
        ([[1, 2], [3, 4]], pa.large_list(pa.float64()), [[1, 2], [3, 4]]),
        ([[1, 2], [3, 4]], pa.list_(pa.int8(), 2), [[1, 2], [3, 4]]),
    ],
    ids=str,
)
def test_numbers_of_all_kinds_are_features(values: Any, kind: pa.DataType, expected: Any):
    from decimal import Decimal

    given = [Decimal(value) for value in values] if pa.types.is_decimal(kind) else values
    given = np.array(given, "f2") if pa.types.is_float16(kind) else given
    assert numbers(given, kind).tolist() == expected


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1.0, float("nan")], pa.float64(), r"place: column x has NaN \(1 of 2 values\); fill or leave out rows"),
        ([1.0, float("-inf")], pa.float32(), r"column x has -inf \(1 of 2 values\)"),
        ([[1.0, float("nan")]], pa.list_(pa.float64()), r"column x has NaN \(1 of 2 values\)"),
        ([1e300], pa.float64(), "column x has 1e[+]300 .* too large for float32; scale the column"),
        (
            [2**24 + 1],
            pa.int32(),
            "column x has 16777217, which float32 cannot tell from 16777216; leave the column out",
        ),
        ([5, 2**63 - 1], pa.int64(), "column x has 9223372036854775807, which float32 cannot tell from"),
        ([2**64 - 1], pa.uint64(), "column x has 18446744073709551615, which float32 cannot tell from"),
        ([[], []], pa.list_(pa.int64()), "the lists of column x are empty"),
        ([1, None], pa.int64(), "column x has 1 nulls"),
        ([[1, None]], pa.list_(pa.int64()), "column x has nulls in its lists"),
    ],
    ids=str,
)
def test_values_that_would_be_lost_are_refused(values: Any, kind: pa.DataType, message: str):
    with pytest.raises(DataError, match=message):
        numbers(values, kind)


def test_classes_of_more_than_64_bits_are_refused():
    with pytest.raises(DataError, match="column x has values that are no whole numbers of 64 bits"):
        numbers([2**63], pa.uint64(), INT)


def test_values_are_numbered_in_their_order_and_what_is_missing_comes_last():
    values = pa.chunked_array([pa.array(["b", None]), pa.array(["a", "b"])])
    codes, missing = codes_of(values, "x")
    assert (codes.tolist(), missing) == ([1, 2, 0, 1], 1)
    assert codes_of(pa.chunked_array([pa.array([None, None], pa.string())]), "x")[0].tolist() == [0, 0]
    with pytest.raises(DataError, match="samples cannot be divided by x, which is list<"):
        codes_of(pa.chunked_array([pa.array([[1], [2]])]), "x")


# --- which columns ----------------------------------------------------------------------------------------------------

Y = [0, 1] * 10
X = [float(number) for number in range(20)]
ANIMALS = np.array(["dog", "cat"] * 10)


def test_a_column_whose_statistics_cannot_be_read_is_read(tmp_path: Path):
    half = np.array(X, "f2") - np.float16(9)
    features, labels = read(task(written(tmp_path / "a.parquet", 20, h=half, y=Y)))
    assert (features[:, 0].tolist(), labels.tolist()) == ((half.astype("f4")).tolist(), Y)


def test_columns_of_one_name_are_refused(tmp_path: Path):
    names = ["a", "a", "b", "y"]
    pq.write_table(pa.table([pa.array(X), pa.array(X), pa.array(X), pa.array(Y)], names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="task.features: there are 2 columns 'a'; give them different names"):
        task(tmp_path / "a.parquet").build()
    features, _ = read(task(tmp_path / "a.parquet", features=["b"]))
    assert features[:, 0].tolist() == X


def test_the_index_of_a_frame_is_no_feature(tmp_path: Path):
    import pandas as pd

    frame = pd.DataFrame({"a": X, "y": Y}).sample(frac=1, random_state=0)
    frame.to_parquet(tmp_path / "a.parquet")
    assert inputs(task(tmp_path / "a.parquet")) == 1
    assert inputs(task(tmp_path / "a.parquet", features=["a", "__index_level_0__"])) == 2
    frame.set_index(pd.Index(range(20), name="user")).to_parquet(tmp_path / "b.parquet")
    assert inputs(task(tmp_path / "b.parquet")) == 1
    plain = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata(None)  # other writers drop the note
    pq.write_table(plain, tmp_path / "c.parquet")
    assert inputs(task(tmp_path / "c.parquet")) == 1


def test_a_task_says_what_it_reads_and_what_it_leaves_out(tmp_path: Path):
    import pandas as pd

    days = pd.date_range("2026-01-01", periods=20)
    frame = pd.DataFrame({"a": X, "when": days, "b": X, "y": ANIMALS}, index=range(20, 0, -1))
    frame.to_parquet(tmp_path / "a.parquet", index=True)
    expected = {"features": "a, b", "label": "y (2 classes)"}
    told = task(tmp_path / "a.parquet").reading()
    left = told.pop("left out")
    assert told == expected
    assert left.startswith("when (timestamp[")
    assert "__index_level_0__ (index of a pandas frame)" in left or "index" not in left
    wide = task(written(tmp_path / "b.parquet", **{f"f{n}": X for n in range(30)}, y=X)).reading()
    assert wide["features"].endswith("f11 and 18 more")
    assert wide["label"] == "y (a number)"


def test_files_of_one_table_may_be_encoded_differently(tmp_path: Path):
    fields = {"a": X, "w": ["u", "v"] * 10, "n": [None] * 20, "y": Y}
    written(tmp_path / "d" / "a.parquet", **fields)
    schema = pa.schema([("y", pa.int64()), ("w", pa.large_string()), ("n", pa.float64()), ("a", pa.float64())])
    schema = pa.schema([field.with_nullable(False) for field in schema])
    columns = {"y": Y, "w": pa.array(["u", "v"] * 10).cast(pa.large_string()), "n": X, "a": X}
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "d" / "b.parquet")
    w = pa.array(["u", "v"] * 10).dictionary_encode()
    written(tmp_path / "d" / "c.parquet", **fields | {"w": w, "n": X})
    one = task(tmp_path / "d", features=["a"])
    features, labels = read(one)
    assert sorted(features[:, 0].tolist()) == sorted(X * 3)
    assert labels.sum() == 30
    assert one.train_samples(1).column("w").tolist() == [0, 1] * 28  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(DataError, match="column n has 4 nulls"):
        read(task(tmp_path / "d"))


def test_columns_in_names_of_folders_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    for user in "ab":
        written(tmp_path / f"user={user}" / "year=1" / "p=1.parquet", a=X, y=Y, year=Y)
    task(tmp_path).build()
    assert f"task.path: folders of {tmp_path} are named by user, and such columns are not read" in caplog.text


def test_lists_of_another_length_are_named(tmp_path: Path):
    lists = [[1.0, 2.0]] * 4 + [[1.0, 2.0, 3.0]] * 4
    one = task(written(tmp_path / "a.parquet", v=lists, y=Y[:8]), validation=str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"row group 1: rows have 3 values \(v 3\), and 2 in the first row group"):
        read(one)


def test_a_page_that_does_not_fit_its_checksum_is_not_read(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pa.table({"a": X, "y": Y})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_page_checksum=True)
    data = path.read_bytes()
    place = data.index(np.float64(7).tobytes())
    path.write_bytes(data[:place] + np.float64(8).tobytes() + data[place + 8 :])
    with pytest.raises(DataError, match="row group 0 cannot be read: .*on_bad_row_group"):
        read(task(path))


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_are_classes_in_the_order_of_their_names(tmp_path: Path, kind: pa.DataType):
    one = task(written(tmp_path / "a.parquet", 20, a=X, y=pa.array(ANIMALS).cast(kind)))
    _, labels = read(one)
    assert labels.tolist() == [1, 0] * 10
    train = one.train_samples(1)
    assert train.class_names == ("cat", "dog")
    assert train.labels is not None
    assert train.labels.tolist() == [1, 0] * 9


def test_names_give_the_order_of_classes(tmp_path: Path):
    path = written(tmp_path / "a.parquet", 20, a=X, y=np.where(ANIMALS == "dog", "yes", "no"))
    for names in (["yes", "no", "perhaps"], [True, False, "perhaps"]):  # YAML 1.1 has these for yes and no
        one = task(path, classes=names)
        assert read(one)[1].tolist() == [0, 1] * 10
        assert one.build()[-1].out_features == 3  # pyright: ignore[reportIndexIssue]
    with pytest.raises(DataError, match="column y has the class 'yes', and classes are no, maybe; see task.classes"):
        read(task(path, classes=["no", "maybe"]))
    with pytest.raises(DataError, match="task.classes: column y holds texts; name its classes"):
        task(path, classes=2).build()
    with pytest.raises(ValidationError, match="must name each class once"):
        task(path, classes=["no", "no"])
    numbered = written(tmp_path / "b.parquet", 20, a=X, y=Y)
    assert task(numbered, classes=["cat", "dog"]).train_samples(1).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0, 10**9] * 10), "column y would have 1000000001 classes .*, and there are 20 rows; number the"),
        (pa.array([0, 2**63] * 10, pa.uint64()), "column y would have 9223372036854775809 classes"),
        (pa.array([None, "a"] * 10), "column y has .* nulls; fill them"),
        (pa.array([-1, 1] * 10), "column y has the class -1, and classes are 0 to 1"),
        (pa.array([None] * 20), "column y is null; a label must be"),
        (pa.array([b"a"] * 20), "column y is binary; a label must be"),
        (pa.array([0.0, float("nan")] * 10), "column y has NaN"),
    ],
    ids=str,
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: pa.Array, message: str):
    one = task(written(tmp_path / "a.parquet", 20, a=X, y=labels))
    with pytest.raises(DataError, match=message):
        (one.build(), read(one))


def test_names_of_rows_are_no_classes(tmp_path: Path):
    path = written(tmp_path / "a.parquet", 400, a=[0.5] * 200, y=[f"user{number}" for number in range(200)])
    with pytest.raises(DataError, match="column y has 200 different texts in 200 rows: these are no classes"):
        task(path).build()


# --- partitions by a column -------------------------------------------------------------------------------------------


def test_rows_without_a_value_are_of_one_value(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    users = [None if number % 4 == 3 else f"u{number % 4}" for number in range(20)]
    samples = task(written(tmp_path / "a.parquet", 5, a=X, user=users, y=Y)).train_samples(1)
    codes = samples.column("user")
    assert codes is not None
    assert sorted(set(codes.tolist())) == [0, 1, 2, 3]
    assert "data.partition.column: 5 of 20 rows have no user; these are taken for rows of one value" in caplog.text
