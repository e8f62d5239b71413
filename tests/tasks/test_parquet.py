"""Parquet: rows come out as they went in, a few row groups at a time; what is wrong with a file is said in a line."""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from starling import simulate
from starling.actors.data import DataConfig, assign, blocks_of
from starling.actors.data.indices import concrete
from starling.actors.data.partition import Dirichlet, Iid
from starling.actors.data.row_groups import RowGroup, RowGroupSamples, held_out
from starling.actors.host.build import load_data
from starling.actors.tasks import Task
from starling.actors.tasks.parquet import Parquet
from starling.algorithms.errors import DataError, StarlingError
from starling.algorithms.registry import find
from starling.orchestrator.errors import NodeFailedError

ROWS = 240


def rows(start: int = 0, stop: int = ROWS) -> dict[str, Any]:
    number = np.arange(start, stop)
    return {
        "a": number.astype("float32"),
        "b": (number % 7).astype("int16"),
        "word": [f"w{one % 3}" for one in number],
        "y": number % 3,
        "r": number / 8.0,
    }


def write(path: Path, group: int = 10, table: pa.Table | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows() | columns) if table is None else table
    pq.write_table(table, path, row_group_size=group)
    return path


def task(path: Path | str, **fields: Any) -> Parquet:
    return Parquet.model_validate({"path": str(path), "label": "y", "features": ["a", "b"]} | fields)


def everything(samples: RowGroupSamples) -> tuple[torch.Tensor, ...]:
    return samples.batch(torch.arange(len(samples)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("parquet") / "table.parquet")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_every_tenth_row_group_is_held_out(file: Path):
    assert find(Task, "parquet") is Parquet
    one = task(file)
    train, validation = one.train_samples(2), one.validation_samples(2)
    assert (len(train), len(validation)) == (220, 20)
    features, labels = everything(validation)
    held_out = [*range(90, 100), *range(190, 200)]
    assert features.tolist() == [[float(number), float(number % 7)] for number in held_out]
    assert labels.tolist() == [number % 3 for number in held_out]
    assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)
    features, labels = everything(train)
    assert features[:, 0].tolist() == [float(number) for number in range(ROWS) if number not in held_out]
    assert train.labels is not None
    assert torch.equal(train.labels, labels)


def test_few_row_groups_hold_out_the_last_tenth_of_each(tmp_path: Path):
    one = task(write(tmp_path / "table.parquet", group=100))
    train, validation = one.train_samples(1), one.validation_samples(1)
    held_out = [*range(90, 100), *range(190, 200), *range(236, 240)]
    assert everything(validation)[0][:, 0].tolist() == held_out
    assert everything(train)[0][:, 0].tolist() == [number for number in range(ROWS) if number not in held_out]


@pytest.mark.parametrize("count", [9, 10])
def test_from_ten_row_groups_on_whole_ones_are_held_out(count: int):
    fragment: Any = None
    train, out = held_out([RowGroup(fragment, number, 5, 25) for number in range(count)])
    if count == 9:
        assert [(one.number, one.start, one.stop) for one in train] == [(number, 5, 23) for number in range(9)]
        assert [(one.number, one.start, one.stop) for one in out] == [(number, 23, 25) for number in range(9)]
    else:
        assert [(one.number, one.start, one.stop) for one in train] == [(number, 5, 25) for number in range(9)]
        assert [(one.number, one.start, one.stop) for one in out] == [(9, 5, 25)]


def test_a_file_of_its_own_is_held_out(file: Path, tmp_path: Path):
    other = write(tmp_path / "other.parquet", group=7)
    one = task(file, validation=str(other))
    assert len(one.train_samples(1)) == ROWS
    assert everything(one.validation_samples(1))[0][:, 0].tolist() == list(range(ROWS))


