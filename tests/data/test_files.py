"""Files: patterns, folders, and a store that speaks S3's protocol."""

from __future__ import annotations

import http.server
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from starling.actors.data import files
from starling.actors.tasks.parquet import Parquet
from starling.actors.tasks.text_lm import TextLM
from starling.algorithms.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/a/*.txt", ["/a/b.txt", "/a/.txt"], ["/a/b/c.txt", "/a/b.txt.gz", "/a/btxt"]),
        ("/a/**/*.txt", ["/a/b.txt", "/a/b/c.txt", "/a/b/c/d.txt"], ["/b/a.txt"]),
        ("/a/**", ["/a/b", "/a/b/c"], ["/ab"]),
        ("/a/?.[ch]", ["/a/x.c", "/a/x.h"], ["/a/xy.c", "/a/x.o", "/a//.c"]),
        ("/a/[!x].c", ["/a/y.c"], ["/a/x.c"]),
        ("/a+b/*.c", ["/a+b/y.c"], ["/aab/y.c"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]):
    matches = re.compile(files._translated(pattern)).fullmatch
    assert all(matches(path) for path in yes)
    assert not any(matches(path) for path in no)


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/x.txt", "a/__pycache__/y.txt", "c.TXT", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = files.find("key", str(tmp_path), {".txt"})
    assert [listing.relative(path) for path in listing.files] == ["a/z.txt", "b.txt", "c.TXT"]
    assert listing.sizes == (7, 5, 5)
    (tmp_path / "e[1].txt").write_text("a path that is there is no pattern")
    assert len(files.find("key", str(tmp_path / "e[1].txt")).files) == 1
    (only,) = files.find("key", str(tmp_path / "d.png")).files
    assert only == str(tmp_path / "d.png")
    with pytest.raises(DataError, match=r"key: .* has no .csv files"):
        files.find("key", str(tmp_path), {".csv"})


def listed(path: Path, *suffixes: str) -> list[str]:
    listing = files.find("key", str(path), suffixes)
    return [listing.relative(file) for file in listing.files]


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_a_file_is_read_once_however_many_names_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    root, other = made(tmp_path / "data", "b/1.txt", "b/2.txt", "c.txt"), made(tmp_path / "other", "x/3.txt")
    (root / "again").symlink_to(root)  # into itself
    (root / "a").symlink_to(root / "b")  # a folder twice, and its link comes first
    (root / "a.txt").symlink_to(root / "c.txt")
    (root / "d.txt").hardlink_to(root / "c.txt")
    (root / "outside").symlink_to(other)
    (other / "back").symlink_to(root)
    (other / "x" / "loop").symlink_to(other / "x")
    expected = ["b/1.txt", "b/2.txt", "c.txt", "outside/x/3.txt"]
    for uri in (str(root), f"file://{root}", f"{root}/**/*.txt"):
        files.forget()
        caplog.clear()
        listing = files.find("key", uri, {".txt"})
        assert [listing.relative(file) for file in listing.files] == expected
        said = " ".join(record.message for record in caplog.records)
        assert "key: " in said
        assert "which is read already; left out" in said
        assert "has 3 more such names" in said


def test_links_of_a_hub_s_cache_are_followed(tmp_path: Path):
    made(tmp_path, "blobs/123", "blobs/456")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.txt").symlink_to("../blobs/123")
    (tmp_path / "snapshot" / "b.txt").symlink_to("../blobs/456")
    assert listed(tmp_path / "snapshot", ".txt") == ["a.txt", "b.txt"]


def test_a_link_that_leads_nowhere_is_named_if_it_is_meant(tmp_path: Path):
    made(tmp_path, "a.txt")
    (tmp_path / "b.dat").symlink_to("gone")
    (tmp_path / ".#a.txt").symlink_to("user@host.123")  # how an editor locks it
    (tmp_path / "loop.dat").symlink_to("loop.dat")
    assert listed(tmp_path, ".txt") == ["a.txt"]
    (tmp_path / "c.txt").symlink_to("gone")
    with pytest.raises(DataError, match=r"key: .*/c.txt is a link to gone, which cannot be read"):
        listed(tmp_path, ".txt")