def test_indices_may_come_in_any_order_and_twice(file: Path):
    train = task(file).train_samples(1)
    indices = torch.tensor([200, 3, 3, 77, 0, 219, 12])
    features, labels = everything(train)
    chosen = train.batch(indices)
    assert torch.equal(chosen[0], features[indices])
    assert torch.equal(chosen[1], labels[indices])
    assert [one.shape for one in train.batch(torch.empty(0, dtype=torch.int64))] == [(0, 2), (0,)]


def test_folders_patterns_and_uris(tmp_path: Path):
    for number in range(3):
        table = pa.table(rows(number * 80, number * 80 + 80))
        write(tmp_path / "data" / f"deep{number % 2}" / f"part-{number}.parquet", table=table)
    (tmp_path / "data" / "_notes.txt").write_text("not to be read")
    for path, parts in (
        (tmp_path / "data", [0, 2, 1]),
        (f"file://{tmp_path}/data", [0, 2, 1]),
        (f"{tmp_path}/data/*/part-[02].parquet", [0, 2]),
        (f"{tmp_path}/**/part-?.parquet", [0, 2, 1]),
    ):
        one = task(path, validation=str(tmp_path / "data" / "deep1" / "part-1.parquet"))
        read = everything(one.train_samples(1))[0][:, 0].tolist()
        assert read == [float(number) for part in parts for number in range(part * 80, part * 80 + 80)], path


def test_lists_of_numbers_are_features(tmp_path: Path):
    vectors = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 3)
    for name, column in (("fixed", fixed), ("list", pa.array(vectors.tolist()))):
        one = task(write(tmp_path / f"{name}.parquet", v=column), features=["v", "a"])
        features = everything(one.train_samples(1))[0]
        assert features[25].tolist() == [75.0, 76.0, 77.0, 25.0]
        assert one.build()(features[:2]).shape == (2, 3)


def test_features_default_to_all_columns_of_numbers(file: Path):
    one = task(file, features=None)
    assert everything(one.train_samples(1))[0].shape == (220, 3)  # a, b and r, but not the words or the label


def test_a_label_of_floats_is_a_number_to_predict(file: Path):
    one = task(file, label="r")
    train = one.train_samples(1)
    features, numbers = everything(train)
    assert torch.equal(numbers, features[:, 0] / 8)
    assert train.labels is None
    module = one.build()
    assert module(features).shape == (220, 1)
    with torch.no_grad():
        found = one.metrics(module, (features, numbers))
        error = module(features)[:, 0] - numbers
    assert float(found["loss"]) == pytest.approx(float(error.square().mean()))
    assert float(found["mae"]) == pytest.approx(float(error.abs().mean()))


@pytest.mark.parametrize("statistics", [True, False])
def test_classes_are_counted(tmp_path: Path, statistics: bool):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(rows() | {"y": np.arange(ROWS) % 5}), path, write_statistics=statistics)
    assert task(path).build()(torch.zeros(1, 2)).shape == (1, 5)
    assert task(path, classes=9).build()(torch.zeros(1, 2)).shape == (1, 9)


# --- who reads what ---------------------------------------------------------------------------------------------------