def test_what_is_no_file_is_not_read(tmp_path: Path):
    made(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    assert listed(tmp_path, ".txt") == ["a.txt"]
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        listed(tmp_path / "b.txt")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path):
    made(tmp_path, "a.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("")
    with pytest.raises(DataError, match=r"key: the name of b'.*\\xff.txt' is no UTF-8"):
        listed(tmp_path, ".txt")


def test_what_spark_keeps_beside_its_tables_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("starling").propagate = True
    names = ["_delta_log/0.checkpoint.parquet", "_temporary/0/a.parquet", ".hidden.parquet", "_b.parquet", "_SUCCESS"]
    kept = ["_year=1/a.parquet", "a.parquet", "b/c.PARQUET"]
    made(tmp_path, *names, *kept, ".a.parquet.crc")
    files.forget()
    assert listed(tmp_path, ".parquet") == kept
    assert "is a Delta table: all Parquet files in it are read" in caplog.text
    assert listed(tmp_path / "**" / "*.parquet") == kept[:2]
    assert listed(tmp_path / "_b.parquet") == ["_b.parquet"]
    assert listed(tmp_path / "_temporary" / "*" / "*.parquet") == ["0/a.parquet"]
    assert listed(tmp_path / "_b.*") == ["_b.parquet"]
    with pytest.raises(DataError, match=r"matches no file in .*; names that begin with . or _ are left out"):
        listed(tmp_path / "?b.parquet")
    made(tmp_path / "texts", "__init__.py", "_private.py", ".x.py")  # of sources such names are ordinary
    assert listed(tmp_path / "texts", ".py") == ["__init__.py", "_private.py"]


def test_control_characters_are_not_shown():
    assert files.printable("a\x0f\nb é") == "a??b é"


# --- a store ----------------------------------------------------------------------------------------------------------


class _Store(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading takes: HEAD, GET with a range, and the list of a prefix."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    read: list[tuple[str, str | None]]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def key(self) -> str:
        return urlsplit(self.path).path.removeprefix("/bucket").lstrip("/")

    def do_HEAD(self) -> None:
        data = self.objects.get(self.key())
        if data is None:
            return self.answer(404)
        return self.answer(
            200, Content_Length=str(len(data)), ETag='"1"', Last_Modified="Wed, 25 Nov 2026 00:00:00 GMT"
        )

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "list-type" in query:
            found = sorted(key for key in self.objects if key.startswith(query.get("prefix", "")))
            entries = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size>"
                "<LastModified>2026-11-25T00:00:00.000Z</LastModified></Contents>"
                for key in found
            )
            head = f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
            body = f'<?xml version="1.0"?><ListBucketResult>{head}{entries}</ListBucketResult>'
            return self.answer(200, body.encode(), Content_Type="application/xml")
        data = self.objects.get(self.key())
        if data is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        asked = self.headers.get("Range")
        self.read.append((self.key(), asked))
        if asked is None:
            return self.answer(200, data, ETag='"1"')
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        piece = data[first : last + 1]
        return self.answer(206, piece, Content_Range=f"bytes {first}-{first + len(piece) - 1}/{len(data)}", ETag='"1"')

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    class Here(_Store):
        objects: dict[str, bytes] = {}
        read: list[tuple[str, str | None]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Here.query = f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield Here
    server.shutdown()
    server.server_close()
    thread.join(10)


def parquet_bytes(start: int, stop: int) -> bytes:
    sink = pa.BufferOutputStream()
    number = np.arange(start, stop)
    pq.write_table(pa.table({"a": number.astype("float32"), "y": number % 3}), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def test_parquet_in_a_store(store: type[_Store]):
    store.objects |= {
        f"data/part-{number}.parquet": parquet_bytes(200 * number, 200 * number + 200) for number in range(2)
    }
    store.objects["data/notes.txt"] = b"not to be read"
    for path in ("data", "data/part-*.parquet"):
        task = Parquet(path=f"s3://bucket/{path}{store.query}", label="y")  # type: ignore[attr-defined]
        train = task.train_samples(2)
        assert (len(train), len(task.validation_samples(2))) == (360, 40)
        features, labels = train.batch(torch.tensor([0, 200, 359]))
        assert features[:, 0].tolist() == [0.0, 220.0, 379.0]
        assert labels.tolist() == [0, 1, 1]
    assert {key for key, _ in store.read} == {"data/part-0.parquet", "data/part-1.parquet"}
    # Footers and row groups, and never a file as a whole.
    assert all(asked is not None for _, asked in store.read)
    with pytest.raises(DataError, match=r"task.path: s3://bucket/nowhere.* does not exist here"):
        Parquet(path=f"s3://bucket/nowhere{store.query}", label="y").train_samples(1)  # type: ignore[attr-defined]


def test_texts_in_a_store(store: type[_Store]):
    store.objects |= {f"texts/{number}.txt": bytes([ord("a") + number]) * 40 for number in range(3)}
    task = TextLM(corpus=f"s3://bucket/texts{store.query}", context=7, max_bytes=100)  # type: ignore[attr-defined]
    (windows,) = task.train_samples(1).batch(torch.arange(11))
    assert bytes(windows.flatten().tolist()) == b"a" * 40 + b"b" * 40 + b"c" * 8