def test_row_groups_are_dealt_whole_and_read_once_per_epoch(file: Path):
    one = task(file, memory_mb=1)
    train = one.train_samples(4)
    parts = assign(train, Iid(), 4, 0)
    groups = [{int(index) // 10 for index in concrete(part)} for part in parts]
    assert set.union(*groups) == set(range(22))
    assert sum(map(len, groups)) == 22


def test_memory_is_bounded_whatever_the_size(tmp_path: Path):
    # Row groups of 2000 rows of 100 values are 0.8 MB each; 1 MB is kept, but never less than the two that are mixed.
    table = pa.table(
        {f"x{one}": np.zeros(40_000, np.float32) for one in range(100)} | {"y": np.zeros(40_000, np.int64)}
    )
    path = write(tmp_path / "wide.parquet", group=2000, table=table)
    data = load_data(task(path, features=None, memory_mb=1, mix_row_groups=2), DataConfig(), 1, 0)
    train = data.train
    assert isinstance(train, RowGroupSamples)
    draws = data.sampler.begin(data.parts[0], 0, 0, blocks_of(train))
    most = 0
    for _ in range(draws.steps_per_epoch(64)):
        train.batch(draws.next(64))
        most = max(most, len(train._cache))
    assert most == 2
    # A batch that reaches into the next window may find that one of the last window's is gone.
    assert 18 <= train.num_reads <= 18 + 9


def test_what_was_used_last_is_kept(file: Path):
    """Two row groups are, in no more memory than that: the one that nobody has asked for the longest goes."""
    train = task(file, memory_mb=1, mix_row_groups=2).train_samples(1)
    train._memory = 1
    for row, reads in ((0, 1), (10, 2), (20, 3), (21, 3), (11, 3), (31, 4), (12, 4), (22, 5)):
        assert train.batch(torch.tensor([row]))[0][0, 0] == float(row)
        assert train.num_reads == reads, f"row {row}"


def test_label_skew_divides_rows(file: Path):
    train = task(file).train_samples(4)
    parts = assign(train, Dirichlet(alpha=1.0, min_samples=1), 4, 0)
    assert torch.cat([concrete(part) for part in parts]).sort().values.tolist() == list(range(220))


def test_a_node_that_does_not_own_a_row_group_does_not_read_it(file: Path, monkeypatch: pytest.MonkeyPatch):
    one = task(file)
    train = one.train_samples(4)
    own = assign(train, Iid(), 4, 0)[1]
    read: list[str] = []
    checked = RowGroup.checked
    monkeypatch.setattr(
        RowGroup, "checked", lambda group, columns: (read.append(group.number), checked(group, columns))[1]
    )
    train.batch(concrete(own))
    numbers = [number for number in range(24) if number % 10 != 9]
    assert sorted(read) == [numbers[group] for group in sorted({int(index) // 10 for index in concrete(own)})]


def test_columns_for_partitions(file: Path):
    train = task(file).train_samples(1)
    words = train.column("word")
    assert words is not None
    assert words[:4].tolist() == [0, 1, 2, 0]  # numbers in the order of w0, w1, w2
    assert train.column("nothing") is None


# --- federated --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for node in range(3):
        write(tmp_path / f"site-{node}.parquet", table=pa.table(rows(node * 80, node * 80 + 20 * (node + 1))))
    write(tmp_path / "common.parquet")
    return tmp_path


def test_each_node_opens_its_own_file_alone(sites: Path):
    one = task(sites / "site-{node}.parquet", validation=str(sites / "common.parquet"))
    (sites / "site-0.parquet").unlink()
    data = load_data(one, DataConfig(source="federated"), 3, 0)
    assert [len(data.parts[node]) for node in (1, 2)] == [40, 60]
    own = data.train.batch(concrete(data.parts[2]))
    assert own[0][:, 0].tolist() == [float(number) for number in range(160, 220)]
    with pytest.raises(DataError, match=r"task.path: .*/site-0.parquet does not exist here"):
        data.parts[0]


def test_a_federated_run(sites: Path, tmp_path: Path):
    raw = {
        "rounds": 2,
        "algorithm": {"name": "fedavg"},
        "task": task(sites / "site-{node}.parquet", validation=str(sites / "common.parquet"), classes=3).model_dump(),
        "data": {"source": "federated", "batch_size": 8},
        "optimizer": {"lr": 0.001},
        "tracking": "none",
        "cluster": {"nodes": {"target": 3}},
    }
    summary = simulate(raw, run_dir=tmp_path / "run")
    assert summary.status == "finished"
    with pytest.raises(DataError, match=r"site-\{node\}.parquet has \{node\} in it: .* set data.source: federated"):
        simulate(raw, ["data.source=pooled"], run_dir=tmp_path / "other")


def test_federated_needs_data_of_single_nodes(file: Path, sites: Path):
    message = "data.source: the task parquet has no data that belong to single nodes; set data.source: pooled"
    with pytest.raises(DataError, match=message):
        load_data(task(file), DataConfig(source="federated"), 3, 0).parts[0]
    with pytest.raises(DataError, match="task.validation: name data that all nodes can read"):
        load_data(task(sites / "site-{node}.parquet"), DataConfig(source="federated"), 3, 0)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def broken(path: Path, group: int = 3) -> Path:
    """A file with a row group whose bytes are not what they were."""
    write(path)
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    return path


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"path": "nowhere.parquet"}, "task.path: nowhere.parquet does not exist here; name a file, a folder or a pattern"),
    ({"path": "{folder}/*.txt"}, r"task.path: .*/\*.txt matches no file in"),
    ({"path": "{empty}"}, "task.path: .*/empty has no .parquet or .pq files"),
    ({"path": "{text}"}, "task.path: .*text.parquet.* cannot be read: .*"),
    ({"path": "{mixed}"}, "task.path: .*/b.parquet has another schema than .*/a.parquet: column a is int64, not float"),
    ({"label": "z"}, "task.label: there is no column 'z'"),
    (
        {"path": "{when}", "label": "when"},
        r"task.label: column when is timestamp.*; a label must be whole numbers .*, texts .* or floats",
    ),
    ({"features": ["aa"]}, r"task.features: there is no column 'aa' \(did you mean a\?\)"),
    (
        {"features": ["a", "word"]},
        "task.features: column word is string; features must be numbers, or lists of numbers",
    ),
    ({"features": ["a", "y"]}, "task.features: y is the label; a model that is given it has nothing to learn"),
    ({"features": []}, "task.features: name at least one column"),
    (
        {"classes": 2},
        r"table.parquet, row group .: column y has the class 2, and classes are 0 to 1; raise task.classes",
    ),
    ({"label": "r", "classes": 2}, "task.classes: column r is double; classes must be whole numbers"),
    (
        {"path": "{negative}"},
        "task.label: column y has the class -1, and classes are 0 to 1; .* number the classes from 0",
    ),
    ({"path": "{nulls}"}, "nulls.parquet, row group 0: column a has 1 nulls; fill them, or leave those rows out"),
    (
        {"path": "{ragged}", "features": ["v"]},
        "the lists of column v have different lengths; features must have one shape",
    ),
    ({"path": "{broken}"}, "broken.parquet, row group 3 cannot be read: .*; task.on_bad_row_group: skip leaves such"),
    (
        {"validation": "{other}"},
        "task.validation: column a of .*/other.parquet is string, and float in .*/table.parquet",
    ),
    ({"model": "cnn"}, r"task.model: cnn takes images, and the inputs have the shape \[2\]; take mlp"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_said_in_a_line(file: Path, tmp_path: Path, fields: dict[str, Any], message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no Parquet")
    write(tmp_path / "mixed" / "a.parquet")
    write(tmp_path / "mixed" / "b.parquet", a=np.arange(ROWS))
    write(tmp_path / "negative.parquet", y=[-1, 1] * (ROWS // 2))
    write(tmp_path / "when.parquet", when=pa.array(range(ROWS), pa.timestamp("s")))
    write(tmp_path / "nulls.parquet", a=[None, *range(ROWS - 1)])
    write(tmp_path / "ragged.parquet", v=[[1.0], [1.0, 2.0]] * (ROWS // 2))
    write(tmp_path / "other.parquet", a=["x"] * ROWS)
    broken(tmp_path / "broken.parquet")
    places = {
        name: str(tmp_path / f"{name}.parquet")
        for name in ("text", "when", "negative", "nulls", "ragged", "broken", "other")
    }
    places |= {"folder": str(tmp_path), "empty": str(tmp_path / "empty"), "mixed": str(tmp_path / "mixed")}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in fields.items()}
    one = task(filled.pop("path", file), **filled)

    with pytest.raises(StarlingError, match=message) as caught:
        data = load_data(one, DataConfig(), 2, 0)
        one.build()
        for part in data.parts:
            data.train.batch(concrete(part))
        data.validation.batch(torch.arange(len(data.validation)))
    assert "\n" not in str(caught.value)


def test_too_few_row_groups_for_the_nodes_say_which_node(file: Path):
    with pytest.raises(
        DataError, match="22 row groups cannot be divided among 30 nodes: node 22 gets none; ask for at"
    ):
        load_data(task(file, whole_row_groups=True), DataConfig(), 30, 0)
    assert len(load_data(task(file), DataConfig(), 30, 0).parts) == 30  # by rows, where there are too few row groups


def test_a_row_group_that_cannot_be_read_is_skipped_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    one = task(broken(tmp_path / "broken.parquet"), on_bad_row_group="skip")
    train = one.train_samples(1)
    with caplog.at_level(logging.WARNING, logger="starling"):
        logging.getLogger("starling").propagate = True
        kept = train.present(torch.arange(len(train)))
        assert torch.equal(kept, train.present(torch.arange(len(train))))
    assert kept.tolist() == [*range(30), *range(40, 220)]
    assert len(train.batch(kept)[0]) == 210
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "broken.parquet, row group 3 cannot be read" in warning


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_run_leaves_a_bad_row_group_out_or_stops(tmp_path: Path, algorithm: str):
    raw = {
        "rounds": 2,
        "algorithm": algorithm,
        "task": task(broken(tmp_path / "broken.parquet"), on_bad_row_group="skip").model_dump(),
        "data": {"batch_size": 5},
        "optimizer": {"lr": 0.001},
        "tracking": "none",
        "cluster": {"nodes": {"target": 2}},
    }
    assert simulate(raw, run_dir=tmp_path / "run").status == "finished"
    message = "node 0, round 0: .*/broken.parquet, row group 3 cannot be read: .*; task.on_bad_row_group: skip leaves"
    with pytest.raises(NodeFailedError, match=message) as caught:
        simulate(raw, ["task.on_bad_row_group=stop"], run_dir=tmp_path / "other")
    assert caught.value.traceback is None
    assert str(caught.value).isprintable()


def test_a_file_that_is_written_anew_is_looked_at_anew(tmp_path: Path):
    path = write(tmp_path / "table.parquet")
    assert len(load_data(task(path), DataConfig(), 2, 0).train) == 220
    write(path, group=5, table=pa.table(rows(0, 100) | {"y": [5] * 100}))
    data = load_data(task(path), DataConfig(), 2, 0)
    assert len(data.train) == 90
    assert task(path).build()(torch.zeros(1, 2)).shape == (1, 6)


def test_an_option_that_is_not_one():
    with pytest.raises(ValidationError, match="'stop' or 'skip'"):
        task("x", on_bad_row_group="ignore")


# --- elsewhere --------------------------------------------------------------------------------------------------------


class _Refuses(http.server.BaseHTTPRequestHandler):
    """What S3 says to who has no credentials."""

    def refuse(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = refuse  # noqa: N815 - the names that the base class calls

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def s3() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_s3_without_credentials(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    uri = f"s3://bucket/table.parquet?region=us-east-1&scheme=http&endpoint_override={s3}"
    with pytest.raises(
        DataError, match=r"cannot be read: .*ACCESS_DENIED.*; the process needs credentials: AWS_"
    ) as caught:
        task(uri).train_samples(1)
    assert "\n" not in str(caught.value)


def test_keys_in_a_uri_are_not_shown(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    uri = f"s3://AKIA123:topsecret@bucket/t.parquet?region=us-east-1&scheme=http&endpoint_override={s3}"
    with pytest.raises(DataError, match=r"s3://AKIA123:\*\*\*@bucket/t.parquet") as caught:
        task(uri).train_samples(1)
    assert "topsecret" not in str(caught.value)
